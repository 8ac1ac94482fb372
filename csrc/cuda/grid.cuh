// Launching a grid, latching an error, and finding the last block of a grid.
//
// The kernels need compute capability 7.0 (__grid_constant__, warp operations with a mask) and use
// nothing newer. The oldest that nvcc 13 compiles for is 7.5.
//
// Last-block pattern: each block makes its writes visible to the device, then increments
// Counters::ticket. The increment returns the block's arrival index, 0 to blocks - 1. The block
// with index blocks - 1 sees the writes of all others and finishes the grid's work, which saves a
// second launch.
//
// Invariants
//   - Counters::ticket is 0 between launches: atomicInc wraps it around at the last arrival;
//   - launches that share Counters do not overlap (StreamOrder in runtime.h orders them).
//
// Cost: one fence and one atomic per block; none for a grid of one block.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/counters.h"
#include "cuda/device_tree.h"
#include "cuda/runtime.h"

// Declares a variable in shared memory. The tests compile these sources as C++, where it is a
// reference to memory of the emulated block.
#ifdef __CUDACC__
#define FR_SHARED(type, name) __shared__ type name
#else
#define FR_SHARED(type, name) type& name = emulation::shared<type>([] {})
#endif

namespace fastreplay {

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 blocks, int threads, cudaStream_t stream,
            const Arguments&... arguments) {
#ifdef __CUDACC__
  kernel<<<blocks, threads, 0, stream>>>(arguments...);
#else
  emulation::launch_grid(kernel, blocks, threads, stream, arguments...);
#endif
  check_cuda(cudaGetLastError(), "a kernel launch");
}

// Blocks for n items, 1 to `max_blocks`.
inline unsigned blocks_for(int64_t n, int64_t items_per_block, int64_t max_blocks = INT32_MAX) {
  const int64_t blocks = (n + items_per_block - 1) / items_per_block;
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks > max_blocks ? max_blocks : blocks);
}

// Threads of a block for n items: a power of two from 32 to `max_threads`.
inline int threads_for(int64_t n, int max_threads) {
  int threads = 32;
  while (threads < max_threads && threads < n) threads *= 2;
  return threads;
}

// Latches an error until the host reads it. `culprit` is the bad index, action or target; if there
// are several errors at once, any one of their culprits is kept.
__device__ inline void report(Counters* counters, uint32_t error, int64_t culprit) {
  atomicExch(reinterpret_cast<Word*>(&counters->culprit), static_cast<Word>(culprit));
  atomicOr(&counters->error, error);
}

// Publishes this block's writes and returns its arrival index. Called by one thread of each block,
// after a barrier that follows the writes.
__device__ inline unsigned arrive(Counters* counters) {
  const unsigned blocks = gridDim.x * gridDim.y;
  if (blocks == 1) return 0;  // a barrier is enough within one block
  __threadfence();
  return atomicInc(&counters->ticket, blocks - 1);
}

// Whether an arrival index is the last. If so, after one more barrier the whole block sees the
// writes of all blocks, through atomics and volatile reads. Called by the thread that arrived.
__device__ inline bool is_last_arrival(unsigned arrival) {
  const unsigned blocks = gridDim.x * gridDim.y;
  if (arrival != blocks - 1) return false;
  if (blocks > 1) __threadfence();
  return true;
}

// Whether this block is the last of its grid to arrive. Called by all threads of the block, which
// all get the same result.
__device__ inline bool is_last_block(Counters* counters) {
  FR_SHARED(bool, is_last);
  __syncthreads();
  if (threadIdx.x == 0) is_last = is_last_arrival(arrive(counters));
  __syncthreads();
  return is_last;
}

}  // namespace fastreplay
