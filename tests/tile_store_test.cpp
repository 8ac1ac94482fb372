// Random operations on a TileStore beside plain frames; tests/test_tiles.py compiles and runs it.
//
//   tile_store_test SEED OPERATIONS      exit status 1 and one line if anything differs
//
// Compiled with -DFR_TILE_HASH_BITS=3, tiles collide at every step. With small limits the
// dictionary is full most of the time.
#include "cpu/tile_store.h"

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

using fastreplay::TileDictionary;
using fastreplay::TileShape;
using fastreplay::TileStore;

namespace {

struct Setting {
  int64_t rows, num_envs, height, width, max_tiles;
};

constexpr Setting kSettings[] = {
    {2, 1, 5, 17, 0},   {7, 3, 5, 17, 12},     {40, 2, 8, 28, 100},   {100, 5, 6, 30, 40},
    {33, 40, 3, 9, 60}, {64, 1, 1, 3, 0},      {200, 1, 16, 84, 0},   {90, 2, 16, 84, 0},
    {31, 2, 1, 40, 7},  {150, 4, 10, 16, 500}, {500, 8, 8, 28, 3000}, {60, 2, 6, 183, 0},
};

[[noreturn]] void fail(const char* what, uint64_t seed, int64_t operation) {
  std::printf("%s (seed %llu, operation %lld)\n", what, static_cast<unsigned long long>(seed),
              static_cast<long long>(operation));
  std::exit(1);
}

class Fuzz {
 public:
  Fuzz(const Setting& setting, uint64_t seed)
      : setting_(setting),
        shape_(setting.height * setting.width, setting.width),
        bytes_(setting.height * setting.width),
        seed_(seed),
        random_(seed),
        store_(make()),
        plain_(static_cast<size_t>(setting.num_envs)),
        frames_(static_cast<size_t>(setting.num_envs * bytes_)),
        out_(static_cast<size_t>(9 * bytes_)) {}

  // One row, some reads, and now and then a check of all counts or a save and load.
  void run(int64_t operations) {
    for (operation_ = 0; operation_ < operations; ++operation_) {
      if (below(4) == 0 || plain_[0].empty()) {
        if (below(100) == 0) kind_ = static_cast<int>(below(8));
        next_frames(kind_);
        add();
      } else {
        read();
      }
      if (below(2000) == 0 && !store_->is_valid()) fail("a count is wrong", seed_, operation_);
      if (below(5000) == 0) save_and_load();
    }
    check_all();
    // Nothing refers to a tile any more once all rows are noise and kept raw. With more games, one
    // of them has always begun a chunk that is not raw yet.
    for (int64_t i = 0; i < setting_.rows + 200; ++i) {
      next_frames(kNoise);
      add();
      if (all_raw()) {
        if (store_->dictionary().tiles() != 0) fail("a tile has leaked", seed_, operation_);
        emptied_ = true;
      }
    }
    check_all();
    if (setting_.num_envs == 1 && !emptied_) fail("noise is not kept raw", seed_, operation_);
  }

 private:
  enum Kind { kSame, kPixel, kNoise, kFlash, kFade, kFewLevels, kScroll, kMixed };

  std::unique_ptr<TileStore> make() const {
    return std::make_unique<TileStore>(setting_.rows, setting_.num_envs, shape_,
                                       setting_.max_tiles);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(random_() % static_cast<uint64_t>(n)); }
  uint8_t byte() { return static_cast<uint8_t>(random_()); }

  void next_frames(int kind) {
    for (int64_t game = 0; game < setting_.num_envs; ++game) {
      uint8_t* const frame = frames_.data() + game * bytes_;
      switch (kind == kMixed ? static_cast<int>(below(kMixed)) : kind) {
        case kSame:
          break;
        case kPixel:
          frame[below(bytes_)] = byte();
          break;
        case kNoise:
          for (int64_t i = 0; i < bytes_; ++i) frame[i] = byte();
          break;
        case kFlash:
          for (int64_t i = 0; i < bytes_; ++i) frame[i] = operation_ % 2 ? 255 : 0;
          break;
        case kFade:
          for (int64_t i = 0; i < bytes_; ++i) ++frame[i];
          break;
        case kFewLevels:
          frame[below(bytes_)] = static_cast<uint8_t>(below(2));
          break;
        case kScroll:
          std::memmove(frame, frame + 1, static_cast<size_t>(bytes_ - 1));
          break;
      }
    }
  }

  void add() {
    store_->add(frames_.data(), bytes_);
    for (int64_t game = 0; game < setting_.num_envs; ++game) {
      auto& rows = plain_[static_cast<size_t>(game)];
      const uint8_t* const frame = frames_.data() + game * bytes_;
      rows.emplace_back(frame, frame + bytes_);
      if (static_cast<int64_t>(rows.size()) > setting_.rows) rows.pop_front();
    }
  }

  void read() { check(below(setting_.num_envs), below(int64_t(plain_[0].size())), 1 + below(9)); }

  // Compares up to n frames of a game, from the `first` one that is stored.
  void check(int64_t game, int64_t first, int64_t n) {
    const auto& rows = plain_[static_cast<size_t>(game)];
    n = std::min(n, static_cast<int64_t>(rows.size()) - first);
    const int64_t row = store_->added() - static_cast<int64_t>(rows.size()) + first;
    store_->prefetch(game, row % setting_.rows);
    store_->read(game, row % setting_.rows, static_cast<int>(n), out_.data());
    for (int64_t i = 0; i < n; ++i) {
      const auto& row_bytes = rows[static_cast<size_t>(first + i)];
      if (std::memcmp(row_bytes.data(), out_.data() + i * bytes_, size_t(bytes_)) != 0) {
        fail("a frame differs", seed_, operation_);
      }
    }
  }

  void check_all() {
    for (int64_t game = 0; game < setting_.num_envs; ++game) {
      for (size_t i = 0; i < plain_[0].size(); ++i) check(game, static_cast<int64_t>(i), 1);
    }
    if (!store_->is_valid()) fail("a count is wrong", seed_, operation_);
  }

  bool all_raw() const {
    for (int64_t game = 0; game < setting_.num_envs; ++game) {
      for (const int64_t size : store_->chunk_sizes(game)) {
        if (size > 0) return false;
      }
    }
    return true;
  }

  // Continues with a copy that was restored from the state. A damaged state must be refused, or
  // give a valid store.
  void save_and_load() {
    const TileDictionary& dictionary = store_->dictionary();
    std::vector<uint8_t> tiles;
    for (int64_t id = 1; id < dictionary.end(); ++id) {
      const uint8_t* const pixels = dictionary.pixels(static_cast<uint32_t>(id));
      tiles.insert(tiles.end(), pixels, pixels + fastreplay::kTileBytes);
    }
    std::vector<std::vector<uint8_t>> bytes;
    std::vector<TileStore::Chunks> games;
    for (int64_t game = 0; game < setting_.num_envs; ++game) {
      const std::vector<int64_t> sizes = store_->chunk_sizes(game);
      int64_t total = 0;
      for (const int64_t size : sizes) total += std::abs(size);
      bytes.emplace_back(static_cast<size_t>(total));
      store_->copy_chunks(game, bytes.back().data());
      games.push_back({sizes, bytes.back().data(), total});
    }
    const auto load = [&](int64_t added) {
      std::unique_ptr<TileStore> loaded = make();
      loaded->restore(added, tiles.data(), dictionary.end() - 1, games);
      return loaded;
    };
    std::unique_ptr<TileStore> copy = load(store_->added());

    auto& game_bytes = bytes[static_cast<size_t>(below(setting_.num_envs))];
    auto& sizes = games[static_cast<size_t>(below(setting_.num_envs))].sizes;
    int64_t added = store_->added();
    switch (below(4)) {
      case 0:
        sizes[static_cast<size_t>(below(int64_t(sizes.size())))] = below(2) ? INT64_MIN : 1;
        break;
      case 1:
        sizes.pop_back();
        break;
      case 2:
        added += 1 + below(100);
        break;
      default:
        for (int i = 0; i < 8; ++i) game_bytes[size_t(below(int64_t(game_bytes.size())))] = byte();
    }
    try {
      const std::unique_ptr<TileStore> damaged = load(added);
      if (!damaged->is_valid()) fail("a damaged state gives wrong counts", seed_, operation_);
      for (int64_t game = 0; game < setting_.num_envs; ++game) {
        const int64_t stored = std::min(added, setting_.rows);
        for (int64_t i = 0; i < stored; ++i) {
          damaged->read(game, (added - stored + i) % setting_.rows, 1, out_.data());
        }
      }
    } catch (const std::invalid_argument&) {
    }
    store_ = std::move(copy);
  }

  const Setting setting_;
  const TileShape shape_;
  const int64_t bytes_;
  const uint64_t seed_;
  std::mt19937_64 random_;
  std::unique_ptr<TileStore> store_;
  std::vector<std::deque<std::vector<uint8_t>>> plain_;  // the rows of each game, oldest first
  std::vector<uint8_t> frames_, out_;
  int64_t operation_ = 0;
  int kind_ = kMixed;
  bool emptied_ = false;
};

}  // namespace

int main(int argc, char** argv) {
  const uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1;
  const int64_t operations = argc > 2 ? std::strtoll(argv[2], nullptr, 10) : 100000;
  for (const Setting& setting : kSettings) Fuzz(setting, seed).run(operations);
  std::printf("ok\n");
}
