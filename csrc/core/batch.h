// The memory of a replay and of a batch, as passed to the CPU ring and to the CUDA ring.
//
//   game 0    | row 0 | row 1 | ... | row rows-1 |      row: frame   frame_bytes
//   game 1    | row 0 | row 1 | ... | row rows-1 |           action  int32
//   ...                                                      reward  float32
//             flat index = game * rows + slot                flags   uint8 (window.h)
#pragma once

#include <cstdint>

#include "core/pixel.h"

namespace fastreplay {

struct RingLayout {
  int64_t rows;         // of each game
  int64_t num_envs;     // games
  int64_t frame_bytes;  // of one frame
  int64_t frame_width;  // bytes of one row of its pixels
  int stack;            // 1 to 8
  int n_step;           // 1 to 1000
};

// Owned by the caller. Zeroed, except for the frames, which may be uninitialised.
struct RingMemory {
  uint8_t* frames;  // (num_envs, rows, frame_bytes); null: the ring keeps them in tiles
  int32_t* actions;
  float* rewards;
  uint8_t* flags;
};

// How the frames of a batch are written.
//
//   contiguous      out[s][pixel] = f(frame s [pixel])      the frames of a stack one by one
//   channels last   out[pixel][s] = f(frame s [pixel])      a pixel's frames side by side
struct FrameOutput {
  Output output = Output::kCopy;
  float scale = 1.0f;
  bool channels_last = false;
};

// Where a batch is written.
struct BatchMemory {
  uint8_t* obs;
  uint8_t* next_obs;
  int64_t obs_stride, next_obs_stride;  // bytes from one sample to the next
  int64_t* actions;
  float* rewards;
  float* discounts;
};

// A batch of n samples. Pointers are to memory of the replay's device. `format`, `batch` and
// `is_weights` are used only if `gather`.
struct SampleJob {
  int64_t n;
  int64_t* indices;  // (n,) flat rows: written if `draw`, read if not
  bool draw;
  uint64_t seed;  // of the draw
  bool stratified;
  bool gather;  // whether to build the batch
  FrameOutput format;
  BatchMemory batch;
  float* is_weights;  // (n,)
};

// Whether obs and next_obs are views of one block of stack + 1 frames, so that each frame is
// written once: n_step is 1, and next_obs begins one frame after obs with the same stride.
inline bool shares_block(const RingLayout& layout, const FrameOutput& format,
                         const BatchMemory& batch) {
  return layout.n_step == 1 && !format.channels_last && batch.obs_stride == batch.next_obs_stride &&
         batch.next_obs == batch.obs + layout.frame_bytes * expansion(format.output);
}

}  // namespace fastreplay
