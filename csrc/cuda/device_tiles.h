// Frames in tiles (core/tiles.h) in the memory of a CUDA device, as the kernels read them.
//
//   segments   | pointer | pointer | ...                         to 2^16 tiles each
//                 | 28 bytes of pixels, 4 unused | ...           by id
//   chunks     | data, first, raw | data, first, raw | ...       (num_envs, n_chunks)
//                 | changed[32] | keyframe | changes | ...       or frames, if it is raw
//   added      rows added to each game
//
// Row t of a game is frame (t + shift) % 32 of its chunk (t + shift) / 32, where shift is 32 * game
// / num_envs; chunk k is element k % n_chunks of the game's `chunks`.
//
// The host codes the frames (tile_mirror.h); the device only stores what it is sent: patches of
// bytes, applied by a kernel on the caller's stream. So a sample on any stream reads what was there
// before an add or after it, and a freed tile is overwritten only after all samples that read it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/tiles.h"

namespace fastreplay {

constexpr int kTileSlot = 32;  // bytes from one tile to the next

struct DeviceChunk {
  const uint8_t* data;
  int32_t first;  // the first frame of 32 that is stored: 0 but for the first chunk of a game
  int32_t raw;    // whether `data` holds frames, from `first` on
};

// Pointers are to memory of the device. All zeros: the frames are plain.
struct DeviceTiles {
  const uint8_t* const* segments;
  const DeviceChunk* chunks;
  const int64_t* added;
  int64_t n_chunks;
  ChunkLayout layout;
  int height, width;       // of a frame, in rows and in bytes
  int tile_rows, columns;  // of a tile
  int down, across;        // tiles of a frame
};

// Bytes to write on the device. They lie `from` bytes after the first patch.
struct DevicePatch {
  uint8_t* to;
  uint32_t from, bytes;
};
static_assert(sizeof(DevicePatch) == 16, "patches lie one after the other, aligned");

// Applies n patches that lie one after the other on the device. Those that overlap must have the
// same bytes there. One kernel, a warp for each patch.
void launch_patches(const DevicePatch* patches, int64_t n, cudaStream_t stream);

}  // namespace fastreplay
