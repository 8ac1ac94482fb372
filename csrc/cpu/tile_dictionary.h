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

#include "core/tiles.h"
#include "cpu/huge_pages.h"

namespace fastreplay {

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

  static uint64_t hash_of(const uint8_t* pixels);
  // The id of the tile with these 28 bytes, with one reference more; 0 if it is new and the
  // dictionary is full. `is_new` is set if the tile is new. Needs room from reserve().
  uint32_t acquire(const uint8_t* pixels, uint64_t hash, bool& is_new);
  // One reference more, or less, to a tile. Without references it is freed.
  uint32_t retain(uint32_t id, bool& is_new);
  void release(uint32_t id);

  // Prefetch what acquire() and release() read: first the bucket, and when it has come the tile.
  void prefetch_bucket(uint64_t hash) const { __builtin_prefetch(&head(bucket_of(hash))); }
  void prefetch_first(uint64_t hash) const { prefetch(head(bucket_of(hash)) & kIdMask); }
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
