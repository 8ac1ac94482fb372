// A copy of a TileStore on a CUDA device. The host codes the frames and finds equal tiles; after
// each add() the mirror lists what is new in the store, as patches of the device's memory.
//
//   host      TileStore: tiles, chunks, the dictionary that finds tiles
//   device    tables (fixed): segments, chunks, added, the open chunk of each game
//             segments of 2^16 tiles
//             the log of closed chunks, in the order of the store's (cpu/chunk_log.h)
//
// A frame costs an upload of its new tiles and its changes. A chunk is sent again, as a whole, when
// it is closed or becomes raw.
//
// Memory: as the store's, with 32 bytes a tile instead of 40. It is allocated in segments, which
// are kept until the mirror is destroyed, so that no sample in flight reads memory that was freed.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "cpu/chunk_log.h"
#include "cpu/tile_store.h"
#include "cuda/device_tiles.h"

namespace fastreplay {

// Bytes on the host that belong at an address of the device.
struct Patch {
  uint8_t* to;
  const void* from;
  int64_t bytes;  // at most kMaxPatch
};

class TileMirror {
 public:
  using Memory = std::shared_ptr<uint8_t>;
  using Allocate = std::function<Memory(int64_t bytes)>;
  static constexpr int64_t kMaxPatch = 4096;

  // `tables` has table_bytes(store) bytes on the device, which may be those of an earlier mirror of
  // such a store. `allocate` gives memory of the device, or throws.
  TileMirror(const TileStore& store, uint8_t* tables, Allocate allocate);

  static int64_t table_bytes(const TileStore& store);
  // For kernels. The same as long as the tables are the same.
  DeviceTiles device() const;
  // Bytes allocated on the device, with the tables.
  int64_t bytes() const;

  // Makes room for the next add() of the store. Returns whether it allocated.
  bool reserve();
  // Lists what the last add() of the store has changed. It has brought the tiles `ids`, and no more
  // tables or segments are needed than reserve() has made before it. The patches are valid until
  // the next add(). Sorts `ids`.
  void add(std::vector<uint32_t>& ids, std::vector<Patch>& patches);
  // Lists everything in the store, for a new mirror. Allocates.
  void copy_all(std::vector<Patch>& patches);

 private:
  // What is on the device of a game's newest chunk.
  struct Open {
    int64_t number = -1;
    int64_t bytes = 0;
    bool raw = false;
  };

  bool reserve_tiles(int64_t end);
  void put(const void* to, const void* from, int64_t bytes, std::vector<Patch>& patches) const;
  void put_tables(std::vector<Patch>& patches);
  void put_tiles(const std::vector<uint32_t>& ids, std::vector<Patch>& patches) const;
  void put_chunk(int64_t game, int64_t number, bool closed, std::vector<Patch>& patches);

  const TileStore& store_;
  uint8_t* const tables_;
  const Allocate allocate_;
  ChunkLog<Memory> log_;
  std::vector<Memory> segments_;
  // What belongs in the tables.
  std::vector<uint8_t*> pointers_;
  std::vector<DeviceChunk> chunks_;
  int64_t added_ = 0;
  int64_t sent_segments_ = 0;
  std::vector<Open> open_;
  std::vector<int64_t> oldest_;  // the oldest chunk of each game that is in the log
};

}  // namespace fastreplay
