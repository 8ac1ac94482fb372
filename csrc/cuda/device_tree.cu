#include "core/window.h"
#include "cuda/device_tree.h"
#include "cuda/kernel.cuh"

namespace fastreplay {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 64;  // each checks the whole batch before it changes anything
constexpr int kMostThreads = 1024;   // of a block that sets: a few large blocks check less often

__device__ uint32_t errors_in(const Priorities& p, int64_t capacity, int64_t index, double value) {
  uint32_t errors = 0;
  if (static_cast<uint64_t>(index) >= static_cast<uint64_t>(capacity)) errors |= kIndexOutOfRange;
  if (!(value <= 1.7976931348623157e308 && value >= -1.7976931348623157e308)) errors |= kNotFinite;
  if (!p.errors && value < 0.0) errors |= kNegative;
  return errors;
}

// The threads of all blocks share the pairs. Nothing is changed if one is bad.
template <typename T>
__global__ void __launch_bounds__(kMostThreads)
    set_kernel(const __grid_constant__ DeviceTree tree, Counters* counters,
               const __grid_constant__ Priorities p) {
  // It only grows: where this is too old, an atomic is wasted.
  const uint32_t max_leaf = *static_cast<volatile uint32_t*>(&counters->max_leaf);
  const T* const values = static_cast<const T*>(p.values);
  uint32_t errors = 0;
  int64_t culprit = 0;
  for (int64_t i = threadIdx.x; i < p.n; i += blockDim.x) {
    const int64_t index = p.indices[i];
    const uint32_t found = errors_in(p, tree.capacity, index, values[i]);
    if (found != 0) culprit = index;
    errors |= found;
  }
  if (errors != 0 && blockIdx.x == 0) report(counters, errors, culprit);
  if (__syncthreads_or(errors != 0)) return;

  const int64_t first = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = first; i < p.n; i += step) {
    const int64_t index = p.indices[i];
    // Asked for before the power, which takes as long.
    const uint8_t flags = p.errors ? p.flags[index] : uint8_t{kDrawable};
    double value = values[i];
    if (p.errors) value = (value < 0.0 ? -value : value) + p.epsilon;
    const uint32_t leaf = quantise(value, p.alpha);
    if (p.errors && leaf > max_leaf) atomicMax(&counters->max_leaf, leaf);
    if (!(flags & kDrawable)) continue;  // overwritten, or cut, since it was drawn
    const Word stamped = static_cast<Word>(i + 1) << 32 | leaf;
    const Word before = atomicMax(&tree.nodes[index], stamped);
    if (before < stamped) add_difference(tree, index, static_cast<uint32_t>(before), leaf);
  }
  if (!is_last_block(counters)) return;
  for (int64_t i = threadIdx.x; i < p.n; i += blockDim.x) {
    atomicAnd(&tree.nodes[p.indices[i]], Word{0xFFFFFFFF});
  }
}

// A block is one warp, here and in find_kernel.
__global__ void draw_kernel(const __grid_constant__ DeviceTree tree, Counters* counters,
                            uint64_t seed, const __grid_constant__ Strata strata, int64_t n,
                            int64_t* out) {
  const int lane = lane_of_thread();
  const int64_t sample = blockIdx.x;
  const uint64_t call = counters->calls;
  const Root root = read_root(tree, lane);
  const uint64_t bits = random64(seed, call, static_cast<uint32_t>(sample), 0);
  Found found{0, 0};
  if (root.total > 0 && sample < n) {
    found = draw_leaf(tree, root, bits, strata, sample, lane);
  }
  if (lane == 0 && sample < n) out[sample] = found.index;
  if (!is_last_block(counters) || lane > 0) return;
  if (root.total > 0) {
    counters->calls = call + 1;
  } else {
    report(counters, kNothingToDraw, 0);
  }
}

__global__ void find_kernel(const __grid_constant__ DeviceTree tree, Counters* counters,
                            const int64_t* targets, int64_t* out) {
  const int lane = lane_of_thread();
  const int64_t target = targets[blockIdx.x];
  const Root root = read_root(tree, lane);
  if (static_cast<Word>(target) < root.total) {
    const Found found = find_leaf(tree, root, static_cast<Word>(target), lane);
    if (lane == 0) out[blockIdx.x] = found.index;
  } else if (lane == 0) {
    report(counters, kTargetOutOfRange, target);
    out[blockIdx.x] = 0;
  }
}

__global__ void get_kernel(const __grid_constant__ DeviceTree tree, Counters* counters,
                           const int64_t* indices, int64_t n, double* out) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const bool fits = static_cast<uint64_t>(indices[i]) < static_cast<uint64_t>(tree.capacity);
  if (!fits) report(counters, kIndexOutOfRange, indices[i]);
  out[i] = fits ? static_cast<double>(tree.nodes[indices[i]]) / double{kUnitLeaf} : 0.0;
}

// One block: the smallest leaf must be known before the first weight.
__global__ void weights_kernel(const __grid_constant__ DeviceTree tree, Counters* counters,
                               const int64_t* indices, int64_t n, double beta, float* out) {
  FR_SHARED(uint32_t, smallest);
  if (threadIdx.x == 0) smallest = UINT32_MAX;
  __syncthreads();
  int bad = 0;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    const bool fits = static_cast<uint64_t>(indices[i]) < static_cast<uint64_t>(tree.capacity);
    const uint32_t leaf = fits ? static_cast<uint32_t>(tree.nodes[indices[i]]) : 0;
    if (leaf == 0) report(counters, fits ? kNoWeight : kIndexOutOfRange, indices[i]);
    bad |= leaf == 0;
    atomicMin(&smallest, leaf);
  }
  bad = __syncthreads_or(bad);
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    out[i] = bad ? 0.0f
                 : importance_weight(smallest, static_cast<uint32_t>(tree.nodes[indices[i]]), beta);
  }
}

__global__ void total_kernel(const __grid_constant__ DeviceTree tree, Word* out) {
  const Word total = read_root(tree, lane_of_thread()).total;
  if (threadIdx.x == 0) *out = total;
}

// One warp an entry of `level`: writes the sum of its children, or compares with it.
__global__ void sum_kernel(const __grid_constant__ DeviceTree tree, int level, int64_t entries,
                           bool compare, Counters* counters) {
  const int lane = lane_of_thread();
  for (int64_t entry = blockIdx.x; entry < entries; entry += gridDim.x) {
    const Word child = tree.nodes[tree.offset[level - 1] + entry * kDeviceFanOut + lane];
    const Word sum = __shfl_sync(kAllLanes, prefix_sum(child, lane), 31);
    Word* here = &tree.nodes[tree.offset[level] + entry];
    if (lane > 0) continue;
    if (!compare) *here = sum;
    if (*here != sum) report(counters, kDamaged, entry);
  }
}

// Words that must be 0: rows beyond the capacity, the stamps.
__global__ void check_leaves_kernel(const __grid_constant__ DeviceTree tree, int64_t leaf_slots,
                                    Counters* counters) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < leaf_slots; i += step) {
    const Word allowed = i < tree.capacity ? 0xFFFFFFFF : 0;
    if (tree.nodes[i] > allowed) report(counters, kDamaged, i);
  }
}

__global__ void write_kernel(Counters* counters, Counters value, unsigned fields) {
  if (fields & kAllFields) *counters = value;
  if (fields & kCallsField) counters->calls = value.calls;
  if (fields & kBetaField) counters->beta = value.beta;
  if (fields & kErrorField) counters->error = value.error;
}

// Entries of a level, without the padding of its last node.
int64_t entries_of(const DeviceTree& tree, int level) {
  int64_t entries = tree.capacity;
  for (; level > 0; --level) entries = (entries + kDeviceFanOut - 1) / kDeviceFanOut;
  return entries;
}

}  // namespace

DeviceTree::DeviceTree(int64_t capacity, Word* nodes)
    : nodes(nodes), capacity(capacity), slots(0), levels(0), offset{} {
  int64_t entries = capacity, count;
  do {
    count = (entries + kDeviceFanOut - 1) / kDeviceFanOut;  // nodes of this level
    offset[levels++] = slots;
    slots += count * kDeviceFanOut;
    entries = count;
  } while (count > 1);
}

void launch_set(const DeviceTree& tree, Counters* counters, const Priorities& priorities,
                cudaStream_t stream) {
  if (priorities.n == 0) return;
  void (*const kernel)(DeviceTree, Counters*, Priorities) =
      priorities.doubles ? set_kernel<double> : set_kernel<float>;
  launch(kernel, blocks_for(priorities.n, kMostThreads, kMostBlocks),
         threads_for(priorities.n, kMostThreads), stream, tree, counters, priorities);
}

void launch_draw(const DeviceTree& tree, Counters* counters, uint64_t seed, bool stratified,
                 int64_t n, int64_t* out, cudaStream_t stream) {
  launch(draw_kernel, blocks_for(n, 1), 32, stream, tree, counters, seed, Strata(stratified, n), n,
         out);
}

void launch_find(const DeviceTree& tree, Counters* counters, const int64_t* targets, int64_t n,
                 int64_t* out, cudaStream_t stream) {
  if (n > 0) launch(find_kernel, blocks_for(n, 1), 32, stream, tree, counters, targets, out);
}

void launch_get(const DeviceTree& tree, Counters* counters, const int64_t* indices, int64_t n,
                double* out, cudaStream_t stream) {
  if (n > 0) {
    launch(get_kernel, blocks_for(n, kThreads), kThreads, stream, tree, counters, indices, n, out);
  }
}

void launch_weights(const DeviceTree& tree, Counters* counters, const int64_t* indices, int64_t n,
                    double beta, float* out, cudaStream_t stream) {
  if (n > 0) launch(weights_kernel, 1, kThreads, stream, tree, counters, indices, n, beta, out);
}

void launch_total(const DeviceTree& tree, Word* out, cudaStream_t stream) {
  launch(total_kernel, 1, 32, stream, tree, out);
}

void launch_rebuild(const DeviceTree& tree, cudaStream_t stream) {
  Counters* const none = nullptr;
  for (int level = 1; level < tree.levels; ++level) {
    const int64_t entries = entries_of(tree, level);
    launch(sum_kernel, blocks_for(entries, 1, 65535), 32, stream, tree, level, entries, false,
           none);
  }
}

void launch_check(const DeviceTree& tree, Counters* counters, cudaStream_t stream) {
  const int64_t leaf_slots = tree.levels > 1 ? tree.offset[1] : tree.slots;
  launch(check_leaves_kernel, blocks_for(leaf_slots, kThreads, 65535), kThreads, stream, tree,
         leaf_slots, counters);
  for (int level = 1; level < tree.levels; ++level) {
    const int64_t entries = entries_of(tree, level);
    launch(sum_kernel, blocks_for(entries, 1, 65535), 32, stream, tree, level, entries, true,
           counters);
  }
}

void launch_write(Counters* counters, const Counters& value, unsigned fields, cudaStream_t stream) {
  launch(write_kernel, 1, 1, stream, counters, value, fields);
}

}  // namespace fastreplay
