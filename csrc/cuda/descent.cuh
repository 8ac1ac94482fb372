// A warp's descent through the sum-tree (device_tree.h): from the root to the leaf that owns a
// target.
//
//   target 9      node          | 4 | 3 |  5 | ...     one entry per lane
//                 prefix sums   | 4 | 7 | 12 | ...     lane 2 is the first above 9:
//                                                      descend into child 2 with target 9 - 7 = 2
//
// The leaf that owns a target t in [0, total) is the first whose prefix sum over all leaves is
// above t. So a leaf of 0 owns nothing, and a leaf of w owns w targets.
//
// Cost: one coalesced load of 256 bytes, five shuffles and one ballot per level. The loads depend
// on each other, so the latency of a descent is that of `levels` loads.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/philox.h"
#include "cuda/device_tree.h"
#include "cuda/warp.cuh"

namespace fastreplay {

// The root, spread over the lanes of a warp. It is read once, for the first step of a descent.
struct Root {
  Word word;   // this lane's entry
  Word sum;    // of the entries up to and including this lane's
  Word total;  // of all entries: the sum of all leaves
};

__device__ inline Root read_root(const DeviceTree& tree, int lane) {
  const Word word = tree.nodes[tree.offset[tree.levels - 1] + lane];
  const Word sum = prefix_sum(word, lane);
  return {word, sum, __shfl_sync(kAllLanes, sum, 31)};
}

struct Found {
  int64_t index;  // -1: the tree is damaged
  uint32_t leaf;
};

// The leaf that owns a target below root.total. Called by a whole warp. In a damaged tree a descent
// may reach a node whose entries do not add up to their parent, or a leaf beyond the capacity.
__device__ inline Found find_leaf(const DeviceTree& tree, const Root& root, Word target, int lane) {
  int64_t node = 0;
  Word word = root.word, sum = root.sum;
  for (int level = tree.levels - 1;; --level) {
    const int child = first_lane(__ballot_sync(kAllLanes, sum > target));
    if (child < 0) return {-1, 0};
    node = node * kDeviceFanOut + child;
    if (level == 0) {
      if (node >= tree.capacity) return {-1, 0};
      return {node, static_cast<uint32_t>(__shfl_sync(kAllLanes, word, child))};
    }
    target -= __shfl_sync(kAllLanes, sum - word, child);
    word = tree.nodes[tree.offset[level - 1] + node * kDeviceFanOut + lane];
    sum = prefix_sum(word, lane);
  }
}

// A batch divided into n equal strata, as by stratum64 in philox.h, but with the divisions by n
// replaced by multiplications.
struct Strata {
  Strata(bool stratified, int64_t batch)
      : n(stratified ? static_cast<uint32_t>(batch) : 0), reciprocal(n > 0 ? ~Word{0} / n : 0) {}

  uint32_t n;  // 0: draws are not stratified
  Word reciprocal;
};

// Divides x by strata.n: returns the quotient and leaves the remainder in x.
__device__ inline Word divide(Word& x, const Strata& strata) {
  Word quotient = mulhi64(x, strata.reciprocal);  // exact, or one too small
  x -= quotient * strata.n;
  if (x >= strata.n) {
    x -= strata.n;
    ++quotient;
  }
  return quotient;
}

// The leaf that sample `sample` of a batch draws with its 64 random bits; root.total is above 0.
// Called by a whole warp.
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

}  // namespace fastreplay
