// The layout of the sum-tree, and the kernels that read priorities, rebuild the tree, check it and
// write the counters. One thread per leaf, or one warp per node.
#include "core/priority.h"
#include "cuda/descent.cuh"
#include "cuda/device_tree.h"
#include "cuda/grid.cuh"

namespace fastreplay {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 65535;  // of a grid-stride loop

__global__ void get_kernel(const __grid_constant__ DeviceTree tree, Counters* counters,
                           const int64_t* indices, int64_t n, double* out) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const bool in_range = static_cast<uint64_t>(indices[i]) < static_cast<uint64_t>(tree.capacity);
  if (!in_range) report(counters, kIndexOutOfRange, indices[i]);
  out[i] = in_range ? static_cast<double>(tree.nodes[indices[i]]) / double{kUnitLeaf} : 0.0;
}

// Writes the entries of a level as the sums of their children or, with `compare`, reports those
// that differ. One warp per entry.
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

// Reports nonzero words beyond the capacity, and nonzero stamps.
__global__ void check_leaves_kernel(const __grid_constant__ DeviceTree tree, int64_t leaf_slots,
                                    Counters* counters) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < leaf_slots; i += step) {
    const Word max_word = i < tree.capacity ? 0xFFFFFFFF : 0;
    if (tree.nodes[i] > max_word) report(counters, kDamaged, i);
  }
}

__global__ void write_kernel(Counters* counters, Counters value, unsigned fields) {
  if (fields & kAllFields) *counters = value;
  if (fields & kCallsField) counters->calls = value.calls;
  if (fields & kBetaField) counters->beta = value.beta;
  if (fields & kErrorField) counters->error = value.error;
}

// Entries of a level that have children or rows: all but the padding of its last node.
int64_t entries_of(const DeviceTree& tree, int level) {
  int64_t entries = tree.capacity;
  for (; level > 0; --level) entries = (entries + kDeviceFanOut - 1) / kDeviceFanOut;
  return entries;
}

void launch_sums(const DeviceTree& tree, bool compare, Counters* counters, cudaStream_t stream) {
  for (int level = 1; level < tree.levels; ++level) {
    const int64_t entries = entries_of(tree, level);
    launch(sum_kernel, blocks_for(entries, 1, kMaxBlocks), 32, stream, tree, level, entries,
           compare, counters);
  }
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

void launch_get(const DeviceTree& tree, Counters* counters, const int64_t* indices, int64_t n,
                double* out, cudaStream_t stream) {
  if (n > 0) {
    launch(get_kernel, blocks_for(n, kThreads), kThreads, stream, tree, counters, indices, n, out);
  }
}

void launch_rebuild(const DeviceTree& tree, cudaStream_t stream) {
  launch_sums(tree, false, nullptr, stream);
}

void launch_check(const DeviceTree& tree, Counters* counters, cudaStream_t stream) {
  const int64_t leaf_slots = tree.levels > 1 ? tree.offset[1] : tree.slots;
  launch(check_leaves_kernel, blocks_for(leaf_slots, kThreads, kMaxBlocks), kThreads, stream, tree,
         leaf_slots, counters);
  launch_sums(tree, true, counters, stream);
}

void launch_write(Counters* counters, const Counters& value, unsigned fields, cudaStream_t stream) {
  launch(write_kernel, 1, 1, stream, counters, value, fields);
}

}  // namespace fastreplay
