// Changes a leaf of the sum-tree (device_tree.h) and the sums above it. Called by single threads.
//
// An inner entry changes by the difference of its leaf, modulo 2^64. Additions commute, so any
// number of threads may change leaves at once and the sums are exact when all are done.
//
// Cost: one atomicAdd per level above the leaves; nothing waits for its result.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/device_tree.h"

namespace fastreplay {

// Adds the change of a leaf to all of its ancestors.
__device__ inline void add_difference(const DeviceTree& tree, int64_t index, uint32_t before,
                                      uint32_t after) {
  const Word difference = Word{after} - Word{before};
  if (difference == 0) return;
  Word entry = static_cast<Word>(index);  // unsigned, so that the division is a shift
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
