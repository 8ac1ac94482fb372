// The rings of cpu/frame_ring.h on a CUDA device: the same memory, rules and batches.
//
//   frames                                        on the device, or in pinned host memory, which
//                                                 the same kernels access over the bus, or on the
//                                                 device in tiles (device_tiles.h)
//   actions, rewards, flags (9 bytes a row),
//   leaves, counters                              always on the device
//
//   launch_add        add.cu       stores one row for each game
//   launch_sample     sample.cu    draws a batch, builds it, or both
//   launch_drawable   sample.cu    finds which rows may start a transition
//
// Each is one kernel on the caller's stream (a few with the kernels of reference.h). None allocates
// or waits, so all can be captured in a CUDA graph. Errors that only the device can detect are
// latched in the counters until the host reads them; a sample that cannot be built is all zeros.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/batch.h"
#include "cuda/device_tiles.h"
#include "cuda/device_tree.h"

namespace fastreplay {

// Pointers are to memory that the device can access, owned by the caller.
struct DeviceRing {
  RingLayout layout;
  RingMemory memory;
  const float* powers;  // gamma^0 .. gamma^n_step
  Counters* counters;
  DeviceTiles tiles;  // if memory.frames is null
};

// A column of numbers on the device, one for each game.
struct Column {
  enum Type { kInt32, kInt64, kFloat32, kFloat64 };
  const void* data;
  Type type;
  int64_t stride;  // in elements
};

// One row for each game, on the device. The flags are bytes, 0 or 1.
struct Row {
  const uint8_t* frames;  // not read if frames are in tiles, which patches have stored before
  int64_t frame_stride;   // bytes from one game's frame to the next
  Column actions;         // one that does not fit int32 latches kActionTooLarge
  Column rewards;
  const uint8_t* terminations;
  const uint8_t* episode_starts;
};

// `tree.nodes` is null if draws are uniform.
void launch_add(const DeviceRing& ring, const DeviceTree& tree, const Row& row,
                cudaStream_t stream);
void launch_sample(const DeviceRing& ring, const DeviceTree& tree, const SampleJob& job,
                   cudaStream_t stream);
// `out` (n,): whether each row is drawable. Latches kIndexOutOfRange.
void launch_drawable(const DeviceRing& ring, const int64_t* indices, int64_t n, bool* out,
                     cudaStream_t stream);

}  // namespace fastreplay
