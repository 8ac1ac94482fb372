// What the kernels share: launching, the last block of a grid, sums and searches of a warp.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/philox.h"
#include "core/priority.h"
#include "cuda/device_tree.h"
#include "cuda/runtime.h"

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

// Threads of a block for n pieces of work: one warp, or a few, 2^k.
inline int threads_for(int64_t n, int most) {
  int threads = 32;
  while (threads < most && threads < n) threads *= 2;
  return threads;
}

__device__ inline int lane_of_thread() { return static_cast<int>(threadIdx.x) % 32; }

__device__ inline void report(Counters* counters, uint32_t error, int64_t culprit) {
  atomicExch(reinterpret_cast<Word*>(&counters->culprit), static_cast<Word>(culprit));
  atomicOr(&counters->error, error);
}

// For one thread of each block: fetches its number. What the block has done before the barrier that
// lies before this is then done for the last of all to fetch one.
__device__ inline unsigned take_ticket(Counters* counters) {
  const unsigned blocks = gridDim.x * gridDim.y;
  if (blocks == 1) return 0;  // a barrier orders the threads of one block
  __threadfence();
  return atomicInc(&counters->ticket, blocks - 1);  // the last one makes it 0 again
}

// For the same thread. If it is the last, its block, behind one more barrier, sees what the others
// have done, through atomics and volatile reads.
__device__ inline bool is_last_ticket(Counters* counters, unsigned ticket) {
  const unsigned blocks = gridDim.x * gridDim.y;
  if (ticket != blocks - 1) return false;
  if (blocks > 1) __threadfence();
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

// What a lane knows of the root. For whole warps, as are the next two.
struct Root {
  Word word, sum;  // its entry, and the sum up to it
  Word total;      // of all leaves
};

__device__ inline Root read_root(const DeviceTree& tree, int lane) {
  const Word word = tree.nodes[tree.offset[tree.levels - 1] + lane];
  const Word sum = prefix_sum(word, lane);
  return {word, sum, __shfl_sync(kAllLanes, sum, 31)};
}

struct Found {
  int64_t index;
  uint32_t leaf;
};

// The leaf under a target below the total.
__device__ inline Found find_leaf(const DeviceTree& tree, const Root& root, Word target, int lane) {
  int64_t node = 0;
  Word word = root.word, sum = root.sum;
  for (int level = tree.levels - 1;; --level) {
    const int child = __ffs(static_cast<int>(__ballot_sync(kAllLanes, sum > target))) - 1;
    node = node * kDeviceFanOut + child;
    if (level == 0) return {node, static_cast<uint32_t>(__shfl_sync(kAllLanes, word, child))};
    target -= __shfl_sync(kAllLanes, sum - word, child);
    word = tree.nodes[tree.offset[level - 1] + node * kDeviceFanOut + lane];
    sum = prefix_sum(word, lane);
  }
}

// A batch cut into equal strata: stratum64 of philox.h, without its slow divisions.
struct Strata {
  Strata(bool stratified, int64_t batch)
      : n(stratified ? static_cast<uint32_t>(batch) : 0), reciprocal(n > 0 ? ~Word{0} / n : 0) {}

  uint32_t n;  // 0: it is not cut
  Word reciprocal;
};

// x / n. The remainder stays in x.
__device__ inline Word divide(Word& x, const Strata& strata) {
  Word quotient = mulhi64(x, strata.reciprocal);  // or one too small
  x -= quotient * strata.n;
  if (x >= strata.n) {
    x -= strata.n;
    ++quotient;
  }
  return quotient;
}

// Draw `sample` of a batch by its 64 random bits; the total is above 0.
__device__ inline Found draw_leaf(const DeviceTree& tree, const Root& root, Word bits,
                                  const Strata& strata, int64_t sample, int lane) {
  if (strata.n > 0) {
    Word rest = static_cast<Word>(sample) << 32 | bits >> 32;
    const Word high = divide(rest, strata);
    rest = rest << 32 | (bits & 0xFFFFFFFF);
    bits = high << 32 | divide(rest, strata);
  }
  return find_leaf(tree, root, mulhi64(bits, root.total), lane);
}

// Tells the ancestors of a leaf that it has changed from `before` to `after`.
__device__ inline void add_difference(const DeviceTree& tree, int64_t index, uint32_t before,
                                      uint32_t after) {
  const Word difference = Word{after} - Word{before};  // modulo 2^64, as the sums are
  if (difference == 0) return;
  Word entry = static_cast<Word>(index);  // unsigned: divided by a shift
  for (int level = 1; level < tree.levels; ++level) {
    entry /= kDeviceFanOut;
    atomicAdd(&tree.nodes[tree.offset[level] + entry], difference);
  }
}

// Writes a leaf that no other thread of this kernel writes.
__device__ inline void write_leaf(const DeviceTree& tree, int64_t index, uint32_t leaf) {
  const uint32_t before = static_cast<uint32_t>(tree.nodes[index]);
  tree.nodes[index] = leaf;
  add_difference(tree, index, before, leaf);
}

}  // namespace fastreplay
