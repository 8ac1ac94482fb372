// The exact sum-tree on a CUDA device. It draws the same rows as cpu/sum_tree.h, but has another
// layout.
//
//   level 2 (root)    [ e0 | e1 | ... | e31 ]                 one node of 32 words
//                        |    |
//   level 1           [32 sums][32 sums] ...
//                        |
//   level 0           [32 leaves][32 leaves] ...              the capacity, in whole nodes
//
// All levels are in one array of 64-bit words, the leaves first. A node is 256 bytes: a warp loads
// it in one access, one entry per lane. An entry of an inner node is the sum of its child's
// entries, so an update is one atomicAdd per level.
//
//   leaf word    | order stamp (32 bits) | leaf (32 bits) |
//
// Stamps order the duplicates within one update (tree_set.cu).
//
// Invariants, between launches
//   - every entry of an inner node is the exact sum of its 32 children;
//   - stamps are 0, and so are entries without children or rows.
//
// Cost at 2^20 leaves: 4 levels, 8.26 bytes per leaf. A draw loads one node per level; an update is
// one atomic per level.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/counters.h"

namespace fastreplay {

constexpr int kDeviceFanOut = 32;
constexpr int kMaxDeviceLevels = 6;  // 2^27 leaves

using Word = unsigned long long;  // the type of CUDA's 64-bit atomics
static_assert(sizeof(Word) == 8, "nodes are a tensor of int64");

struct DeviceTree {
  // Computes the layout. `nodes` has `slots` zeroed words, or is null.
  explicit DeviceTree(int64_t capacity, Word* nodes = nullptr);

  Word* nodes;
  int64_t capacity;                  // leaves
  int64_t slots;                     // words in total
  int levels;                        // 1 to kMaxDeviceLevels
  int64_t offset[kMaxDeviceLevels];  // the first word of each level
};

// New priorities of n rows; among duplicates the last wins. Pointers are to device memory.
struct Priorities {
  const int64_t* indices;  // (n,)
  const void* values;      // (n,) float64 if `doubles`, else float32
  bool doubles;
  int64_t n;
  double alpha;
  // Whether values are TD errors. If so, p = |value| + epsilon, rows whose `flags` say that they
  // take no priority (window.h) are skipped, and Counters::max_leaf is kept up to date. If not,
  // p = value.
  bool errors;
  double epsilon;
  bool added;  // see takes_priority()
  const uint8_t* flags;
};

// One kernel each on the caller's stream, unless stated otherwise (reference.h has others). None
// allocates or waits. Errors are latched in the counters.

// Sets priorities. Changes nothing if an index or a value is bad (kIndexOutOfRange, kNotFinite,
// kNegative).
void launch_set(const DeviceTree& tree, Counters* counters, const Priorities& priorities,
                cudaStream_t stream);
// Writes n draws to `out` (n,) and counts one call. An empty tree gives zeros and kNothingToDraw. A
// draw that meets a wrong sum gives 0 and kDamaged, here and in launch_find.
void launch_draw(const DeviceTree& tree, Counters* counters, uint64_t seed, bool stratified,
                 int64_t n, int64_t* out, cudaStream_t stream);
// The leaves that own `targets` (n,), or 0 and kTargetOutOfRange.
void launch_find(const DeviceTree& tree, Counters* counters, const int64_t* targets, int64_t n,
                 int64_t* out, cudaStream_t stream);
// p^alpha of rows, or 0 and kIndexOutOfRange.
void launch_get(const DeviceTree& tree, Counters* counters, const int64_t* indices, int64_t n,
                double* out, cudaStream_t stream);
// Importance weights, relative to the smallest leaf of `indices`. All are 0 if one row is out of
// range (kIndexOutOfRange) or has priority 0 (kNoWeight).
void launch_weights(const DeviceTree& tree, Counters* counters, const int64_t* indices, int64_t n,
                    double beta, float* out, cudaStream_t stream);
// Recomputes all sums from the leaves. One kernel per level.
void launch_rebuild(const DeviceTree& tree, cudaStream_t stream);
// Latches kDamaged if an invariant is violated. One kernel per level.
void launch_check(const DeviceTree& tree, Counters* counters, cudaStream_t stream);
// Writes the named fields of the counters and leaves the others.
enum CounterFields : unsigned { kCallsField = 1, kBetaField = 2, kErrorField = 4, kAllFields = 8 };
void launch_write(Counters* counters, const Counters& value, unsigned fields, cudaStream_t stream);

}  // namespace fastreplay
