// A ring buffer of environment steps for each game, and the batches built from it. Each frame is
// stored once (memory layout: core/batch.h; rules: core/window.h).
//
// The rows of a game are contiguous, so a stack is one contiguous block, or two if it wraps around.
// All games share one write head, because every add() writes one row of each. Without memory for
// the frames, a TileStore keeps them; nothing else differs.
//
// Invariants
//   - flag kDrawable of a stored row is drawable() of window.h, and n_drawable counts these rows;
//   - with priorities: a row's leaf is 0 exactly when it is not drawable, and a row that becomes
//     drawable gets the largest leaf seen so far.
// add() maintains both: only the n_step rows before the new one can become drawable, and only the
// stack - 1 rows after an overwritten one can stop being drawable.
//
// Cost: 9 bytes a row besides the frame, and 4.6 for a leaf. add: for each game one copy of a frame
// and O((n_step + stack)^2) flags read, because each row that may change is checked from scratch.
// gather: stack + 1 frames copied per sample (2 stack if they are not shared), split among threads.
// add, draw and gather do not allocate, except that the first threaded gather starts the threads
// (unless they are torch's); update allocates only if its batch is larger than any earlier one.
//
// Not thread-safe: the binding takes a lock. After fork() the child starts its own threads.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "core/batch.h"
#include "core/window.h"
#include "cpu/sum_tree.h"
#include "cpu/tile_store.h"

namespace fastreplay {

class FrameRing {
 public:
  // `powers` (gamma^0 .. gamma^n_step) and `tree` (num_envs * rows leaves, null for uniform draws)
  // outlive the ring. `threads` = 0: torch's threads (thread_pool.h).
  FrameRing(const RingLayout& layout, const RingMemory& memory, const float* powers, SumTree* tree,
            int threads);
  ~FrameRing();

  const RingLayout& layout() const { return layout_; }
  int64_t stored() const { return stored_; }
  int64_t head() const { return head_; }
  int64_t n_drawable() const { return n_drawable_; }
  uint32_t max_leaf() const { return max_leaf_; }

  // Null if the frames are plain.
  const TileStore* tiles() const { return tiles_.get(); }
  // Replaces it by another one for the same layout; restore() follows.
  void set_tiles(std::unique_ptr<TileStore> tiles) { tiles_ = std::move(tiles); }

  // Stores one row of each game. `frame_stride`: bytes from one game's frame to the next. Throws
  // std::bad_alloc and changes nothing if tiles need memory and there is none.
  void add(const uint8_t* frames, int64_t frame_stride, const int32_t* actions,
           const float* rewards, const uint8_t* terminations, const uint8_t* episode_starts);

  bool is_drawable(int64_t index) const { return memory_.flags[index] & kDrawable; }

  // Draws n rows uniformly from the drawable ones. There must be at least one.
  void draw(uint64_t seed, uint64_t call, int64_t n, int64_t* out) const;

  // Builds the batch of n drawable rows.
  void gather(const int64_t* indices, int64_t n, const FrameOutput& format,
              const BatchMemory& batch);

  // Records that these rows were drawn or gathered: they take priorities from now on.
  void mark_drawn(const int64_t* indices, int64_t n);

  // Sets the leaves of those rows that take priorities (window.h). max_leaf() includes the leaves
  // of the skipped rows, too.
  void update(const int64_t* indices, const uint32_t* leaves, int64_t n, bool added);

  // Called after the caller has filled the memory: frames, actions, rewards, flags (including
  // kDrawable) and leaves. Rebuilds the tree.
  void restore(int64_t stored, int64_t head, uint32_t max_leaf, int64_t n_drawable);

 private:
  struct Threads;

  Ring ring(int64_t game) const {
    return {memory_.flags + game * layout_.rows, layout_.rows, stored_, head_};
  }
  // Recomputes kDrawable of a row. If it has changed, adds the row and its new leaf to changed_.
  void refresh(int64_t game, int64_t slot);
  // Writes one sample. Prefetches rows `next` and `after_next`, the ones this thread will probably
  // gather next.
  void gather_one(int64_t index, int64_t next, int64_t after_next, const FrameOutput& format,
                  const BatchMemory& batch, int64_t sample) const;
  // Writes `frames` frames: first frames of zeros, then those of the rows slot - depth to slot.
  // Prefetches the memory at `next`.
  void write_stack(int64_t game, int64_t slot, int depth, int frames, const uint8_t* next,
                   const FrameOutput& format, uint8_t* out) const;
  // The same from depth + 1 frames that lie at `from`.
  void write_frames(const uint8_t* from, int depth, int frames, const FrameOutput& format,
                    uint8_t* out) const;
  // n frames from this slot on, in memory of the calling thread. The slot may be negative.
  const uint8_t* read_tiles(int64_t game, int64_t slot, int n) const;
  void write_stack_of_tiles(int64_t game, int64_t slot, int depth, int frames,
                            const FrameOutput& format, uint8_t* out) const;

  RingLayout layout_;
  RingMemory memory_;
  std::unique_ptr<TileStore> tiles_;
  const float* powers_;
  SumTree* tree_;
  int threads_;
  int64_t stored_ = 0, head_ = 0, n_drawable_ = 0;
  uint32_t max_leaf_;
  std::vector<uint8_t> blank_;  // a frame of zeros
  // The leaves that one add() or update() changes, collected for one call of the tree.
  std::vector<int64_t> changed_;
  std::vector<uint32_t> changed_leaves_;
  std::unique_ptr<Threads> own_threads_;
};

// Recomputes kDrawable in the flags (num_envs, rows) of rings with `stored` rows. Returns the
// number of drawable rows.
int64_t mark_drawable(uint8_t* flags, int64_t num_envs, int64_t rows, int64_t stored, int64_t head,
                      int stack, int n_step);

}  // namespace fastreplay
