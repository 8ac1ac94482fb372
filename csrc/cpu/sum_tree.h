// An exact sum-tree over up to 2^27 integer leaves.
//
//   level 1 (root)      [ 0 |  e1 |  e2 | ... | e15 ]                  1 node
//                         |     |     |          |
//   level 0           [16 sums][16 sums] ...                           ceil(leaf nodes / 16) nodes
//                         |
//   leaf nodes     [ 16 leaves ][ 16 leaves ] ...                      ceil(capacity / 16) nodes
//
// A leaf node is 16 uint32 leaves, one cache line. An inner node is 16 uint64 prefix sums, two
// cache lines: entry j is the sum of the children before j, so entry 0 is 0. One vector comparison
// chooses the child, and one masked addition updates the node.
//
// Invariants
//   - sums are exact: integers below 2^59, so they do not depend on the order of updates;
//   - find(t) for t < total is the leaf i with sum(leaves before i) <= t < sum(leaves up to and
//     including i): never a leaf of 0, and independent of fan-out and layout;
//   - entries for children that do not exist equal the node's sum, so no descent enters them.
//
// Cost at 2^20 leaves: 4 inner levels, 4.6 bytes a leaf. set and find touch one cache line of
// leaves and two of each inner level; batches advance level by level, so that cache misses overlap.
// set, find, draw and weights do not allocate. The memory belongs to the caller. Not thread-safe.
#pragma once

#include <cstdint>
#include <vector>

namespace fastreplay {

constexpr int kFanOut = 16;
constexpr int kFanOutBits = 4;
constexpr int64_t kMaxCapacity = int64_t{1} << 27;
constexpr int kMaxLevels = 7;

// The position of each level in the inner array.
struct TreeLayout {
  explicit TreeLayout(int64_t capacity);
  int64_t leaf_slots;                // uint32 entries, the capacity rounded up to whole nodes
  int levels;                        // inner levels; level levels - 1 is the root
  int64_t level_offset[kMaxLevels];  // index of each level's first entry
  int64_t level_nodes[kMaxLevels];   // nodes of each level
  int64_t inner_slots;               // uint64 entries
};

class SumTree {
 public:
  // `leaves` (leaf_slots uint32) and `inner` (inner_slots uint64) are zeroed and 64-byte aligned.
  SumTree(int64_t capacity, uint32_t* leaves, uint64_t* inner);

  int64_t capacity() const { return capacity_; }
  uint64_t total() const { return total_; }
  const uint32_t* leaves() const { return leaves_; }

  // Writes n leaves; among duplicates the last one wins. Indices are in range.
  void set(const int64_t* indices, const uint32_t* values, int64_t n);
  // The leaf that owns each target. Targets are below total().
  void find(const uint64_t* targets, int64_t n, int64_t* out) const;
  // n draws with probability leaf / total, from the random bits of (seed, call, i). total() > 0.
  void draw(uint64_t seed, uint64_t call, bool stratified, int64_t n, int64_t* out) const;
  // Importance weights, relative to the smallest of these leaves. None of them is 0.
  void weights(const int64_t* indices, int64_t n, double beta, float* out) const;
  // Recomputes every inner node from the leaves. Allocates.
  void rebuild();
  // Whether every inner node is the exact sum of its leaves, and leaves beyond the capacity are 0.
  bool is_valid() const;

 private:
  int64_t capacity_;
  TreeLayout layout_;
  uint32_t* leaves_;
  uint64_t* inner_;
  uint64_t total_ = 0;
};

// quantise() of priority.h for n priorities, with vector instructions.
void quantise_many(const double* priorities, int64_t n, double alpha, uint32_t* out);

}  // namespace fastreplay
