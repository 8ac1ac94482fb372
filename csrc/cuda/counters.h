// The few numbers of a replay that live on the device, so that a replayed CUDA graph counts on.
//
// Kernels read them when they start; the last block of a grid to take a ticket writes what follows
// from its work. The host reads them rarely, because that waits for the stream.
#pragma once

#include <cstdint>

namespace fastreplay {

// What only the device can see going wrong. The first bit that is set is the one that is told.
enum DeviceError : uint32_t {
  kNothingToDraw = 1,
  kIndexOutOfRange = 2,
  kNotDrawable = 4,
  kNotFinite = 8,
  kNegative = 16,
  kTargetOutOfRange = 32,
  kNoWeight = 64,
  kActionTooLarge = 128,
  kDamaged = 256,
};

struct Counters {
  int64_t stored, head;  // of every ring
  int64_t n_drawable;
  uint64_t calls;     // draws so far
  int64_t culprit;    // of the latest error: an index, an action, a target
  double beta;        // of the importance weights
  uint32_t max_leaf;  // the largest seen
  uint32_t ticket;    // blocks of this grid that have taken one
  uint32_t error;     // DeviceError bits, until the host has told them
  uint32_t unused;
};
static_assert(sizeof(Counters) == 64, "eight int64 in Python");

}  // namespace fastreplay
