// The frames of a replay, compact and lossless: tiles that occur again are stored once, and a frame
// is the changes to the frame before it (layout: core/tiles.h, cpu/tile_dictionary.h).
//
//   game 0   | chunk | chunk | ... | open chunk |      32 rows each: coded in tiles, or raw frames
//   game 1      | chunk | chunk | ... | open chunk |   (the borders of the games are staggered)
//                   \________/  ids of tiles
//   dictionary      | tile | tile | tile | ...         one for all games
//
// add() compares a frame with the last one of its game and looks up the tiles that differ. read()
// takes the keyframe of a chunk, applies the changes up to the row, and copies its tiles; each
// following frame is the frame before with a few tiles replaced. The open chunk has the same form.
//
// Closed chunks lie in a log in the order of their last row, which is the order in which they are
// overwritten. A chunk is dropped when its last row is overwritten: each id in it returns its
// reference, and tiles without references are freed. So there are up to 31 rows of each game more
// than the ring needs, and the capacity is exact.
//
// Memory is bounded, whatever the frames show, by 1.4 times that of plain frames, 24 bytes a chunk,
// 64 frames a game, two segments of 2 MiB and one of 2.5 MiB:
//   - a chunk whose bytes, plus 40 for each tile that it brought, exceed those of its frames holds
//     the frames raw. Noise is stored like this. So is a chunk that needs a new tile when the
//     dictionary is full;
//   - the dictionary takes at most a quarter of the plain frames (or 4096 tiles, if that is more)
//     and never has more than 2^24 - 1 tiles.
// Memory grows in fixed segments, and what is stored never moves.
//
// Not thread-safe, but read() may run in several threads.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/tiles.h"
#include "cpu/chunk_log.h"
#include "cpu/tile_dictionary.h"

namespace fastreplay {

class TileStore {
 public:
  // `max_tiles` of 0: the bound above.
  TileStore(int64_t rows, int64_t num_envs, const TileShape& shape, int64_t max_tiles = 0);

  const TileShape& shape() const { return shape_; }
  int64_t rows() const { return rows_; }
  int64_t num_envs() const { return num_envs_; }
  // Rows added to each game so far; row t lies in slot t % rows.
  int64_t added() const { return added_; }
  const TileDictionary& dictionary() const { return dictionary_; }
  const ChunkLayout& layout() const { return layout_; }
  // Bytes allocated; of the buffer of an open chunk, the bytes that were ever written.
  int64_t bytes() const;

  // Stores the next frame of each game. `stride`: bytes from one game's frame to the next. Throws
  // std::bad_alloc and changes nothing if memory runs out.
  void add(const uint8_t* frames, int64_t stride);

  // Writes n stored frames of a game, from the one in `slot` on, to `out`, one after the other.
  void read(int64_t game, int64_t slot, int n, uint8_t* out) const;
  // Prefetch what read() of this slot begins with, and, when that has come, what it goes on with.
  void prefetch(int64_t game, int64_t slot) const;
  void prefetch_rest(int64_t game, int64_t slot) const;

  // The chunks of a game that are stored, oldest first: the bytes of each one, negative if it is
  // raw, and all their bytes one after the other.
  struct Chunks {
    std::vector<int64_t> sizes;
    const uint8_t* bytes;  // of restore() only
    int64_t total;
  };
  std::vector<int64_t> chunk_sizes(int64_t game) const;
  void copy_chunks(int64_t game, uint8_t* out) const;

  // Fills a new store with what chunk_sizes() and copy_chunks() gave and the dictionary's tiles 1
  // to n_tiles. Throws std::invalid_argument if they are damaged; the store is unusable then.
  void restore(int64_t added, const uint8_t* tiles, int64_t n_tiles,
               const std::vector<Chunks>& games);

  // Whether each tile's count is the number of its ids in all chunks. Slow.
  bool is_valid() const;

  // For a copy of the store on a device (cuda/tile_mirror.h).
  struct Chunk {
    const uint8_t* data = nullptr;
    int64_t bytes = 0;
    int first = 0;  // the first frame of 32 that is stored: 0 but for the first chunk of a game
    bool raw = false;
  };
  int64_t n_chunks() const { return n_chunks_; }  // of each game's ring, by number % n_chunks
  const Chunk& chunk(int64_t game, int64_t number) const {
    return chunk(games_[static_cast<size_t>(game)], number);
  }
  // The number of the oldest chunk of a game.
  int64_t oldest_chunk(int64_t game) const { return games_[static_cast<size_t>(game)].oldest; }
  // The place of a row in the chunks of a game: 32 * chunk + frame.
  int64_t place(int64_t game, int64_t row) const {
    return row + games_[static_cast<size_t>(game)].shift;
  }
  // Chunks that the next add() will close.
  int64_t closing() const;
  // Bytes of an open chunk, at most. It becomes raw as soon as it is larger than its frames, which
  // it exceeds by one frame.
  int64_t longest_open() const {
    return raw_bytes() + layout_.changes + layout_.positions * layout_.change_bytes;
  }
  // Appends the ids of new tiles to `ids`, which outlives the store and has room for an id of each
  // position of each game. A tile may be new again, or freed, in the same add().
  void report_new_tiles(std::vector<uint32_t>* ids) { new_ids_ = ids; }

 private:
  struct Game {
    std::vector<Chunk> chunks;          // a ring, by chunk number
    std::unique_ptr<uint8_t[]> buffer;  // the open chunk
    int64_t largest = 0;                // of an open chunk so far
    int64_t new_tiles = 0;              // that the open chunk brought to the dictionary
    int64_t oldest = 0;                 // the number of the oldest chunk
    bool was_raw = false;               // whether the last chunk that was closed is raw
    bool has_ids = false;               // whether `ids` are those of the last frame
    int64_t shift = 0;                  // of its chunks' borders, 0 to 31
    std::vector<uint32_t> ids;
    std::vector<uint8_t> last;  // the last frame, if has_ids
  };
  // A tile of the frame that code() is coding.
  struct Changed {
    uint8_t pixels[kTileBytes];
    int32_t position;
    uint64_t hash;
  };

  Chunk& chunk(Game& game, int64_t number) {
    return game.chunks[static_cast<size_t>(number % n_chunks_)];
  }
  const Chunk& chunk(const Game& game, int64_t number) const {
    return game.chunks[static_cast<size_t>(number % n_chunks_)];
  }
  int64_t row_in(int64_t slot) const {
    return slot < head_ ? added_ - head_ + slot : added_ - head_ - rows_ + slot;
  }
  int64_t frame_bytes() const { return shape_.frame_bytes(); }
  int64_t raw_bytes() const { return kChunkFrames * frame_bytes(); }

  void add_frame(int64_t index, const uint8_t* frame);
  const uint8_t* store_closed(const Chunk& closed);
  void count_new(Game& game, uint32_t id, bool is_new) {
    game.new_tiles += is_new;
    if (is_new && new_ids_ != nullptr) new_ids_->push_back(id);
  }
  bool code(Game& game, Chunk& chunk, int frame_index, const uint8_t* frame);
  int64_t most_bytes(const Game& game, int frame_index) const;
  void begin(Game& game, Chunk& chunk, int frame_index);
  void make_raw(Game& game, Chunk& chunk, int frames_end);
  void drop_overwritten();
  template <typename Tiles>
  int64_t find_changed(const Tiles& tiles, const Game& game, const uint8_t* frame);
  template <typename Visit>
  void each_id(const Chunk& chunk, Visit visit) const;
  void read_chunk(const Chunk& chunk, int first, int n, uint8_t* out) const;
  int64_t count_changes(const Chunk& chunk, int frame) const;
  const uint8_t* load_ids(const Chunk& chunk, int frame, uint32_t* ids) const;
  void check_chunk(const Chunk& chunk, int last, int64_t n_tiles) const;

  const int64_t rows_, num_envs_;
  const TileShape shape_;
  const ChunkLayout layout_;
  const int64_t n_chunks_;        // of each game's ring
  std::vector<int64_t> offsets_;  // in the frame, of each position
  TileDictionary dictionary_;
  ChunkLog<Memory> log_;
  std::vector<Game> games_;
  std::unique_ptr<uint8_t[]> scratch_;  // raw_bytes()
  std::vector<Changed> changed_;        // one for each position
  std::vector<uint32_t>* new_ids_ = nullptr;
  int64_t added_ = 0, head_ = 0;
};

}  // namespace fastreplay
