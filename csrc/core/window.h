// The rules of one game's ring: which rows may be drawn, how far a stack reaches back, where an
// n-step window ends. Shared by everything that samples.
//
//   slots      0    1    2    3    4    5    6    7      (rows = 8, all stored)
//   steps      8    9   10   11   12    5    6    7
//   opens      .    .    .   yes   .    .    .    .
//                                  ^ newest  ^ oldest
//
// One row is one environment step: the frame seen before acting, the action, the reward that
// followed, whether the step terminated, and whether the frame opened an episode. The row before an
// opening row is "final": it holds the last observation of its episode and no action that counts
// (NEXT_STEP autoreset writes exactly that row). Step 10 above is final.
#pragma once

#include <cstdint>

#include "core/philox.h"

namespace fastreplay {

enum RowFlag : uint8_t {
  kTerminated = 1,  // the step that left this row terminated
  kOpens = 2,       // the frame of this row opened an episode
  kDrawable = 4,    // drawable() below, kept up to date by the ring
  // With priorities: the row has replaced an older one and was not drawn since. A priority that
  // arrives now is that of the older row.
  kUndrawn = 8,
};

// Whether an update may set the priority of a row with these flags.
FR_HOST_DEVICE inline bool takes_priority(uint8_t flags) {
  return (flags & (kDrawable | kUndrawn)) == kDrawable;
}

constexpr int kAttempts = 128;  // of a uniform draw, before it counts drawable rows instead

struct Ring {
  const uint8_t* flags;  // of this game's rows
  int64_t rows;
  int64_t stored;
  int64_t head;  // the slot the next row goes to; while not full, head == stored

  FR_HOST_DEVICE int64_t after(int64_t slot) const { return slot + 1 == rows ? 0 : slot + 1; }
  FR_HOST_DEVICE int64_t before(int64_t slot) const { return slot == 0 ? rows - 1 : slot - 1; }
  FR_HOST_DEVICE int64_t oldest() const { return stored == rows ? head : 0; }
  FR_HOST_DEVICE int64_t newest() const { return before(head); }
};

// The n-step window that starts at a row.
struct Window {
  int64_t end;      // the row whose stack is next_obs
  int steps;        // k, the rewards in the sum; 0: the row starts no complete window
  bool terminated;  // the k-th step terminated: nothing to bootstrap from
};

FR_HOST_DEVICE inline Window walk_window(const Ring& ring, int64_t slot, int n_step) {
  const int64_t newest = ring.newest();
  int64_t row = slot;
  for (int k = 0; k < n_step; ++k) {
    if (row == newest) return {row, 0, false};  // what follows is not known yet
    const int64_t next = ring.after(row);
    if (ring.flags[next] & kOpens) return {row, k, false};  // `row` is final: bootstrap from it
    if (ring.flags[row] & kTerminated) return {next, k + 1, true};
    row = next;
  }
  return {row, n_step, false};
}

// How many rows before `slot` belong to its stack (at most stack - 1), or -1 if the write head has
// overwritten one of them.
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
  return walk_window(ring, slot, n_step).steps > 0 && stack_depth(ring, slot, stack) >= 0;
}

}  // namespace fastreplay
