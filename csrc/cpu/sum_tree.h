// An exact sum-tree over up to 2^27 integer leaves.
//
//   level 1 (root)      [ 0 |  e1 |  e2 | ... | e15 ]                  one node
//                         |     |     |          |
//   level 0           [16 sums][16 sums] ...                           ceil(leaf nodes / 16) nodes
//                         |
//   leaves         [ 16 leaves ][ 16 leaves ] ...                      ceil(capacity / 16) leaf
//   nodes
//
// A leaf node is 16 uint32 leaves: one cache line. An inner node is 16 uint64 numbers, two cache
// lines: entry j is the sum of the children before j (so entry 0 is always 0), which lets one
// vector comparison choose the child, and one masked addition update it.
//
// Invariants
//   - sums are exact: integers below 2^59, no rounding, no drift, in whatever order they were set;
//   - find(t) for t < total is the one leaf i with sum(leaves before i) <= t < sum(leaves up to i):
//     it never is a leaf of 0, and it does not depend on fan-out or layout;
//   - entries for children that do not exist equal the node's sum, so no descent enters them.
//
// Cost at 2^20 leaves: 4 inner levels, 4.6 bytes a leaf. set and find touch one line of leaves and
// two of each inner level; batches go level by level, so that the cache misses of many overlap.
// The memory belongs to the caller. Not thread-safe: the Python face holds the GIL.
#pragma once

#include <cstdint>
#include <vector>

namespace fastreplay {

constexpr int kFanOut = 16;
constexpr int kFanOutBits = 4;
constexpr int64_t kMaxCapacity = int64_t{1} << 27;
constexpr int kMaxLevels = 7;

// Where the levels lie, shared by whoever walks the tree.
struct TreeLayout {
  explicit TreeLayout(int64_t capacity);
  int64_t leaf_slots;                // uint32 entries, the capacity rounded up to whole nodes
  int levels;                        // inner levels; level levels - 1 is the root
  int64_t level_offset[kMaxLevels];  // of each level's first entry in the inner array
  int64_t level_nodes[kMaxLevels];   //
  int64_t inner_slots;               // uint64 entries
};

class SumTree {
 public:
  // `leaves` (leaf_slots uint32) and `inner` (inner_slots uint64) are zeroed and 64-byte aligned.
  SumTree(int64_t capacity, uint32_t* leaves, uint64_t* inner);

  int64_t capacity() const { return capacity_; }
  uint64_t total() const { return total_; }
  const uint32_t* leaves() const { return leaves_; }

  // Writes n leaves; among duplicates the last wins. Indices are in range.
  void set(const int64_t* indices, const uint32_t* values, int64_t n);
  // The leaf under each target; targets are below total().
  void find(const uint64_t* targets, int64_t n, int64_t* out) const;
  // n draws with probability leaf / total: bits (seed, call, i) times total. total() > 0.
  void draw(uint64_t seed, uint64_t call, bool stratified, int64_t n, int64_t* out) const;
  // Importance weights relative to the smallest of these leaves, none of which is 0.
  void weights(const int64_t* indices, int64_t n, double beta, float* out) const;
  // Recomputes every inner node from the leaves.
  void rebuild();
  // Whether every inner node is the exact sum of its leaves, and unused leaves are 0.
  bool is_valid() const;

 private:
  int64_t capacity_;
  TreeLayout layout_;
  uint32_t* leaves_;
  uint64_t* inner_;
  uint64_t total_ = 0;
};

// Quantises finite, non-negative priorities (see priority.h), with vector instructions.
void quantise_many(const double* priorities, int64_t n, double alpha, uint32_t* out);

}  // namespace fastreplay
