#include "cpu/tile_dictionary.h"

#include <cstring>

namespace fastreplay {
namespace {

// A link: the id, and above it a tag.
uint32_t link_to(uint32_t id, uint64_t hash) {
  return id | static_cast<uint32_t>(hash >> 56) << 24;
}

}  // namespace

TileDictionary::TileDictionary(int64_t max_tiles) : max_tiles_(max_tiles) {}

void TileDictionary::reserve(int64_t tiles) {
  const int64_t needed = std::min(end_ + tiles, max_tiles_ + 1);
  while (room_ < needed) {
    const int64_t i = room_ >> kSegmentBits;
    // What is there already was allocated by a call that ran out of memory.
    if (!tiles_[i]) tiles_[i] = allocate(int64_t{sizeof(Tile)} * kSegment);
    if (!next_[i]) next_[i] = allocate(int64_t{sizeof(uint32_t)} * kSegment);
    // There are never more buckets than tiles, but for the first level's. split() writes the others
    // before they are read.
    if (!heads_[i]) {
      heads_[i] = allocate(int64_t{sizeof(uint32_t)} * kSegment);
      if (i == 0) std::memset(heads_[i].get(), 0, sizeof(uint32_t) << kFirstLevel);
    }
    room_ += kSegment;
  }
}

void TileDictionary::link(uint32_t id, uint64_t hash) {
  if (static_cast<uint64_t>(count_) > buckets()) split();
  uint32_t& first = head(bucket_of(hash));
  next(id) = first;
  first = link_to(id, hash);
}

// Moves the tiles of bucket split_ whose next bit of the hash is 1 to a new last bucket.
void TileDictionary::split() {
  uint32_t& from = head(split_);
  uint32_t stay = 0, move = 0;
  for (uint32_t link = from; link != 0;) {
    const uint32_t id = link & kIdMask;
    uint32_t& to = hash_of(pixels(id)) >> level_ & 1 ? move : stay;
    const uint32_t after = next(id);
    next(id) = to;
    to = link;
    link = after;
  }
  from = stay;
  head((uint64_t{1} << level_) + split_) = move;
  if (++split_ == uint64_t{1} << level_) {
    ++level_;
    split_ = 0;
  }
  // What later calls read: the first tile of a bucket, and before that the bucket.
  const uint32_t first = head(split_ + 4) & kIdMask;
  prefetch(first);
  __builtin_prefetch(&next(first));
  __builtin_prefetch(&head(split_ + 16));
}

uint32_t TileDictionary::insert(const uint8_t* pixels, uint64_t hash, bool& is_new) {
  uint32_t id = free_;
  if (id != 0) {
    free_ = next(id);
  } else if (end_ <= max_tiles_) {
    id = static_cast<uint32_t>(end_++);
  } else {
    return 0;
  }
  is_new = true;
  Tile& added = tile(id);
  std::memcpy(added.pixels, pixels, kTileBytes);
  added.references = 1;
  ++count_;
  link(id, hash);
  return id;
}

uint32_t TileDictionary::retain(uint32_t id, bool& is_new) {
  Tile& found = tile(id);
  if (found.references == UINT32_MAX) {
    return acquire(found.pixels, hash_of(found.pixels), is_new);
  }
  ++found.references;
  return id;
}

void TileDictionary::release(uint32_t id) {
  Tile& found = tile(id);
  if (--found.references != 0) return;
  uint32_t* link = &head(bucket_of(hash_of(found.pixels)));
  while ((*link & kIdMask) != id) link = &next(*link & kIdMask);
  *link = next(id);
  next(id) = free_;
  free_ = id;
  --count_;
}

int64_t TileDictionary::bytes() const {
  return room_ * static_cast<int64_t>(sizeof(Tile) + 2 * sizeof(uint32_t));
}

void TileDictionary::restore(const uint8_t* pixels, int64_t n) {
  reserve(n);
  for (; end_ <= n; ++end_) {
    Tile& added = tile(static_cast<uint32_t>(end_));
    std::memcpy(added.pixels, pixels + (end_ - 1) * kTileBytes, kTileBytes);
    added.references = 0;
  }
}

void TileDictionary::finish_restore() {
  for (int64_t i = end_ - 1; i > 0; --i) {
    const uint32_t id = static_cast<uint32_t>(i);
    if (tile(id).references == 0) {
      next(id) = free_;
      free_ = id;
    } else {
      ++count_;
      link(id, hash_of(pixels(id)));
    }
  }
}

bool TileDictionary::is_valid() const {
  int64_t linked = 0, with_references = 0, free = 0;
  for (int64_t i = 1; i < end_; ++i) with_references += references(static_cast<uint32_t>(i)) != 0;
  for (uint64_t bucket = 0; room_ > 0 && bucket < buckets(); ++bucket) {
    for (uint32_t link = head(bucket); link != 0; link = next(link & kIdMask), ++linked) {
      const uint32_t id = link & kIdMask;
      const uint64_t hash = hash_of(pixels(id));
      if (id >= end_ || references(id) == 0 || bucket_of(hash) != bucket) return false;
      if (link != link_to(id, hash) || linked > count_) return false;
    }
  }
  for (uint32_t id = free_; id != 0; id = next(id)) {
    if (references(id) != 0 || ++free > end_) return false;
  }
  return linked == count_ && with_references == count_ && free + count_ == end_ - 1;
}

}  // namespace fastreplay
