// Every frame once: the rings of all games, and the batches built from them.
//
//   game 0    | row 0 | row 1 | ... | row rows-1 |      row: frame   frame_bytes
//   game 1    | row 0 | row 1 | ... | row rows-1 |           action  int32
//   ...                                                      reward  float32
//             flat index = game * rows + slot                flags   uint8 (window.h)
//
// The rows of one game lie one after the other, so a stack is one run of memory (two where it wraps
// around). All games share one write head, because every add() writes one row for each.
//
// Invariants
//   - flag kDrawable of a stored row is drawable() of window.h, and n_drawable counts them;
//   - with priorities: a row's leaf is 0 exactly when it is not drawable, and a row that becomes
//     drawable enters with the largest leaf seen.
// Both are kept at add(): only the n_step rows before a new one can become drawable, only the
// stack - 1 rows after an overwritten one can stop to be.
//
// Cost: 9 bytes a row besides the frame (and 4.6 for a leaf). add: one copy a game and
// O(n_step + stack) flags. gather: stack + 1 frames a sample (2 stack if n_step > 1), shared by the
// threads. Nothing here allocates after construction, but the first threaded gather starts the
// threads, unless they are torch's. One call at a time (the binding holds a lock); after fork() the
// child starts threads of its own.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/convert.h"
#include "cpu/sum_tree.h"
#include "core/window.h"

namespace fastreplay {

struct RingLayout {
  int64_t rows;         // of each game
  int64_t num_envs;     //
  int64_t frame_bytes;  //
  int stack;            // 1 to 8
  int n_step;           //
};

// Owned by the caller, zeroed.
struct RingMemory {
  uint8_t* frames;  // (num_envs, rows, frame_bytes)
  int32_t* actions;
  float* rewards;
  uint8_t* flags;
};

// Where and how the frames of a batch are written.
struct FrameOutput {
  Output output = Output::kCopy;
  float scale = 1.0f;
  bool channels_last = false;
};

// Where a batch goes. With n_step 1, next_obs may begin one frame after obs with the same stride:
// the two then are views of one block of stack + 1 frames, and each frame is written once.
struct BatchMemory {
  uint8_t* obs;
  uint8_t* next_obs;
  int64_t obs_stride, next_obs_stride;  // bytes from one sample to the next
  int64_t* actions;
  float* rewards;
  float* discounts;
};

class FrameRing {
 public:
  // `threads` 0: torch's own (thread_pool.h). `powers` holds gamma^0 .. gamma^n_step. `tree`
  // (num_envs * rows leaves, or null) outlives this.
  FrameRing(const RingLayout& layout, const RingMemory& memory, std::vector<float> powers,
            SumTree* tree, int threads);
  ~FrameRing();

  const RingLayout& layout() const { return layout_; }
  int64_t stored() const { return stored_; }
  int64_t head() const { return head_; }
  int64_t n_drawable() const { return n_drawable_; }
  uint32_t max_leaf() const { return max_leaf_; }

  // One row for each game. `frame_stride` is the distance between two games' frames in bytes.
  void add(const uint8_t* frames, int64_t frame_stride, const int32_t* actions,
           const float* rewards, const uint8_t* terminations, const uint8_t* episode_starts);

  bool is_drawable(int64_t index) const { return memory_.flags[index] & kDrawable; }

  // n uniform draws over the drawable rows, of which there is at least one.
  void draw(uint64_t seed, uint64_t call, int64_t n, int64_t* out) const;

  // Builds the batch of n drawable rows.
  void gather(const int64_t* indices, int64_t n, const FrameOutput& format,
              const BatchMemory& batch);

  // New leaves for rows that still are drawable; the largest value seen counts all of them.
  void update(const int64_t* indices, const uint32_t* leaves, int64_t n);

  // Takes over memory that was filled from outside (frames, actions, rewards, flags, leaves) and
  // recomputes what is derived from it.
  void restore(int64_t stored, int64_t head, uint32_t max_leaf);

 private:
  struct Crew;

  Ring ring(int64_t game) const {
    return {memory_.flags + game * layout_.rows, layout_.rows, stored_, head_};
  }
  void refresh(int64_t game, int64_t slot);
  bool is_shared(const BatchMemory& batch, const FrameOutput& format) const;
  // Writes one sample, and asks for the memory of the index that this thread will likely take next.
  void gather_one(int64_t index, int64_t next, const FrameOutput& format, const BatchMemory& batch,
                  int64_t sample) const;
  // `follows`: what will likely be read after this.
  void write_stack(int64_t game, int64_t slot, int depth, int frames, const uint8_t* follows,
                   const FrameOutput& format, uint8_t* out) const;

  RingLayout layout_;
  RingMemory memory_;
  std::vector<float> powers_;
  SumTree* tree_;
  int threads_;
  int64_t stored_ = 0, head_ = 0, n_drawable_ = 0;
  uint32_t max_leaf_;
  std::vector<uint8_t> blank_;  // a frame of zeros
  // Leaves that one add() or update() changes, gathered for one call of the tree.
  std::vector<int64_t> changed_;
  std::vector<uint32_t> changed_leaves_;
  std::unique_ptr<Crew> crew_;
};

// Sets kDrawable in flags (num_envs, rows) of rings of which `stored` rows are written. Returns how
// many rows are drawable.
int64_t mark_drawable(uint8_t* flags, int64_t num_envs, int64_t rows, int64_t stored, int64_t head,
                      int stack, int n_step);

// Asks the kernel for huge pages where it grants them. Returns whether it was asked.
bool use_huge_pages(void* memory, int64_t bytes);

}  // namespace fastreplay
