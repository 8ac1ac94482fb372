// Draws from the sum-tree by random bits or by given targets, and the importance weights of rows.
//
// For each sample or target, a block of one warp descends (descent.cuh). The last block of a draw
// counts the call. Weights are computed by one block, which first finds the smallest leaf.
#include "core/priority.h"
#include "cuda/descent.cuh"
#include "cuda/device_tree.h"
#include "cuda/grid.cuh"
#include "cuda/reference.h"

namespace fastreplay {
namespace {

constexpr int kThreads = 256;  // of the block that computes weights

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
  if (lane == 0 && sample < n) {
    if (found.index < 0) report(counters, kDamaged, sample);
    out[sample] = found.index < 0 ? 0 : found.index;
  }
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
    if (lane > 0) return;
    if (found.index < 0) report(counters, kDamaged, target);
    out[blockIdx.x] = found.index < 0 ? 0 : found.index;
  } else if (lane == 0) {
    report(counters, kTargetOutOfRange, target);
    out[blockIdx.x] = 0;
  }
}

// One block. If any row is out of range or has no weight, all weights are 0.
__global__ void weights_kernel(const __grid_constant__ DeviceTree tree, Counters* counters,
                               const int64_t* indices, int64_t n, double beta, float* out) {
  FR_SHARED(uint32_t, smallest);
  if (threadIdx.x == 0) smallest = UINT32_MAX;
  __syncthreads();
  int has_errors = 0;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    const bool in_range = static_cast<uint64_t>(indices[i]) < static_cast<uint64_t>(tree.capacity);
    const uint32_t leaf = in_range ? static_cast<uint32_t>(tree.nodes[indices[i]]) : 0;
    if (leaf == 0) report(counters, in_range ? kNoWeight : kIndexOutOfRange, indices[i]);
    has_errors |= leaf == 0;
    atomicMin(&smallest, leaf);
  }
  has_errors = __syncthreads_or(has_errors);
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    out[i] = has_errors
                 ? 0.0f
                 : importance_weight(smallest, static_cast<uint32_t>(tree.nodes[indices[i]]), beta);
  }
}

}  // namespace

void launch_draw(const DeviceTree& tree, Counters* counters, uint64_t seed, bool stratified,
                 int64_t n, int64_t* out, cudaStream_t stream) {
  if (uses_reference()) {
    return reference::launch_draw(tree, counters, seed, stratified, n, out, stream);
  }
  launch(draw_kernel, blocks_for(n, 1), 32, stream, tree, counters, seed, Strata(stratified, n), n,
         out);
}

void launch_find(const DeviceTree& tree, Counters* counters, const int64_t* targets, int64_t n,
                 int64_t* out, cudaStream_t stream) {
  if (n == 0) return;
  if (uses_reference()) return reference::launch_find(tree, counters, targets, n, out, stream);
  launch(find_kernel, blocks_for(n, 1), 32, stream, tree, counters, targets, out);
}

void launch_weights(const DeviceTree& tree, Counters* counters, const int64_t* indices, int64_t n,
                    double beta, float* out, cudaStream_t stream) {
  if (n > 0) launch(weights_kernel, 1, kThreads, stream, tree, counters, indices, n, beta, out);
}

}  // namespace fastreplay
