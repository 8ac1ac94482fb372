#include <algorithm>
#include <utility>

#include "cuda/copy.cuh"
#include "cuda/grid.cuh"
#include "cuda/tile_mirror.h"

namespace fastreplay {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kSegmentBytes = TileDictionary::kSegment * kTileSlot;
static_assert(sizeof(TileDictionary::Tile) == kTileSlot, "tiles are sent with what follows them");

// Offsets in the tables.
struct Tables {
  int64_t chunks, added, open, open_bytes, end;

  explicit Tables(const TileStore& store)
      : chunks(TileDictionary::kSegments * int64_t{sizeof(uint8_t*)}),
        added(chunks + store.num_envs() * store.n_chunks() * int64_t{sizeof(DeviceChunk)}),
        open(added + 16),
        open_bytes((store.longest_open() + 15) / 16 * 16),
        end(open + store.num_envs() * open_bytes) {}
};

// Copies the bytes as units of T. Called by a whole warp. The memory does not overlap, so that a
// load need not wait for the stores before it.
template <typename T>
__device__ void copy_units(const uint8_t* from, uint8_t* to, uint32_t bytes, int lane) {
  const T* __restrict__ const source = reinterpret_cast<const T*>(from);
  T* __restrict__ const target = reinterpret_cast<T*>(to);
#pragma unroll 4
  for (uint32_t i = static_cast<uint32_t>(lane); i < bytes / sizeof(T); i += 32) {
    target[i] = source[i];
  }
}

__global__ void patch_kernel(const DevicePatch* patches, int64_t n) {
  const int64_t i = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x % 32);
  if (i >= n) return;
  const DevicePatch patch = patches[i];
  const uint8_t* const from = reinterpret_cast<const uint8_t*>(patches) + patch.from;
  // The source is aligned. The bytes after the last whole unit are copied one by one.
  const uint32_t unit = is_aligned(patch.to, 0, 16) ? 16 : is_aligned(patch.to, 0, 4) ? 4 : 1;
  const uint32_t body = patch.bytes / unit * unit;
  if (unit == 16) {
    copy_units<uint4>(from, patch.to, body, lane);
  } else if (unit == 4) {
    copy_units<uint32_t>(from, patch.to, body, lane);
  }
  const uint32_t copied = unit == 1 ? 0 : body;
  copy_units<uint8_t>(from + copied, patch.to + copied, patch.bytes - copied, lane);
}

}  // namespace

void launch_patches(const DevicePatch* patches, int64_t n, cudaStream_t stream) {
  if (n > 0) launch(patch_kernel, blocks_for(n, kThreads / 32), kThreads, stream, patches, n);
}

TileMirror::TileMirror(const TileStore& store, uint8_t* tables, Allocate allocate)
    : store_(store),
      tables_(tables),
      allocate_(std::move(allocate)),
      log_(kChunkFrames * store.shape().frame_bytes(), true),
      pointers_(TileDictionary::kSegments),
      chunks_(static_cast<size_t>(store.num_envs() * store.n_chunks())),
      open_(static_cast<size_t>(store.num_envs())),
      oldest_(static_cast<size_t>(store.num_envs())) {
  segments_.reserve(TileDictionary::kSegments);
}

int64_t TileMirror::table_bytes(const TileStore& store) { return Tables(store).end; }

DeviceTiles TileMirror::device() const {
  const Tables at(store_);
  const TileShape& shape = store_.shape();
  return {reinterpret_cast<const uint8_t* const*>(tables_),
          reinterpret_cast<const DeviceChunk*>(tables_ + at.chunks),
          reinterpret_cast<const int64_t*>(tables_ + at.added),
          store_.n_chunks(),
          store_.layout(),
          static_cast<int>(shape.height),
          static_cast<int>(shape.width),
          shape.rows,
          shape.columns,
          static_cast<int>(shape.down),
          static_cast<int>(shape.across)};
}

int64_t TileMirror::bytes() const {
  return table_bytes(store_) + static_cast<int64_t>(segments_.size()) * kSegmentBytes +
         log_.bytes();
}

bool TileMirror::reserve_tiles(int64_t end) {
  const int64_t needed = (end + TileDictionary::kSegment - 1) / TileDictionary::kSegment;
  const bool grows = static_cast<int64_t>(segments_.size()) < needed;
  while (static_cast<int64_t>(segments_.size()) < needed) {
    Memory segment = allocate_(kSegmentBytes);
    // Another thread may have made room meanwhile.
    if (static_cast<int64_t>(segments_.size()) < needed) segments_.push_back(std::move(segment));
  }
  return grows;
}

bool TileMirror::reserve() {
  const TileDictionary& dictionary = store_.dictionary();
  const int64_t end = dictionary.end() + store_.num_envs() * store_.layout().positions;
  const bool has_grown = reserve_tiles(std::min(end, dictionary.max_tiles() + 1));
  return log_.reserve(store_.closing(), allocate_) || has_grown;
}

// Lists bytes in patches of at most kMaxPatch.
void TileMirror::put(const void* to, const void* from, int64_t bytes,
                     std::vector<Patch>& patches) const {
  for (int64_t at = 0; at < bytes; at += kMaxPatch) {
    uint8_t* const part = const_cast<uint8_t*>(static_cast<const uint8_t*>(to)) + at;
    patches.push_back(
        {part, static_cast<const uint8_t*>(from) + at, std::min(bytes - at, kMaxPatch)});
  }
}

void TileMirror::put_tables(std::vector<Patch>& patches) {
  const int64_t segments = static_cast<int64_t>(segments_.size());
  for (int64_t i = sent_segments_; i < segments; ++i)
    pointers_[size_t(i)] = segments_[size_t(i)].get();
  const int64_t size = sizeof(uint8_t*);
  put(tables_ + sent_segments_ * size, pointers_.data() + sent_segments_,
      (segments - sent_segments_) * size, patches);
  sent_segments_ = segments;
  added_ = store_.added();
  put(tables_ + Tables(store_).added, &added_, sizeof added_, patches);
}

// Lists tiles, neighbours together. `ids` is sorted, without duplicates.
void TileMirror::put_tiles(const std::vector<uint32_t>& ids, std::vector<Patch>& patches) const {
  for (size_t i = 0, end = 0; i < ids.size(); i = end) {
    const uint32_t id = ids[i], segment = id >> TileDictionary::kSegmentBits;
    for (end = i + 1; end < ids.size(); ++end) {
      if (ids[end] != id + (end - i) || ids[end] >> TileDictionary::kSegmentBits != segment) break;
    }
    put(pointers_[segment] + (id & (TileDictionary::kSegment - 1)) * kTileSlot,
        store_.dictionary().pixels(id), static_cast<int64_t>(end - i) * kTileSlot, patches);
  }
}

// Lists what the device lacks of a chunk.
void TileMirror::put_chunk(int64_t game, int64_t number, bool closed, std::vector<Patch>& patches) {
  const Tables at(store_);
  const TileStore::Chunk& chunk = store_.chunk(game, number);
  Open& open = open_[static_cast<size_t>(game)];
  DeviceChunk now{tables_ + at.open + game * at.open_bytes, chunk.first, chunk.raw};
  if (closed) {
    now.data = log_.push(chunk.bytes);
    put(now.data, chunk.data, chunk.bytes, patches);
    open = {};
  } else {
    const bool known = open.number == number && open.raw == chunk.raw;
    const ChunkLayout& layout = store_.layout();
    // The counts of changes, or all of a new chunk, and what was appended.
    if (known && !chunk.raw) put(now.data, chunk.data, layout.keyframe, patches);
    const int64_t sent = known ? open.bytes : 0;
    put(now.data + sent, chunk.data + sent, chunk.bytes - sent, patches);
    open = {number, chunk.bytes, chunk.raw};
  }
  const int64_t element = game * store_.n_chunks() + number % store_.n_chunks();
  DeviceChunk& mine = chunks_[static_cast<size_t>(element)];
  if (mine.data == now.data && mine.first == now.first && mine.raw == now.raw) return;
  mine = now;
  put(tables_ + at.chunks + element * int64_t{sizeof now}, &mine, sizeof mine, patches);
}

void TileMirror::add(std::vector<uint32_t>& ids, std::vector<Patch>& patches) {
  put_tables(patches);
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  put_tiles(ids, patches);
  for (int64_t game = 0; game < store_.num_envs(); ++game) {
    const int64_t place = store_.place(game, store_.added() - 1);
    put_chunk(game, place / kChunkFrames, place % kChunkFrames == kChunkFrames - 1, patches);
  }
  for (int64_t game = 0; game < store_.num_envs(); ++game) {
    for (int64_t& oldest = oldest_[static_cast<size_t>(game)]; oldest < store_.oldest_chunk(game);
         ++oldest) {
      log_.pop();
    }
  }
}

void TileMirror::copy_all(std::vector<Patch>& patches) {
  const int64_t end = store_.dictionary().end();
  while (reserve_tiles(end)) {
  }
  // The closed chunks in the order of the store's log.
  struct Closed {
    int64_t last_row, game, number;
  };
  std::vector<Closed> closed;
  for (int64_t game = 0; game < store_.num_envs(); ++game) {
    oldest_[static_cast<size_t>(game)] = store_.oldest_chunk(game);
    const int64_t n = store_.place(game, store_.added()) / kChunkFrames;  // chunks that are closed
    for (int64_t number = store_.oldest_chunk(game); number < n; ++number) {
      closed.push_back({(number + 1) * kChunkFrames - store_.place(game, 0), game, number});
    }
  }
  std::sort(closed.begin(), closed.end(), [](const Closed& a, const Closed& b) {
    return a.last_row != b.last_row ? a.last_row < b.last_row : a.game < b.game;
  });
  log_.reserve(static_cast<int64_t>(closed.size()), allocate_);
  put_tables(patches);
  std::vector<uint32_t> ids(static_cast<size_t>(end - 1));
  for (int64_t i = 1; i < end; ++i) ids[static_cast<size_t>(i - 1)] = static_cast<uint32_t>(i);
  put_tiles(ids, patches);
  for (const Closed& each : closed) put_chunk(each.game, each.number, true, patches);
  for (int64_t game = 0; game < store_.num_envs() && store_.added() > 0; ++game) {
    const int64_t place = store_.place(game, store_.added() - 1);
    if (place % kChunkFrames < kChunkFrames - 1) {
      put_chunk(game, place / kChunkFrames, false, patches);
    }
  }
}

}  // namespace fastreplay
