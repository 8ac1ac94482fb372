// What the kernels share: launching, the last block of a grid, sums and searches of a warp.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../philox.h"
#include "../priority.h"
#include "device_tree.h"
#include "runtime.h"

// Memory of a block. The tests compile these sources as C++, where it cannot be a static variable.
#ifdef __CUDACC__
#define FR_SHARED(type, name) __shared__ type name
#else
#define FR_SHARED(type, name) type& name = emulation::shared<type>([] {})
#endif

namespace fastreplay {

constexpr unsigned kAllLanes = 0xFFFFFFFF;

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 blocks, int threads, cudaStream_t stream,
            const Arguments&... arguments) {
#ifdef __CUDACC__
  kernel<<<blocks, threads, 0, stream>>>(arguments...);
#else
  emulation::launch(kernel, blocks, threads, stream, arguments...);
#endif
  check_cuda(cudaGetLastError(), "a kernel launch");
}

// Blocks for n pieces of work, at least one.
inline unsigned blocks_for(int64_t n, int64_t a_block, int64_t most = INT32_MAX) {
  const int64_t blocks = (n + a_block - 1) / a_block;
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks > most ? most : blocks);
}

__device__ inline int lane_of_thread() { return static_cast<int>(threadIdx.x) % 32; }

__device__ inline void report(Counters* counters, uint32_t error, int64_t culprit) {
  atomicExch(reinterpret_cast<Word*>(&counters->culprit), static_cast<Word>(culprit));
  atomicOr(&counters->error, error);
}

// For one thread of each block: fetches its number. What the block has done before the barrier that
// lies before this is then done for the last of all to fetch one.
__device__ inline unsigned take_ticket(Counters* counters) {
  if (gridDim.x * gridDim.y == 1) return 0;  // a barrier orders the threads of one block
  __threadfence();
  return atomicAdd(&counters->ticket, 1u);
}

// For the same thread. If it is the last, its block, behind one more barrier, sees what the others
// have done, through atomics and volatile reads.
__device__ inline bool is_last_ticket(Counters* counters, unsigned ticket) {
  const unsigned blocks = gridDim.x * gridDim.y;
  if (ticket != blocks - 1) return false;
  if (blocks == 1) return true;
  __threadfence();
  counters->ticket = 0;
  return true;
}

// Whether this block is the last of its grid to come here. All its threads get the same answer.
__device__ inline bool is_last_block(Counters* counters) {
  FR_SHARED(bool, last);
  __syncthreads();
  if (threadIdx.x == 0) last = is_last_ticket(counters, take_ticket(counters));
  __syncthreads();
  return last;
}

// Lane i gets the sum over lanes 0 to i.
__device__ inline Word prefix_sum(Word x, int lane) {
  for (int distance = 1; distance < 32; distance *= 2) {
    const Word below = __shfl_up_sync(kAllLanes, x, distance);
    if (lane >= distance) x += below;
  }
  return x;
}

// The sum of all leaves. For whole warps, as are the next two.
__device__ inline Word tree_total(const DeviceTree& tree, int lane) {
  const Word sum = prefix_sum(tree.nodes[tree.offset[tree.levels - 1] + lane], lane);
  return __shfl_sync(kAllLanes, sum, 31);
}

struct Found {
  int64_t index;
  uint32_t leaf;
};

// The leaf under a target below the total.
__device__ inline Found find_leaf(const DeviceTree& tree, Word target, int lane) {
  int64_t node = 0;
  Word word = 0;
  for (int level = tree.levels - 1; level >= 0; --level) {
    word = tree.nodes[tree.offset[level] + node * kDeviceFanOut + lane];
    const Word sum = prefix_sum(word, lane);
    const int child = __ffs(static_cast<int>(__ballot_sync(kAllLanes, sum > target))) - 1;
    target -= __shfl_sync(kAllLanes, sum - word, child);
    word = __shfl_sync(kAllLanes, word, child);
    node = node * kDeviceFanOut + child;
  }
  return {node, static_cast<uint32_t>(word)};
}

// Draw `sample` of n by its 64 random bits; total > 0.
__device__ inline Found draw_leaf(const DeviceTree& tree, Word total, uint64_t bits,
                                  bool stratified, int64_t sample, int64_t n, int lane) {
  if (stratified) {
    bits = stratum64(bits, static_cast<uint32_t>(sample), static_cast<uint32_t>(n));
  }
  return find_leaf(tree, mulhi64(bits, total), lane);
}

// Tells the ancestors of a leaf that it has changed from `before` to `after`.
__device__ inline void add_difference(const DeviceTree& tree, int64_t index, uint32_t before,
                                      uint32_t after) {
  const Word difference = Word{after} - Word{before};  // modulo 2^64, as the sums are
  if (difference == 0) return;
  for (int level = 1; level < tree.levels; ++level) {
    index /= kDeviceFanOut;
    atomicAdd(&tree.nodes[tree.offset[level] + index], difference);
  }
}

// Writes a leaf that no other thread of this kernel writes.
__device__ inline void write_leaf(const DeviceTree& tree, int64_t index, uint32_t leaf) {
  const uint32_t before = static_cast<uint32_t>(tree.nodes[index]);
  tree.nodes[index] = leaf;
  add_difference(tree, index, before, leaf);
}

}  // namespace fastreplay
