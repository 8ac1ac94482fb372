// The state of a replay that is kept on the device, so that it advances with every launch of a CUDA
// graph.
//
// Kernels read it at their start, and the last block of a grid to arrive updates it. The host reads
// it rarely, because reading waits for the stream.
#pragma once

#include <cstdint>

namespace fastreplay {

// Errors that only the device can detect. If several bits are set, the lowest one is raised.
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
  int64_t culprit;    // of the latest error: an index, an action or a target
  double beta;        // exponent of the importance weights
  uint32_t max_leaf;  // the largest leaf seen
  uint32_t ticket;    // blocks of the running grid that have arrived
  uint32_t error;     // latched DeviceError bits, until the host raises one
  uint32_t unused;
};
static_assert(sizeof(Counters) == 64, "eight int64 in Python");

}  // namespace fastreplay
