#include "cpu/tile_store.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cpu/instructions.h"

namespace fastreplay {
namespace {

constexpr int64_t kLeastTiles = 4096;

// Bytes of a chunk that prefetch() takes: more than a keyframe of 84x84 has.
constexpr int64_t kPrefetched = 896;
// Changes of the frames after the first one that prefetch_rest() takes.
constexpr int64_t kChangesAfter = 64;

// Rows of 8 to 14 bytes are copied as two words that overlap.
void copy_word(const uint8_t* from, uint8_t* to) {
  uint64_t word;
  std::memcpy(&word, from, 8);
  std::memcpy(to, &word, 8);
}

bool same_word(const uint8_t* a, const uint8_t* b) { return word_at(a) == word_at(b); }

// Where tiles lie in a frame, with sizes that the compiler knows for frames of 84x84.
struct Tiles84x84 {
  explicit Tiles84x84(const TileShape&) {}
  static constexpr int kRows = 2, kColumns = 14;
  static constexpr int64_t kWidth = 84, kAcross = 6, kDown = 42;
  static int rows() { return kRows; }
  static int columns() { return kColumns; }
  static int64_t width() { return kWidth; }
  static int64_t across() { return kAcross; }
  static int64_t down() { return kDown; }
  static int64_t bytes() { return 84 * kWidth; }
};

struct AnyTiles {
  explicit AnyTiles(const TileShape& shape) : shape(shape) {}
  int rows() const { return shape.rows; }
  int columns() const { return shape.columns; }
  int64_t width() const { return shape.width; }
  int64_t across() const { return shape.across; }
  int64_t down() const { return shape.down; }
  int64_t bytes() const { return shape.frame_bytes(); }
  const TileShape& shape;
};

// Packs a tile of a frame, and returns its hash.
template <typename Tiles>
uint64_t pack_tile(const Tiles& tiles, const uint8_t* from, uint8_t* pixels) {
  const int columns = tiles.columns();
  uint8_t* to = pixels;
  for (int row = 0; row < tiles.rows(); ++row, from += tiles.width(), to += columns) {
    if (columns >= kLeastTileRow) {
      copy_word(from, to);
      copy_word(from + columns - 8, to + columns - 8);
    } else {
      for (int i = 0; i < columns; ++i) to[i] = from[i];
    }
  }
  return TileDictionary::hash_of(pixels);
}

// The hash takes its words from the frame: from `pixels` it would wait for the stores.
uint64_t pack_tile(const Tiles84x84& tiles, const uint8_t* from, uint8_t* pixels) {
  const uint8_t* const below = from + tiles.width();
  const uint64_t words[] = {word_at(from), word_at(from + 6), word_at(below), word_at(below + 6)};
  std::memcpy(pixels, &words[0], 8);
  std::memcpy(pixels + 6, &words[1], 8);
  std::memcpy(pixels + 14, &words[2], 8);
  std::memcpy(pixels + 20, &words[3], 8);
  return TileDictionary::hash_of(words[0], words[1], words[2], words[3]);
}

// Whether two frames are equal in the tile at this place.
template <typename Tiles>
bool same_tile(const Tiles& tiles, const uint8_t* a, const uint8_t* b) {
  const int columns = tiles.columns();
  for (int row = 0; row < tiles.rows(); ++row, a += tiles.width(), b += tiles.width()) {
    if (columns < kLeastTileRow) {
      if (std::memcmp(a, b, static_cast<size_t>(columns)) != 0) return false;
    } else if (!same_word(a, b) || !same_word(a + columns - 8, b + columns - 8)) {
      return false;
    }
  }
  return true;
}

// memcmp() without a call, which few bytes are not worth.
bool same_bytes(const uint8_t* a, const uint8_t* b, int64_t n) {
  uint64_t differs = 0;
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) differs |= word_at(a + i) ^ word_at(b + i);
  for (; i < n; ++i) differs |= a[i] ^ b[i];
  return differs == 0;
}

namespace plain {
#define FR_TARGET
#include "cpu/tile_kernels.inl"
#undef FR_TARGET
}  // namespace plain

#ifdef FR_X86
namespace avx512 {
#define FR_TARGET FR_TARGET_AVX512
#define FR_MASKS 1
#include "cpu/tile_kernels.inl"
#undef FR_TARGET
#undef FR_MASKS
}  // namespace avx512
#endif

// Ids of one frame, for each thread.
uint32_t* ids_of_thread(int64_t positions) {
  static thread_local std::vector<uint32_t> ids;
  if (static_cast<int64_t>(ids.size()) < positions) ids.resize(static_cast<size_t>(positions));
  return ids.data();
}

int64_t tile_bound(int64_t rows, int64_t num_envs, const TileShape& shape) {
  const int64_t quarter = rows * num_envs * shape.frame_bytes() / 4 / TileDictionary::kBytes;
  return std::min<int64_t>(std::max(quarter, kLeastTiles), kIdMask);
}

[[noreturn]] void throw_damaged(const char* what) {
  throw std::invalid_argument(std::string("the state is damaged: ") + what);
}

}  // namespace

TileStore::TileStore(int64_t rows, int64_t num_envs, const TileShape& shape, int64_t max_tiles)
    : rows_(rows),
      num_envs_(num_envs),
      shape_(shape),
      layout_(shape.positions()),
      n_chunks_(rows / kChunkFrames + 3),
      dictionary_(max_tiles > 0 ? max_tiles : tile_bound(rows, num_envs, shape)),
      log_(raw_bytes()),
      games_(static_cast<size_t>(num_envs)),
      scratch_(new uint8_t[static_cast<size_t>(raw_bytes())]) {
  for (int64_t y = 0; y < shape_.down; ++y) {
    for (int64_t x = 0; x < shape_.across; ++x) offsets_.push_back(shape_.offset(y, x));
  }
  changed_.resize(static_cast<size_t>(layout_.positions));
  for (int64_t index = 0; index < num_envs; ++index) {
    Game& game = games_[static_cast<size_t>(index)];
    game.shift = index * kChunkFrames / num_envs;
    game.chunks.resize(static_cast<size_t>(n_chunks_));
    game.buffer.reset(new uint8_t[static_cast<size_t>(longest_open())]);
    game.ids.resize(static_cast<size_t>(layout_.positions));
    game.last.resize(static_cast<size_t>(frame_bytes()));
  }
}

int64_t TileStore::bytes() const {
  int64_t bytes = dictionary_.bytes() + log_.bytes();
  for (const Game& game : games_) {
    bytes += game.largest + frame_bytes() + layout_.positions * 4;
    bytes += static_cast<int64_t>(sizeof(Game)) + n_chunks_ * static_cast<int64_t>(sizeof(Chunk));
  }
  return bytes;
}

// ------------------------------------------------------------------------------------------ add

void TileStore::add(const uint8_t* frames, int64_t stride) {
  log_.reserve(closing(), allocate);
  dictionary_.reserve(num_envs_ * layout_.positions);
  // From here on nothing allocates.
  for (int64_t game = 0; game < num_envs_; ++game) add_frame(game, frames + game * stride);
  ++added_;
  head_ = head_ + 1 == rows_ ? 0 : head_ + 1;
  drop_overwritten();
}

int64_t TileStore::closing() const {
  int64_t closing = 0;
  for (int64_t game = 0; game < num_envs_; ++game) {
    closing += place(game, added_) % kChunkFrames == kChunkFrames - 1;
  }
  return closing;
}

const uint8_t* TileStore::store_closed(const Chunk& closed) {
  uint8_t* const to = log_.push(closed.bytes);
  std::memcpy(to, closed.data, static_cast<size_t>(closed.bytes));
  return to;
}

void TileStore::add_frame(int64_t index, const uint8_t* frame) {
  Game& game = games_[static_cast<size_t>(index)];
  const int64_t place = this->place(index, added_);
  const int frame_index = static_cast<int>(place % kChunkFrames);
  Chunk& open = chunk(game, place / kChunkFrames);
  if (frame_index == 0 || added_ == 0) begin(game, open, frame_index);

  if (!open.raw && !code(game, open, frame_index, frame)) make_raw(game, open, frame_index);
  if (open.raw) {
    std::memcpy(game.buffer.get() + open.bytes, frame, static_cast<size_t>(frame_bytes()));
    open.bytes += frame_bytes();
  } else if (open.bytes + game.new_tiles * TileDictionary::kBytes > most_bytes(game, frame_index)) {
    make_raw(game, open, frame_index + 1);
  }
  game.largest = std::max(game.largest, open.bytes);
  if (frame_index == kChunkFrames - 1) {
    open.data = store_closed(open);
    game.was_raw = open.raw;
  }
}

// Above this the open chunk, with the tiles that it brought, becomes raw. A chunk that follows a
// raw one must be small from its third frame on, so that endless noise is soon stored raw.
int64_t TileStore::most_bytes(const Game& game, int frame_index) const {
  return game.was_raw ? std::min<int64_t>(frame_index + 3, kChunkFrames) * frame_bytes()
                      : raw_bytes();
}

void TileStore::begin(Game& game, Chunk& open, int frame_index) {
  open = {game.buffer.get(), layout_.changes, frame_index, false};
  std::memset(game.buffer.get(), 0, static_cast<size_t>(layout_.changes));
  game.new_tiles = 0;
}

// Collects the tiles of a frame that differ from the last frame, or all of them without has_ids, in
// changed_. Returns their number.
template <typename Tiles>
int64_t TileStore::find_changed(const Tiles& tiles, const Game& game, const uint8_t* frame) {
  // Copies, because the compiler would load the members again after each write.
  const bool has_last = game.has_ids;
  const uint8_t* const last = game.last.data();
  const int64_t* offset = offsets_.data();
  Changed* const changed = changed_.data();
  const int64_t strip_bytes = tiles.rows() * tiles.width();
  int64_t n = 0;
  for (int64_t y = 0; y < tiles.down(); ++y, offset += tiles.across()) {
    const int64_t strip = *offset;
    if (has_last && same_bytes(frame + strip, last + strip, strip_bytes)) continue;
    for (int64_t x = 0; x < tiles.across(); ++x) {
      const int64_t at = offset[x];
      if (has_last && same_tile(tiles, frame + at, last + at)) continue;
      Changed& tile = changed[n++];
      tile.position = static_cast<int32_t>(y * tiles.across() + x);
      tile.hash = pack_tile(tiles, frame + at, tile.pixels);
    }
  }
  return n;
}

// Codes a frame in the open chunk. Returns false if the dictionary is full: the chunk holds ids of
// a part of the frame then, and has_ids is false.
bool TileStore::code(Game& game, Chunk& open, int frame_index, const uint8_t* frame) {
  uint8_t* const chunk = game.buffer.get();
  const bool keyframe = frame_index == open.first, had_ids = game.has_ids;
  const int64_t n = shape_.height == 84 && shape_.width == 84
                        ? find_changed(Tiles84x84(shape_), game, frame)
                        : find_changed(AnyTiles(shape_), game, frame);
  game.has_ids = false;
  for (int64_t i = 0; i < n; ++i) {
    const Changed& changed = changed_[static_cast<size_t>(i)];
    bool is_new = false;
    const uint32_t id = dictionary_.acquire(changed.pixels, changed.hash, is_new);
    if (id == 0) return false;
    count_new(game, id, is_new);
    game.ids[static_cast<size_t>(changed.position)] = id;
    if (keyframe) {
      layout_.set_key(chunk, changed.position, id);
    } else {
      layout_.set_change(chunk + open.bytes, id, changed.position);
      open.bytes += layout_.change_bytes;
    }
  }
  if (keyframe) {
    // The tiles that have not changed.
    for (int64_t position = 0; had_ids && position < layout_.positions; ++position) {
      if (layout_.key_at(chunk, position) != 0) continue;
      bool is_new = false;
      const uint32_t id = dictionary_.retain(game.ids[static_cast<size_t>(position)], is_new);
      if (id == 0) return false;
      count_new(game, id, is_new);
      game.ids[static_cast<size_t>(position)] = id;
      layout_.set_key(chunk, position, id);
    }
  } else {
    layout_.set_changed(chunk, frame_index, n);
  }
  if (n > 0) std::memcpy(game.last.data(), frame, static_cast<size_t>(frame_bytes()));
  game.has_ids = true;
  return true;
}

// Makes the open chunk raw. Its frames before `frames_end` are complete.
void TileStore::make_raw(Game& game, Chunk& open, int frames_end) {
  const int n = frames_end - open.first;
  if (n > 0) read_chunk(open, 0, n, scratch_.get());
  each_id(open, [this](uint32_t id) { dictionary_.release(id); });
  open.raw = true;
  open.bytes = n * frame_bytes();
  std::memcpy(game.buffer.get(), scratch_.get(), static_cast<size_t>(open.bytes));
  game.has_ids = false;
}

void TileStore::drop_overwritten() {
  for (int64_t index = 0; index < num_envs_; ++index) {
    Game& game = games_[static_cast<size_t>(index)];
    // The chunk of the oldest row that is still stored.
    const int64_t first = place(index, std::max<int64_t>(added_ - rows_, 0)) / kChunkFrames;
    for (; game.oldest < first; ++game.oldest) {
      const Chunk& dropped = chunk(game, game.oldest);
      if (!dropped.raw) each_id(dropped, [this](uint32_t id) { dictionary_.release(id); });
      log_.pop();
    }
  }
}

// Calls visit(id) for every id of a coded chunk, but for places that are empty.
template <typename Visit>
void TileStore::each_id(const Chunk& chunk, Visit visit) const {
  constexpr int64_t kAhead = 8;
  const auto visit_all = [&](int64_t n, auto id_of) {
    for (int64_t i = 0; i < n; ++i) {
      if (i + kAhead < n) dictionary_.prefetch(id_of(i + kAhead));
      if (id_of(i) != 0) visit(id_of(i));
    }
  };
  visit_all(layout_.positions, [&](int64_t i) { return layout_.key_at(chunk.data, i); });
  const uint8_t* const changes = chunk.data + layout_.changes;
  visit_all((chunk.bytes - layout_.changes) / layout_.change_bytes,
            [&](int64_t i) { return ChunkLayout::id_at(changes + i * layout_.change_bytes); });
}

// ----------------------------------------------------------------------------------------- read

void TileStore::read(int64_t game, int64_t slot, int n, uint8_t* out) const {
  const Game& from = games_[static_cast<size_t>(game)];
  int64_t place = this->place(game, row_in(slot));
  while (n > 0) {
    const Chunk& chunk = this->chunk(from, place / kChunkFrames);
    const int frame = static_cast<int>(place % kChunkFrames);
    const int run = std::min(n, kChunkFrames - frame);
    read_chunk(chunk, frame - chunk.first, run, out);
    place += run;
    out += run * frame_bytes();
    n -= run;
  }
}

void TileStore::prefetch(int64_t game, int64_t slot) const {
  const int64_t place = this->place(game, row_in(slot));
  const Chunk& chunk = this->chunk(games_[static_cast<size_t>(game)], place / kChunkFrames);
  const int64_t at = chunk.raw ? (place % kChunkFrames - chunk.first) * frame_bytes() : 0;
  const int64_t end = std::min(at + kPrefetched, chunk.bytes);
  for (int64_t byte = at; byte < end; byte += 64) __builtin_prefetch(chunk.data + byte);
}

void TileStore::prefetch_rest(int64_t game, int64_t slot) const {
  const int64_t place = this->place(game, row_in(slot));
  const Chunk& chunk = this->chunk(games_[static_cast<size_t>(game)], place / kChunkFrames);
  if (chunk.raw) return;  // read in order: the processor prefetches it
  const int64_t n = count_changes(chunk, static_cast<int>(place % kChunkFrames)) + kChangesAfter;
  const int64_t end = std::min(layout_.changes + n * layout_.change_bytes, chunk.bytes);
  for (int64_t byte = kPrefetched; byte < end; byte += 64) __builtin_prefetch(chunk.data + byte);
}

// Changes from the keyframe up to this frame of a coded chunk.
int64_t TileStore::count_changes(const Chunk& chunk, int frame) const {
  int64_t changed = 0;
  for (int f = 0; f <= frame; ++f) changed += layout_.changed(chunk.data, f);
  return changed;
}

// Writes n frames from the `first` one that the chunk holds.
void TileStore::read_chunk(const Chunk& chunk, int first, int n, uint8_t* out) const {
  if (chunk.raw) {
    const uint8_t* from = chunk.data + first * frame_bytes();
    std::memcpy(out, from, static_cast<size_t>(n * frame_bytes()));
    return;
  }
  first += chunk.first;
  uint32_t* const ids = ids_of_thread(layout_.positions);
  const uint8_t* const changes = load_ids(chunk, first, ids);
  const auto write = [&](const auto& tiles, auto write_frames) {
    const int64_t* const offsets = offsets_.data();
    write_frames(dictionary_, tiles, layout_, offsets, chunk.data, first, n, ids, changes, out);
  };
  if (shape_.height != 84 || shape_.width != 84) {
    write(AnyTiles(shape_), plain::write_frames<AnyTiles>);
#ifdef FR_X86
  } else if (instruction_set() == InstructionSet::kAvx512) {
    write(Tiles84x84(shape_), avx512::write_frames<Tiles84x84>);
#endif
  } else {
    write(Tiles84x84(shape_), plain::write_frames<Tiles84x84>);
  }
}

// The ids of a frame of a coded chunk. Returns where the changes of the next frame begin.
const uint8_t* TileStore::load_ids(const Chunk& chunk, int frame, uint32_t* ids) const {
  layout_.load_keys(chunk.data, ids);
  int64_t changed = count_changes(chunk, frame);
  const uint8_t* change = chunk.data + layout_.changes;
  if (layout_.count_bytes == 1) {
    for (; changed >= 4; changed -= 4, change += 16) {  // unrolled by hand
      for (int i = 0; i < 4; ++i) {
        const uint32_t word = ChunkLayout::word_at(change + 4 * i);
        ids[word >> 24] = word & kIdMask;
      }
    }
  }
  for (const int change_bytes = layout_.change_bytes; changed > 0; --changed) {
    ids[layout_.position_at(change)] = ChunkLayout::id_at(change);
    change += change_bytes;
  }
  return change;
}

// ---------------------------------------------------------------------------------------- state

std::vector<int64_t> TileStore::chunk_sizes(int64_t game) const {
  const Game& from = games_[static_cast<size_t>(game)];
  std::vector<int64_t> sizes;
  const int64_t end = added_ == 0 ? 0 : place(game, added_ - 1) / kChunkFrames + 1;
  for (int64_t number = from.oldest; number < end; ++number) {
    const Chunk& each = chunk(from, number);
    sizes.push_back(each.raw ? -each.bytes : each.bytes);
  }
  return sizes;
}

void TileStore::copy_chunks(int64_t game, uint8_t* out) const {
  const Game& from = games_[static_cast<size_t>(game)];
  const int64_t n = static_cast<int64_t>(chunk_sizes(game).size());
  for (int64_t number = from.oldest; number < from.oldest + n; ++number) {
    const Chunk& each = chunk(from, number);
    std::memcpy(out, each.data, static_cast<size_t>(each.bytes));
    out += each.bytes;
  }
}

void TileStore::restore(int64_t added, const uint8_t* tiles, int64_t n_tiles,
                        const std::vector<Chunks>& games) {
  if (n_tiles > dictionary_.max_tiles()) throw_damaged("it has too many tiles");
  added_ = added;
  head_ = added % rows_;
  // The chunks in the order of the log: by their last row, then by game. First all are checked.
  struct Closed {
    int64_t last_row, game, number;
  };
  std::vector<Closed> closed;
  for (int64_t index = 0; index < num_envs_; ++index) {
    Game& game = games_[static_cast<size_t>(index)];
    const Chunks& from = games[static_cast<size_t>(index)];
    game.oldest = place(index, std::max<int64_t>(added - rows_, 0)) / kChunkFrames;
    const int64_t end = added == 0 ? 0 : place(index, added - 1) / kChunkFrames + 1;
    if (added == 0) game.oldest = 0;
    if (end - game.oldest != static_cast<int64_t>(from.sizes.size())) {
      throw_damaged("a chunk of frames is missing");
    }
    const uint8_t* data = from.bytes;
    int64_t left = from.total;
    for (int64_t number = game.oldest; number < end; ++number) {
      const int64_t size = from.sizes[static_cast<size_t>(number - game.oldest)];
      Chunk& each = chunk(game, number);
      const int first = number == 0 ? static_cast<int>(place(index, 0)) : 0;
      const int last = number + 1 < end ? kChunkFrames - 1
                                        : static_cast<int>(place(index, added - 1) % kChunkFrames);
      // INT64_MIN has no negative.
      if (size < -left || size > left) throw_damaged("chunks of frames are cut off");
      each = {data, size < 0 ? -size : size, first, size < 0};
      check_chunk(each, last, n_tiles);
      data += each.bytes;
      left -= each.bytes;
      if (last == kChunkFrames - 1) {
        const int64_t last_row = number * kChunkFrames + last - place(index, 0);
        closed.push_back({last_row, index, number});
      }
    }
    if (left != 0) throw_damaged("it has more bytes than chunks of frames");
  }
  std::sort(closed.begin(), closed.end(), [](const Closed& a, const Closed& b) {
    return a.last_row != b.last_row ? a.last_row < b.last_row : a.game < b.game;
  });
  log_.reserve(static_cast<int64_t>(closed.size()), allocate);
  dictionary_.restore(tiles, n_tiles);
  for (const Closed& each : closed) {
    Chunk& moved = chunk(games_[static_cast<size_t>(each.game)], each.number);
    moved.data = store_closed(moved);
  }
  for (int64_t index = 0; index < num_envs_ && added > 0; ++index) {
    Game& game = games_[static_cast<size_t>(index)];
    const int64_t newest = place(index, added - 1);
    Chunk& last = chunk(game, newest / kChunkFrames);
    const int frame = static_cast<int>(newest % kChunkFrames);
    if (frame < kChunkFrames - 1) {
      std::memcpy(game.buffer.get(), last.data, static_cast<size_t>(last.bytes));
      last.data = game.buffer.get();
      game.largest = last.bytes;
    }
    for (int64_t number = game.oldest; number <= newest / kChunkFrames; ++number) {
      const Chunk& each = chunk(game, number);
      if (each.raw) continue;
      each_id(each, [this](uint32_t id) { dictionary_.restore_reference(id); });
    }
    if (last.raw) continue;
    load_ids(last, frame, game.ids.data());
    read_chunk(last, frame - last.first, 1, game.last.data());
    game.has_ids = true;
  }
  dictionary_.finish_restore();
}

// Throws unless the chunk is one that add() can have made; `last` is its last frame.
void TileStore::check_chunk(const Chunk& chunk, int last, int64_t n_tiles) const {
  if (chunk.raw) {
    if (chunk.bytes != (last - chunk.first + 1) * frame_bytes()) {
      throw_damaged("a chunk of raw frames has the wrong size");
    }
    return;
  }
  if (chunk.bytes < layout_.changes || chunk.bytes > raw_bytes()) {
    throw_damaged("a chunk of frames has the wrong size");
  }
  int64_t changes = 0;
  for (int frame = 0; frame < kChunkFrames; ++frame) {
    const int64_t changed = layout_.changed(chunk.data, frame);
    const bool may_change = frame > chunk.first && frame <= last;
    if (changed > (may_change ? layout_.positions : 0)) throw_damaged("it counts too many changes");
    changes += changed;
  }
  if (chunk.bytes != layout_.changes + changes * layout_.change_bytes) {
    throw_damaged("a chunk of frames has the wrong size");
  }
  const auto check_id = [&](uint32_t id) {
    if (id == 0 || id > n_tiles) throw_damaged("it refers to a tile that is missing");
  };
  for (int64_t i = 0; i < layout_.positions; ++i) check_id(layout_.key_at(chunk.data, i));
  const uint8_t* const end = chunk.data + chunk.bytes;
  for (const uint8_t* at = chunk.data + layout_.changes; at < end; at += layout_.change_bytes) {
    check_id(ChunkLayout::id_at(at));
    if (layout_.position_at(at) >= layout_.positions) {
      throw_damaged("it changes a tile outside the frame");
    }
  }
}

bool TileStore::is_valid() const {
  std::vector<uint32_t> counted(static_cast<size_t>(dictionary_.end()));
  for (int64_t index = 0; index < num_envs_; ++index) {
    const Game& game = games_[static_cast<size_t>(index)];
    const int64_t n = static_cast<int64_t>(chunk_sizes(index).size());
    for (int64_t number = game.oldest; number < game.oldest + n; ++number) {
      const Chunk& each = chunk(game, number);
      if (!each.raw) each_id(each, [&](uint32_t id) { ++counted[id]; });
    }
  }
  for (int64_t id = 1; id < dictionary_.end(); ++id) {
    if (counted[size_t(id)] != dictionary_.references(static_cast<uint32_t>(id))) return false;
  }
  return dictionary_.is_valid();
}

}  // namespace fastreplay
