// The inner loops of TileStore::read(). tile_store.cpp includes this file once for each instruction
// set, in a separate namespace each time, with
//   FR_TARGET   the attribute that lets a function use the instructions
//   FR_MASKS    defined if they have masked stores of bytes (AVX-512)

template <typename Tiles>
FR_TARGET static inline void write_tile(const Tiles& tiles, const uint8_t* pixels, uint8_t* out) {
  const int columns = tiles.columns();
  for (int row = 0; row < tiles.rows(); ++row, pixels += columns, out += tiles.width()) {
    if (columns >= kLeastTileRow) {
      copy_word(pixels, out);
      copy_word(pixels + columns - 8, out + columns - 8);
    } else {
      for (int i = 0; i < columns; ++i) out[i] = pixels[i];
    }
  }
}

#ifdef FR_MASKS
// One load; each row is stored from the whole tile.
FR_TARGET static inline void write_tile(const Tiles84x84& tiles, const uint8_t* pixels,
                                        uint8_t* out) {
  constexpr int kColumns = Tiles84x84::kColumns;
  constexpr uint32_t kRow = (1u << kColumns) - 1;
  const __m256i tile = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pixels));
  _mm256_mask_storeu_epi8(out, kRow, tile);
  _mm256_mask_storeu_epi8(out + tiles.width() - kColumns, kRow << kColumns, tile);
}
#endif

// Writes a tile with its left side in this column. Rows are copied as 16 bytes, of which the tile
// after any row has enough, and the tile to the right overwrites the excess. Where they do not fit
// into the frame's row, they are copied exactly.
template <typename Tiles>
FR_TARGET static inline void write_in_order(const Tiles& tiles, int64_t column,
                                            const uint8_t* pixels, uint8_t* out) {
#ifdef FR_MASKS
  if (std::is_same<Tiles, Tiles84x84>::value) return write_tile(tiles, pixels, out);
#endif
  if (column + 16 > tiles.width()) return write_tile(tiles, pixels, out);
  for (int row = 0; row < tiles.rows(); ++row) {
    std::memcpy(out + row * tiles.width(), pixels + row * tiles.columns(), 16);
  }
}

// Writes the frame with these ids.
template <typename Tiles>
FR_TARGET static void write_frame(const TileDictionary& dictionary, const Tiles& tiles,
                                  const int64_t* offsets, const uint32_t* ids, uint8_t* out) {
  constexpr int64_t kStripsAhead = 8;
  const int64_t across = tiles.across();
  for (int64_t y = 0; y < tiles.down(); ++y, ids += across, offsets += across) {
    if (y + kStripsAhead < tiles.down()) {
      for (int64_t x = 0; x < across; ++x) dictionary.prefetch(ids[x + kStripsAhead * across]);
    }
    for (int64_t x = 0; x < across; ++x) {
      const int64_t column = std::min(x * tiles.columns(), tiles.width() - tiles.columns());
      write_in_order(tiles, column, dictionary.pixels(ids[x]), out + offsets[0] + column);
    }
  }
}

// Writes n frames of a chunk. The first one has these ids; `change` is where the changes of the
// next one begin. The layout is a copy: the compiler would load it again after each write to `out`.
template <typename Tiles>
FR_TARGET static void write_frames(const TileDictionary& dictionary, const Tiles& tiles,
                                   ChunkLayout layout, const int64_t* offsets, const uint8_t* chunk,
                                   int first, int n, const uint32_t* ids, const uint8_t* change,
                                   uint8_t* out) {
  const int64_t bytes = tiles.bytes();
  const uint8_t* ahead = change;
  const auto prefetch_changed = [&](int frame) {
    if (frame == first + n) return;
    for (int64_t left = layout.changed(chunk, frame); left > 0; --left) {
      dictionary.prefetch(ChunkLayout::id_at(ahead));
      ahead += layout.change_bytes;
    }
  };
  prefetch_changed(first + 1);
  write_frame(dictionary, tiles, offsets, ids, out);
  for (int frame = first + 1; frame < first + n; ++frame, out += bytes) {
    prefetch_changed(frame + 1);
    std::memcpy(out + bytes, out, static_cast<size_t>(bytes));
    for (int64_t left = layout.changed(chunk, frame); left > 0; --left) {
      const int64_t offset = offsets[layout.position_at(change)];
      write_tile(tiles, dictionary.pixels(ChunkLayout::id_at(change)), out + bytes + offset);
      change += layout.change_bytes;
    }
  }
}
