// A set of tiles of 28 bytes, each with an id and a count of references. Equal tiles have one id.
//
//   heads     | link | link | link | ...      a bucket for each hash; a link is a tag and an id
//                |
//   tiles     | pixels, references | ...      32 bytes each, by id
//   next      | link | ...                    the next tile of the same bucket, or the next free id
//
// The tag of a link is 8 bits of the tile's hash: few tiles that differ are compared. Equality is
// always decided by comparing all bytes, so a collision of hashes costs time and nothing else.
//
// Invariants
//   - a tile with references is in the bucket of its hash, once; without, it is free;
//   - tiles and heads lie in segments that never move. The buckets are as many as the tiles were at
//     most: a new tile may split one bucket (linear hashing), so that no call rehashes them all.
//
// Cost: 40 bytes a tile. acquire: two cache misses for a known tile, a few more for a new one.
// Only reserve() allocates. Not thread-safe.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/philox.h"
#include "core/tiles.h"
#include "cpu/huge_pages.h"

// Tests build with fewer bits, so that the hashes of different tiles are equal.
#ifndef FR_TILE_HASH_BITS
#define FR_TILE_HASH_BITS 64
#endif

namespace fastreplay {

inline uint64_t word_at(const uint8_t* bytes) {
  uint64_t word;
  std::memcpy(&word, bytes, sizeof word);
  return word;
}

class TileDictionary {
 public:
  struct alignas(32) Tile {
    uint8_t pixels[kTileBytes];  // zeros after the tile's own bytes
    uint32_t references;
  };
  static constexpr int64_t kBytes = 40;  // of a tile, with everything that belongs to it
  static constexpr int kSegmentBits = 16;
  static constexpr int64_t kSegment = int64_t{1} << kSegmentBits;  // tiles
  static constexpr int kSegments = 1 << (24 - kSegmentBits);

  // `max_tiles` is from 1 to 2^24 - 1.
  explicit TileDictionary(int64_t max_tiles);

  // Makes room for `tiles` new tiles, or for as many as may still come.
  void reserve(int64_t tiles);

  // Of 28 bytes; or of their words at 0, 6, 14 and 20, which hold all of them.
  static uint64_t hash_of(const uint8_t* pixels) {
    return hash_of(word_at(pixels), word_at(pixels + 6), word_at(pixels + 14),
                   word_at(pixels + 20));
  }
  static uint64_t hash_of(uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
    const uint64_t low = fold(a ^ 0x9FB21C651E98DF25, b ^ 0xD6E8FEB86659FD93);
    const uint64_t high = fold(c ^ 0x3C2B2AE3D27D4EB4, d ^ 0xA0761D6478BD642F);
    const uint64_t hash = fold(low ^ 0x8EBC6AF09C88C6E3, high ^ 0x589965CC75374CC3);
    return FR_TILE_HASH_BITS == 64 ? hash : hash & ((uint64_t{1} << (FR_TILE_HASH_BITS % 64)) - 1);
  }
  // The id of the tile with these 28 bytes, with one reference more; 0 if it is new and the
  // dictionary is full. `is_new` is set if the tile is new. Needs room from reserve().
  uint32_t acquire(const uint8_t* pixels, uint64_t hash, bool& is_new) {
    for (uint32_t link = head(bucket_of(hash)); link != 0; link = next(link & kIdMask)) {
      if (link >> 24 != hash >> 56) continue;
      Tile& found = tile(link & kIdMask);
      // A tile whose count is at its limit gets a twin.
      if (equal(found.pixels, pixels) && found.references != UINT32_MAX) {
        ++found.references;
        return link & kIdMask;
      }
    }
    return insert(pixels, hash, is_new);
  }
  // One reference more, or less, to a tile. Without references it is freed.
  uint32_t retain(uint32_t id, bool& is_new);
  void release(uint32_t id);

  // Prefetches what release() reads first.
  void prefetch(uint32_t id) const { __builtin_prefetch(&tile(id)); }

  const uint8_t* pixels(uint32_t id) const { return tile(id).pixels; }
  uint32_t references(uint32_t id) const { return tile(id).references; }
  int64_t tiles() const { return count_; }
  // Ids are below this.
  int64_t end() const { return end_; }
  int64_t max_tiles() const { return max_tiles_; }
  // Bytes allocated.
  int64_t bytes() const;

  // Fills an empty dictionary with the tiles 1 to n, n <= max_tiles(), of 28 bytes each, without
  // references. Then retain() each that has any, and call finish_restore().
  void restore(const uint8_t* pixels, int64_t n);
  void restore_reference(uint32_t id) { ++tile(id).references; }
  void finish_restore();

  // Whether every tile with references can be found, once, and the counts agree. Slow.
  bool is_valid() const;

 private:
  static constexpr int kFirstLevel = 10;

  // The two halves of a * b, combined.
  static uint64_t fold(uint64_t a, uint64_t b) { return (a * b) ^ mulhi64(a, b); }

  // Element i of segments of T.
  template <typename T>
  static T& at(const Memory* segments, uint64_t i) {
    return reinterpret_cast<T*>(segments[i >> kSegmentBits].get())[i & (kSegment - 1)];
  }
  Tile& tile(uint32_t id) const { return at<Tile>(tiles_, id); }
  uint32_t& next(uint32_t id) const { return at<uint32_t>(next_, id); }
  uint32_t& head(uint64_t bucket) const { return at<uint32_t>(heads_, bucket); }
  uint64_t buckets() const { return (uint64_t{1} << level_) + split_; }
  uint64_t bucket_of(uint64_t hash) const {
    const uint64_t bucket = hash & ((uint64_t{2} << level_) - 1);
    return bucket < buckets() ? bucket : hash & ((uint64_t{1} << level_) - 1);
  }
  static bool equal(const uint8_t* a, const uint8_t* b) {
    const uint64_t differs = (word_at(a) ^ word_at(b)) | (word_at(a + 8) ^ word_at(b + 8)) |
                             (word_at(a + 16) ^ word_at(b + 16)) |
                             (word_at(a + 20) ^ word_at(b + 20));
    return differs == 0;
  }
  // acquire() of a tile that is new.
  uint32_t insert(const uint8_t* pixels, uint64_t hash, bool& is_new);
  void link(uint32_t id, uint64_t hash);
  void split();

  // Segments that do not exist yet are null.
  Memory tiles_[kSegments], next_[kSegments], heads_[kSegments];
  int64_t max_tiles_, room_ = 0;  // room_: ids of the segments that exist, id 0 included
  int64_t count_ = 0, end_ = 1;
  uint32_t free_ = 0;  // the first free id below end_; 0: none
  // Buckets 0 to split_ - 1 of 2^level_ are split: their tiles have one more bit of the hash.
  int level_ = kFirstLevel;
  uint64_t split_ = 0;
};

}  // namespace fastreplay
