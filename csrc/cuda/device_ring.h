// The rings of frame_ring.h on a CUDA device: the same memory, rules and batches.
//
// Frames lie on the device, or in pinned memory of the host that the same kernels read and write
// across the bus; the nine bytes a row beside the frame, the leaves and the counters always lie on
// the device.
//
// One launch of the sample kernel does a whole batch. A block (or a few, which share the copying)
// makes one sample:
//   - its first warp draws the row, walks the n-step window and finds the frames of both stacks;
//   - then all of its other threads write them, half of them obs and half next_obs, 16 bytes at a
//     time where size and alignment allow it, in the type and memory format that is wanted; the
//     first warp writes the rest, and takes the block's ticket;
//   - the block with the last ticket turns leaves into importance weights (they are relative to the
//     smallest of the batch) and counts the call. It needs nothing of the other blocks but their
//     leaves, so tickets do not wait for frames.
// One launch of the add kernel stores a row for each game, one block a game; the last block moves
// the write head.
//
// A sample that cannot be made (no such row, nothing drawable) is all zeros, and its error is kept
// in the counters until the host asks.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/batch.h"
#include "cuda/device_tree.h"

namespace fastreplay {

struct DeviceRing {
  RingLayout layout;
  RingMemory memory;
  const float* powers;  // gamma^0 .. gamma^n_step
  Counters* counters;
};

// A column of numbers on the device.
struct Column {
  enum Type { kInt32, kInt64, kFloat32, kFloat64 };
  const void* data;
  Type type;
  int64_t stride;  // in elements
};

// One row for each game, all on the device.
struct Row {
  const uint8_t* frames;
  int64_t frame_stride;  // bytes from one game's frame to the next
  Column actions, rewards;
  const uint8_t* terminations;
  const uint8_t* episode_starts;
};

// `tree` has no nodes if draws are uniform. Each launches one kernel.
void launch_add(const DeviceRing& ring, const DeviceTree& tree, const Row& row,
                cudaStream_t stream);
void launch_sample(const DeviceRing& ring, const DeviceTree& tree, const SampleJob& job,
                   cudaStream_t stream);
void launch_drawable(const DeviceRing& ring, const int64_t* indices, int64_t n, bool* out,
                     cudaStream_t stream);

}  // namespace fastreplay
