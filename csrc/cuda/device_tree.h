// The exact sum-tree on a CUDA device: the draws of sum_tree.h from another layout.
//
//   level 2 (root)    [ e0 | e1 | ... | e31 ]                    one node of 32 words
//                        |    |
//   level 1           [32 sums][32 sums] ...
//                        |
//   level 0           [32 leaves][32 leaves] ...                 the capacity, in whole nodes
//
// All levels lie in one array of 64-bit words, the leaves first. A node is 256 bytes, so one warp
// reads it at once: each lane an entry, a prefix sum by shuffles, a ballot. Entries of inner nodes
// are the plain sums of their children, which lets one atomicAdd a level update them.
//
//   leaf word    | order stamp (32 bits) | leaf (32 bits) |
//
// Among duplicates in one update the last wins: pair i of the batch raises the word by
// atomicMax(i + 1 << 32 | leaf), and who raised it adds the difference to the ancestors. Whatever
// the order in which threads come, these differences add up to last - first. The last block to
// finish clears the stamps.
//
// Invariants, between kernels
//   - every entry of an inner node is the exact sum of its 32 children;
//   - stamps are 0, and so are entries without children or rows.
//
// Cost at 2^20 leaves: 4 levels, 8.26 bytes a leaf. A draw reads one node a level; an update is one
// atomic a level.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/counters.h"

namespace fastreplay {

constexpr int kDeviceFanOut = 32;
constexpr int kMaxDeviceLevels = 6;  // 2^27 leaves

// CUDA's 64-bit atomics take this type.
using Word = unsigned long long;
static_assert(sizeof(Word) == 8, "a tensor of int64 holds them");

struct DeviceTree {
  // Where the levels lie. `nodes` has `slots` zeroed words.
  explicit DeviceTree(int64_t capacity, Word* nodes = nullptr);

  Word* nodes;
  int64_t capacity;
  int64_t slots;
  int levels;
  int64_t offset[kMaxDeviceLevels];
};

// A batch of new priorities, float32 or float64. `errors`, where they are TD errors:
// p = |error| + epsilon, rows without kDrawable in `flags` are skipped, and max_leaf is kept.
struct Priorities {
  const int64_t* indices;
  const void* values;
  bool doubles;
  int64_t n;
  double alpha;
  bool errors;
  double epsilon;
  const uint8_t* flags;
};

// Each of these launches one kernel, unless it says more.
void launch_set(const DeviceTree& tree, Counters* counters, const Priorities& priorities,
                cudaStream_t stream);
void launch_draw(const DeviceTree& tree, Counters* counters, uint64_t seed, bool stratified,
                 int64_t n, int64_t* out, cudaStream_t stream);
void launch_find(const DeviceTree& tree, Counters* counters, const int64_t* targets, int64_t n,
                 int64_t* out, cudaStream_t stream);
void launch_get(const DeviceTree& tree, Counters* counters, const int64_t* indices, int64_t n,
                double* out, cudaStream_t stream);
void launch_weights(const DeviceTree& tree, Counters* counters, const int64_t* indices, int64_t n,
                    double beta, float* out, cudaStream_t stream);
void launch_total(const DeviceTree& tree, Word* out, cudaStream_t stream);
// One kernel a level.
void launch_rebuild(const DeviceTree& tree, cudaStream_t stream);
void launch_check(const DeviceTree& tree, Counters* counters, cudaStream_t stream);
// Writes these fields, and leaves the others.
enum CounterFields : unsigned { kCallsField = 1, kBetaField = 2, kErrorField = 4, kAllFields = 8 };
void launch_write(Counters* counters, const Counters& value, unsigned fields, cudaStream_t stream);

}  // namespace fastreplay
