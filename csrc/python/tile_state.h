// The frames of a TileStore as tensors on the CPU, for the state of a replay on either device.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "cpu/tile_store.h"
#include "python/tensor_view.h"

namespace fastreplay {

// (bytes of the tiles from id 1 on, [bytes of each chunk] of each game, [the chunks' bytes] of each
// game). restored_tiles() takes them.
inline py::tuple tile_state(const TileStore& tiles) {
  const TileDictionary& dictionary = tiles.dictionary();
  const auto tensor = [](int64_t n, DType dtype, const char* name) {
    py::object owner = empty_1d(n, dtype);
    const TensorView memory = view(owner, name);
    return std::make_pair(std::move(owner), memory);
  };
  auto [pixels, pixel_memory] = tensor((dictionary.end() - 1) * kTileBytes, DType::kUint8, "tiles");
  for (int64_t i = 1; i < dictionary.end(); ++i) {
    const uint32_t id = static_cast<uint32_t>(i);
    uint8_t* const to = pixel_memory.as<uint8_t>() + (i - 1) * kTileBytes;
    std::memcpy(to, dictionary.pixels(id), kTileBytes);
    if (dictionary.references(id) == 0) std::memset(to, 0, kTileBytes);
  }
  py::list sizes, chunks;
  for (int64_t game = 0; game < tiles.num_envs(); ++game) {
    const std::vector<int64_t> of_game = tiles.chunk_sizes(game);
    const int64_t n = static_cast<int64_t>(of_game.size());
    int64_t total = 0;
    for (const int64_t size : of_game) total += std::abs(size);
    auto [size_tensor, size_memory] = tensor(n, DType::kInt64, "chunk_sizes");
    std::copy(of_game.begin(), of_game.end(), size_memory.as<int64_t>());
    auto [chunk_tensor, chunk_memory] = tensor(total, DType::kUint8, "chunks");
    tiles.copy_chunks(game, chunk_memory.as<uint8_t>());
    sizes.append(size_tensor);
    chunks.append(chunk_tensor);
  }
  return py::make_tuple(pixels, sizes, chunks);
}

// A new store for the same rows, games and frames as `old`, with the frames of a state. ValueError
// if it is damaged.
inline std::unique_ptr<TileStore> restored_tiles(const TileStore& old, int64_t added,
                                                 const py::object& pixels, const py::list& sizes,
                                                 const py::list& chunks) {
  const TensorView pixel_memory = view(pixels, "tiles");
  std::vector<TileStore::Chunks> games;
  for (int64_t game = 0; game < old.num_envs(); ++game) {
    const TensorView of_sizes = view(sizes[static_cast<size_t>(game)], "chunk_sizes");
    const TensorView of_chunks = view(chunks[static_cast<size_t>(game)], "chunks");
    const int64_t* const first = of_sizes.as<const int64_t>();
    games.push_back({std::vector<int64_t>(first, first + of_sizes.numel()),
                     of_chunks.as<const uint8_t>(), of_chunks.numel()});
  }
  auto restored = std::make_unique<TileStore>(old.rows(), old.num_envs(), old.shape());
  restored->restore(added, pixel_memory.as<const uint8_t>(), pixel_memory.numel() / kTileBytes,
                    games);
  return restored;
}

}  // namespace fastreplay
