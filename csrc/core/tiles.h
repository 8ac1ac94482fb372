// How a frame is cut into tiles, and how 32 frames of one game are coded in a chunk.
//
//   frame of 84x84         +------+------+-- - --+------+
//   tiles of 2x14          |  0   |  1   |       |  5   |  rows 0 and 1
//   252 positions          +------+------+-- - --+------+
//                          |  6   |  7   |       |  11  |  rows 2 and 3
//
// A tile has at most 2 rows of 14 bytes. Where the sides of a frame are no multiples of the tile's,
// the last tiles of a row or a column overlap their neighbours. Tiles have ids (tile_dictionary.h).
//
//   chunk   | changed[32] | keyframe: an id for each position | changes: (id, position), ... |
//
// The keyframe is the first frame of the chunk: the low 16 bits of all ids, then the high 8 bits.
// changed[f] counts the changes from frame f - 1 to frame f; those of all frames follow each other.
// A chunk that would be larger than its frames holds the frames themselves.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "core/philox.h"

namespace fastreplay {

constexpr int kChunkFrames = 32;
constexpr int kTileBytes = 28;  // of the largest tile
constexpr int kIdBytes = 3;
constexpr uint32_t kIdMask = 0xFFFFFF;  // ids are from 1 to this; 0 is no tile
constexpr int64_t kLeastTileRow = 8;    // bytes; narrower tiles only in smaller frames

struct TileShape {
  int64_t height, width;  // of a frame, in rows and in bytes
  int rows, columns;      // of a tile
  int64_t down, across;   // tiles of a frame

  TileShape(int64_t frame_bytes, int64_t frame_width)
      : height(frame_bytes / frame_width),
        width(frame_width),
        rows(static_cast<int>(std::min<int64_t>(height, 2))),
        down((height + 1) / 2),
        across((width + 13) / 14) {
    columns = static_cast<int>((width + across - 1) / across);  // 8 to 14 if width is at least 8
  }

  int64_t frame_bytes() const { return height * width; }
  int64_t positions() const { return down * across; }
  // The first byte of the tile at (y, x).
  int64_t offset(int64_t y, int64_t x) const {
    return std::min(y * rows, height - rows) * width + std::min(x * columns, width - columns);
  }
};

// The byte layout of a chunk of coded frames. CPU and CUDA read it.
struct ChunkLayout {
  int64_t positions;
  int count_bytes;   // of changed[f], and of a position
  int64_t keyframe;  // where the keyframe begins
  int64_t changes;   // where the changes begin
  int change_bytes;  // of one change

  ChunkLayout() : ChunkLayout(0) {}
  explicit ChunkLayout(int64_t positions)
      : positions(positions),
        count_bytes(positions < 256 ? 1 : 2),
        keyframe(int64_t{kChunkFrames} * count_bytes),
        changes(keyframe + positions * kIdBytes),
        change_bytes(kIdBytes + count_bytes) {}

  FR_HOST_DEVICE int64_t changed(const uint8_t* chunk, int frame) const {
    return read_count(chunk + frame * count_bytes);
  }
  void set_changed(uint8_t* chunk, int frame, int64_t count) const {
    write_count(chunk + frame * count_bytes, count);
  }
  FR_HOST_DEVICE uint32_t key_at(const uint8_t* chunk, int64_t position) const {
    uint16_t low;
    memcpy(&low, chunk + keyframe + 2 * position, sizeof low);
    return low | uint32_t{chunk[keyframe + 2 * positions + position]} << 16;
  }
  void set_key(uint8_t* chunk, int64_t position, uint32_t id) const {
    const uint16_t low = static_cast<uint16_t>(id);
    std::memcpy(chunk + keyframe + 2 * position, &low, sizeof low);
    chunk[keyframe + 2 * positions + position] = static_cast<uint8_t>(id >> 16);
  }
  void load_keys(const uint8_t* chunk, uint32_t* ids) const {
    for (int64_t i = 0; i < positions; ++i) ids[i] = key_at(chunk, i);
  }
  // The first four bytes of a change: its id and, above it, its position if that is one byte.
  FR_HOST_DEVICE static uint32_t word_at(const uint8_t* change) {
    uint32_t word;
    memcpy(&word, change, sizeof word);
    return word;
  }
  FR_HOST_DEVICE static uint32_t id_at(const uint8_t* change) { return word_at(change) & kIdMask; }
  FR_HOST_DEVICE int64_t position_at(const uint8_t* change) const {
    const uint32_t high = word_at(change) >> 24;
    return count_bytes == 1 ? high : high | int64_t{change[4]} << 8;
  }
  void set_change(uint8_t* change, uint32_t id, int64_t position) const {
    std::memcpy(change, &id, sizeof id);
    write_count(change + kIdBytes, position);
  }

 private:
  FR_HOST_DEVICE int64_t read_count(const uint8_t* at) const {
    return count_bytes == 1 ? at[0] : at[0] | int64_t{at[1]} << 8;
  }
  void write_count(uint8_t* at, int64_t count) const {
    at[0] = static_cast<uint8_t>(count);
    if (count_bytes == 2) at[1] = static_cast<uint8_t>(count >> 8);
  }
};

}  // namespace fastreplay
