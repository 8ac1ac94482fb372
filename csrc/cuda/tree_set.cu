// Sets the priorities of a batch of rows, in one launch: all of them, or none if one is bad.
//
//   1. every block checks the whole batch, so that no block waits for another;
//   2. a grid-stride loop quantises the pairs and raises leaf words by atomicMax on
//      | order stamp i + 1 | leaf |, so that the last of several pairs for one row wins;
//   3. a thread that has raised a word adds the difference to the ancestors (leaf.cuh); all
//      differences of one word add up to last leaf - first leaf;
//   4. the last block (grid.cuh) clears the stamps.
//
// Cost: each block reads the batch once (12 or 16 bytes a pair); one atomic per level and pair.
#include "core/priority.h"
#include "core/window.h"
#include "cuda/device_tree.h"
#include "cuda/grid.cuh"
#include "cuda/leaf.cuh"
#include "cuda/reference.h"

namespace fastreplay {
namespace {

// Few and large blocks, because each checks the whole batch.
constexpr int64_t kMaxBlocks = 64;
constexpr int kMaxThreads = 1024;

__device__ uint32_t errors_of(const Priorities& p, int64_t capacity, int64_t index, double value) {
  constexpr double kMaxDouble = 1.7976931348623157e308;
  uint32_t errors = 0;
  if (static_cast<uint64_t>(index) >= static_cast<uint64_t>(capacity)) errors |= kIndexOutOfRange;
  if (!(value <= kMaxDouble && value >= -kMaxDouble)) errors |= kNotFinite;
  if (!p.errors && value < 0.0) errors |= kNegative;
  return errors;
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    set_kernel(const __grid_constant__ DeviceTree tree, Counters* counters,
               const __grid_constant__ Priorities p) {
  // max_leaf only grows, so the only cost of a stale value is an unnecessary atomic.
  const uint32_t max_leaf = *static_cast<volatile uint32_t*>(&counters->max_leaf);
  const T* const values = static_cast<const T*>(p.values);
  uint32_t errors = 0;
  int64_t culprit = 0;
  for (int64_t i = threadIdx.x; i < p.n; i += blockDim.x) {
    const int64_t index = p.indices[i];
    const uint32_t found = errors_of(p, tree.capacity, index, values[i]);
    if (found != 0) culprit = index;
    errors |= found;
  }
  if (errors != 0 && blockIdx.x == 0) report(counters, errors, culprit);
  if (__syncthreads_or(errors != 0)) return;

  const int64_t first = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = first; i < p.n; i += step) {
    const int64_t index = p.indices[i];
    // Loaded before the power is computed, which hides the latency.
    const uint8_t flags = p.errors ? p.flags[index] : uint8_t{kDrawable};
    double value = values[i];
    if (p.errors) value = (value < 0.0 ? -value : value) + p.epsilon;
    const uint32_t leaf = quantise(value, p.alpha);
    if (p.errors && leaf > max_leaf) atomicMax(&counters->max_leaf, leaf);
    if (!takes_priority(flags, p.added)) continue;
    const Word stamped = static_cast<Word>(i + 1) << 32 | leaf;
    const Word before = atomicMax(&tree.nodes[index], stamped);
    if (before < stamped) add_difference(tree, index, static_cast<uint32_t>(before), leaf);
  }
  if (!is_last_block(counters)) return;
  for (int64_t i = threadIdx.x; i < p.n; i += blockDim.x) {
    atomicAnd(&tree.nodes[p.indices[i]], Word{0xFFFFFFFF});
  }
}

}  // namespace

void launch_set(const DeviceTree& tree, Counters* counters, const Priorities& priorities,
                cudaStream_t stream) {
  if (priorities.n == 0) return;
  if (uses_reference()) return reference::launch_set(tree, counters, priorities, stream);
  void (*const kernel)(DeviceTree, Counters*, Priorities) =
      priorities.doubles ? set_kernel<double> : set_kernel<float>;
  launch(kernel, blocks_for(priorities.n, kMaxThreads, kMaxBlocks),
         threads_for(priorities.n, kMaxThreads), stream, tree, counters, priorities);
}

}  // namespace fastreplay
