// The rules of one game's ring buffer: which rows may start a transition, how far back a stack
// reaches, and where an n-step window ends. CPU and CUDA share them.
//
//   slots      0    1    2    3    4    5    6    7      (rows = 8, all stored)
//   steps      8    9   10   11   12    5    6    7
//   opens      .    .    .   yes   .    .    .    .
//                                  ^ newest  ^ oldest
//
// A row is one environment step: the frame seen before acting, the action, the reward, whether the
// step terminated the episode, and whether the frame opened an episode. The row before one that
// opens an episode is final: it is the last observation of its episode, and its action and reward
// are ignored (NEXT_STEP autoreset produces this row). Step 10 above is final.
//
// A row with a negative action is context: it is part of stacks and of n-step returns, but starts
// no transition. So pieces of several games can be stored one after the other: each opens like an
// episode, and the rows that complete its first stacks and its last windows are context.
#pragma once

#include <cstdint>

#include "core/philox.h"

namespace fastreplay {

enum RowFlag : uint8_t {
  kTerminated = 1,  // the action of this row terminated the episode
  kOpens = 2,       // the frame of this row opened an episode
  kDrawable = 4,    // drawable() below, kept up to date by the ring
  // With priorities: the row has replaced an older one and has not been drawn since. A priority
  // that arrives now belongs to the older row.
  kUndrawn = 8,
  kContext = 16,  // the action of this row is negative
};

// Whether an update may set the priority of a row with these flags. `added`: the priorities belong
// to the rows that are stored now, also to those that have not been drawn.
FR_HOST_DEVICE inline bool takes_priority(uint8_t flags, bool added) {
  return (flags & (kDrawable | (added ? 0 : kUndrawn))) == kDrawable;
}

// A uniform draw tries this many random rows. If none is drawable, it counts the drawable ones.
constexpr int kAttempts = 128;

struct Ring {
  const uint8_t* flags;  // (rows,) of this game
  int64_t rows;
  int64_t stored;  // rows written, at most `rows`
  int64_t head;    // the slot of the next row; equals `stored` until the ring is full

  FR_HOST_DEVICE int64_t after(int64_t slot) const { return slot + 1 == rows ? 0 : slot + 1; }
  FR_HOST_DEVICE int64_t before(int64_t slot) const { return slot == 0 ? rows - 1 : slot - 1; }
  FR_HOST_DEVICE int64_t oldest() const { return stored == rows ? head : 0; }
  FR_HOST_DEVICE int64_t newest() const { return before(head); }
};

// The n-step window that starts at a row.
struct Window {
  int64_t end;      // the slot whose stack is next_obs
  int steps;        // k, the number of rewards in the sum; 0: no complete window starts here
  bool terminated;  // whether the k-th step terminated: no bootstrap from next_obs
};

FR_HOST_DEVICE inline Window walk_window(const Ring& ring, int64_t slot, int n_step) {
  const int64_t newest = ring.newest();
  int64_t row = slot;
  for (int k = 0; k < n_step; ++k) {
    if (row == newest) return {row, 0, false};  // the next row is not stored yet
    const int64_t next = ring.after(row);
    if (ring.flags[next] & kOpens) return {row, k, false};  // `row` is final: bootstrap from it
    if (ring.flags[row] & kTerminated) return {next, k + 1, true};
    row = next;
  }
  return {row, n_step, false};
}

// How many rows before `slot` belong to its stack, at most stack - 1; -1 if one of them has been
// overwritten.
FR_HOST_DEVICE inline int stack_depth(const Ring& ring, int64_t slot, int stack) {
  const int64_t oldest = ring.oldest();
  int depth = 0;
  while (depth < stack - 1 && !(ring.flags[slot] & kOpens)) {
    if (slot == oldest) return -1;
    slot = ring.before(slot);
    ++depth;
  }
  return depth;
}

// Whether a stored row may start a transition.
FR_HOST_DEVICE inline bool drawable(const Ring& ring, int64_t slot, int stack, int n_step) {
  return !(ring.flags[slot] & kContext) && walk_window(ring, slot, n_step).steps > 0 &&
         stack_depth(ring, slot, stack) >= 0;
}

}  // namespace fastreplay
