// Copies the frames of a stack from tiles (device_tiles.h) into a batch. The counterpart of
// copy.cuh for plain frames, with the same results.
//
//   frame   +----------+     window    rows of tiles, or 256 tiles of a wide row: what a block
//           | window 0 |               decodes at a time; the blocks of a sample take turns
//           +----------+
//           | window 1 |     table     the id of each tile of the window in each frame of the
//           +----------+               stack, in shared memory
//
// 1. All threads read the changes of the chunk up to the last frame of the stack, in any order, and
//    keep the number of the latest change of each tile in each frame: atomicMax.
// 2. A tile without a change in a frame has the one of the frame before, or of the keyframe.
// 3. All threads copy pixels: neighbouring threads write neighbouring memory.
//
// Cost: the chunk is read up to the stack, once for each window; then one byte of a tile for each
// pixel of each frame. Neighbours read bytes of the same tile.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "cuda/copy.cuh"
#include "cuda/device_ring.h"

namespace fastreplay {

constexpr int kWindowTiles = 256;
constexpr int kMaxFrames = 9;  // of a stack, and one more if obs and next_obs share frames

// Where a row of a game lies in its chunks: 32 * chunk + frame. The row must be stored.
__device__ inline int64_t place_of(const DeviceRing& ring, int64_t game, int64_t slot) {
  const int64_t head = ring.counters->head;
  const int64_t row = *ring.tiles.added - head + slot - (slot < head ? 0 : ring.layout.rows);
  return row + game * kChunkFrames / ring.layout.num_envs;
}

__device__ inline const DeviceChunk& chunk_at(const DeviceTiles& tiles, int64_t game,
                                              int64_t place) {
  return tiles.chunks[game * tiles.n_chunks + place / kChunkFrames % tiles.n_chunks];
}

__device__ inline const uint8_t* change_at(const DeviceTiles& tiles, const DeviceChunk& chunk,
                                           int64_t i) {
  return chunk.data + tiles.layout.changes + i * tiles.layout.change_bytes;
}

__device__ inline const uint8_t* tile_pixels(const DeviceTiles& tiles, uint32_t id) {
  return tiles.segments[id >> 16] + (id & 0xFFFF) * kTileSlot;
}

// Rows of tiles in a window if a sample has `blocks` blocks; windows of a frame.
inline int window_rows(const DeviceTiles& tiles, int blocks) {
  const int most = kWindowTiles / tiles.across, wanted = (tiles.down + blocks - 1) / blocks;
  return most < 1 ? 1 : most < wanted ? most : wanted;
}
FR_HOST_DEVICE inline int windows_across(const DeviceTiles& tiles) {
  return (tiles.across + kWindowTiles - 1) / kWindowTiles;
}
FR_HOST_DEVICE inline int count_windows(const DeviceTiles& tiles, int window_rows) {
  return (tiles.down + window_rows - 1) / window_rows * windows_across(tiles);
}

struct TileWindow {
  int y, x, down, across;        // tiles
  int top, left, bottom, right;  // pixels

  __device__ int index(int64_t position, int tiles_across) const {
    const int row = static_cast<int>(position) / tiles_across - y;
    const int column = static_cast<int>(position) % tiles_across - x;
    const bool is_inside = row >= 0 && row < down && column >= 0 && column < across;
    return is_inside ? row * across + column : -1;
  }
};

__device__ inline int smaller(int a, int b) { return a < b ? a : b; }

__device__ inline TileWindow window_at(const DeviceTiles& tiles, int number, int window_rows) {
  TileWindow window{};
  window.y = number / windows_across(tiles) * window_rows;
  window.x = number % windows_across(tiles) * kWindowTiles;
  window.down = smaller(window_rows, tiles.down - window.y);
  window.across = smaller(kWindowTiles, tiles.across - window.x);
  window.top = window.y * tiles.tile_rows;
  window.left = window.x * tiles.columns;
  window.bottom = smaller((window.y + window.down) * tiles.tile_rows, tiles.height);
  window.right = smaller((window.x + window.across) * tiles.columns, tiles.width);
  return window;
}

// The frames of a stack, in one window.
struct TileTable {
  uint32_t ids[kMaxFrames][kWindowTiles];
  const uint8_t* raw[kMaxFrames];  // the frame itself; null: it is in tiles
  int ends[kMaxFrames];            // changes of its chunk up to this frame
};

// Fills the table with n frames from a place on. Called by all threads of a block.
__device__ inline void load_table(const DeviceRing& ring, int64_t game, int64_t place, int n,
                                  const TileWindow& window, TileTable& table) {
  const DeviceTiles& tiles = ring.tiles;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  if (thread < n) {
    const DeviceChunk chunk = chunk_at(tiles, game, place + thread);
    const int frame = static_cast<int>((place + thread) % kChunkFrames);
    int end = 0;
    for (int f = 0; !chunk.raw && f <= frame; ++f) {
      end += static_cast<int>(tiles.layout.changed(chunk.data, f));
    }
    table.ends[thread] = end;
    const int64_t skipped = (frame - chunk.first) * ring.layout.frame_bytes;
    table.raw[thread] = chunk.raw ? chunk.data + skipped : nullptr;
  }
  const int tiles_in_window = window.down * window.across;
  for (int i = thread; i < tiles_in_window; i += threads) {
    for (int k = 0; k < n; ++k) table.ids[k][i] = 0;
  }
  __syncthreads();
  // A stack lies in one chunk or in two. Frames k to end - 1 are those in the same chunk as k.
  const auto end_of = [&](int k) {
    return smaller(n, k + kChunkFrames - static_cast<int>((place + k) % kChunkFrames));
  };
  for (int k = 0; k < n; k = end_of(k)) {
    if (table.raw[k] != nullptr) continue;
    const DeviceChunk& chunk = chunk_at(tiles, game, place + k);
    const int changes = table.ends[end_of(k) - 1];
    for (int i = thread; i < changes; i += threads) {
      const int64_t position = tiles.layout.position_at(change_at(tiles, chunk, i));
      const int index = window.index(position, tiles.across);
      if (index < 0) continue;
      int frame = k;
      while (i >= table.ends[frame]) ++frame;
      atomicMax(&table.ids[frame][index], static_cast<uint32_t>(i + 1));
    }
  }
  __syncthreads();
  for (int index = thread; index < tiles_in_window; index += threads) {
    const int64_t position =
        int64_t{window.y + index / window.across} * tiles.across + window.x + index % window.across;
    for (int k = 0; k < n; k = end_of(k)) {
      if (table.raw[k] != nullptr) continue;
      const DeviceChunk& chunk = chunk_at(tiles, game, place + k);
      uint32_t id = 0;
      for (int frame = k; frame < end_of(k); ++frame) {
        const uint32_t latest = table.ids[frame][index];
        if (latest > 0) {
          id = ChunkLayout::id_at(change_at(tiles, chunk, int64_t{latest} - 1));
        } else if (frame == k) {
          id = tiles.layout.key_at(chunk.data, position);
        }
        table.ids[frame][index] = id;
      }
    }
  }
  __syncthreads();
}

// Writes the window of a stack: `blanks` frames of zeros, then those of the table. kPixels
// neighbours at a time, contiguous or, with kFrames, pixels of 4 frames in one store (4), or
// element by element (1). Called by all threads of a block.
template <Output kOutput, int kPixels, int kFrames>
__device__ void write_window(const DeviceTiles& tiles, const TileWindow& window,
                             const TileTable& table, int blanks, const CopyTask& task) {
  using Element = typename Pixel<kOutput>::Type;
  constexpr int kElements = kFrames > 0 ? kFrames : kPixels;
  using Store = typename Chunk<kElements * expansion(kOutput)>::Type;
  const int per_row = (window.right - window.left) / kPixels;
  const int items = per_row * (window.bottom - window.top);
  for (int item = static_cast<int>(threadIdx.x); item < items;
       item += static_cast<int>(blockDim.x)) {
    const int y = window.top + item / per_row, x = window.left + item % per_row * kPixels;
    const int tile_y = y / tiles.tile_rows;
    const int row = y - smaller(tile_y * tiles.tile_rows, tiles.height - tiles.tile_rows);
    int index[kPixels], offset[kPixels];  // of the pixel's tile in the table; of the pixel in it
#pragma unroll
    for (int j = 0; j < kPixels; ++j) {
      const int tile_x = (x + j) / tiles.columns;
      const int left = smaller(tile_x * tiles.columns, tiles.width - tiles.columns);
      index[j] = (tile_y - window.y) * window.across + tile_x - window.x;
      offset[j] = row * tiles.columns + x + j - left;
    }
    const int64_t pixel = int64_t{y} * tiles.width + x;
    Element elements[kElements];
    for (int s = 0; s < task.count; ++s) {
      const int frame = s - blanks;
#pragma unroll
      for (int j = 0; j < kPixels; ++j) {
        uint8_t byte = 0;
        if (frame >= 0 && table.raw[frame] != nullptr) {
          byte = table.raw[frame][pixel + j];
        } else if (frame >= 0) {
          byte = tile_pixels(tiles, table.ids[frame][index[j]])[offset[j]];
        }
        elements[kFrames > 1 ? s : j] = Pixel<kOutput>::of(byte, task.scale);
      }
      if (kFrames > 1 && s < kFrames - 1) continue;
      Store store;
      memcpy(&store, elements, sizeof store);
      const int64_t at = kFrames > 1    ? pixel
                         : kFrames == 1 ? pixel * task.count + s
                                        : (s * task.frame_bytes + pixel) / kPixels;
      reinterpret_cast<Store*>(task.out)[at] = store;
    }
  }
}

// Copies this block's share of a stack. `task` has no frames and no threads. Called by all threads
// of a block, which then all have passed a barrier.
template <Output kOutput>
__device__ void copy_tiles(const DeviceRing& ring, const CopyTask& task, bool channels_last,
                           int64_t game_row, int window_rows, TileTable& table) {
  const DeviceTiles& tiles = ring.tiles;
  const int blanks = task.run.blanks, n = task.count - blanks;
  const int64_t row = task.run.first + blanks + (blanks < task.run.wrapped ? task.rows : 0);
  const int64_t game = game_row / task.rows;
  const int64_t place = n > 0 ? place_of(ring, game, row - game_row) : 0;
  const int windows = count_windows(tiles, window_rows);
  for (int number = static_cast<int>(blockIdx.y); number < windows;
       number += static_cast<int>(gridDim.y)) {
    const TileWindow window = window_at(tiles, number, window_rows);
    load_table(ring, game, place, n, window, table);
    if (channels_last && task.count == 4 && task.is_aligned) {
      write_window<kOutput, 1, 4>(tiles, window, table, blanks, task);
    } else if (channels_last) {
      write_window<kOutput, 1, 1>(tiles, window, table, blanks, task);
    } else if (task.is_aligned && tiles.width % 4 == 0) {
      write_window<kOutput, 4, 0>(tiles, window, table, blanks, task);
    } else {
      write_window<kOutput, 1, 0>(tiles, window, table, blanks, task);
    }
    __syncthreads();  // before the table is filled again
  }
}

}  // namespace fastreplay
