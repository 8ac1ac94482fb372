// The inner loops of sum_tree.cpp, which includes this file once for each instruction set, in a
// separate namespace each time, with
//   FR_TARGET   the attribute that lets a function use the instructions
//   FR_WIDTH    the number of 64-bit lanes of a vector: 8 (AVX-512), 4 (AVX2), 1 (plain)

// The child that owns the target: the number of entries <= target, minus one.
FR_TARGET static inline int choose_child(const uint64_t* node, uint64_t target) {
#if FR_WIDTH == 8
  const __m512i t = _mm512_set1_epi64(static_cast<int64_t>(target));
  const unsigned low = _mm512_cmple_epu64_mask(_mm512_load_si512(node), t);
  const unsigned high = _mm512_cmple_epu64_mask(_mm512_load_si512(node + 8), t);
  return __builtin_popcount(low | high << 8) - 1;
#elif FR_WIDTH == 4
  const __m256i t = _mm256_set1_epi64x(static_cast<int64_t>(target));
  int above = 0;  // one bit per entry above the target; the comparison is signed: sums are < 2^63
  for (int j = 0; j < 4; ++j) {
    const __m256i entries = _mm256_load_si256(reinterpret_cast<const __m256i*>(node) + j);
    above |= _mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpgt_epi64(entries, t))) << 4 * j;
  }
  return 15 - __builtin_popcount(above);
#else
  int child = -1;
  for (int j = 0; j < kFanOut; ++j) child += node[j] <= target;
  return child;
#endif
}

// The leaf that owns the target: the number of sums over leaves[0..j] that are <= target.
FR_TARGET static inline int choose_leaf(const uint32_t* leaves, uint64_t target) {
#if FR_WIDTH == 8
  const __m512i zero = _mm512_setzero_si512();
  const __m512i t = _mm512_set1_epi64(static_cast<int64_t>(target));
  const __m512i all = _mm512_load_si512(leaves);
  __m512i low = _mm512_cvtepu32_epi64(_mm512_castsi512_si256(all));
  __m512i high = _mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64(all, 1));
  low = _mm512_add_epi64(low, _mm512_alignr_epi64(low, zero, 7));
  high = _mm512_add_epi64(high, _mm512_alignr_epi64(high, zero, 7));
  low = _mm512_add_epi64(low, _mm512_alignr_epi64(low, zero, 6));
  high = _mm512_add_epi64(high, _mm512_alignr_epi64(high, zero, 6));
  low = _mm512_add_epi64(low, _mm512_alignr_epi64(low, zero, 4));
  high = _mm512_add_epi64(high, _mm512_alignr_epi64(high, zero, 4));
  high = _mm512_add_epi64(high, _mm512_permutexvar_epi64(_mm512_set1_epi64(7), low));
  const unsigned low_mask = _mm512_cmple_epu64_mask(low, t);
  const unsigned high_mask = _mm512_cmple_epu64_mask(high, t);
  return __builtin_popcount(low_mask | high_mask << 8);
#else
  uint64_t sum = 0;
  int leaf = 0;
  for (int j = 0; j < kFanOut; ++j) {
    sum += leaves[j];
    leaf += sum <= target;
  }
  return leaf;
#endif
}

// Adds delta to the entries after `child`.
FR_TARGET static inline void add_after(uint64_t* node, int child, uint64_t delta) {
#if FR_WIDTH == 8
  const unsigned mask = 0xFFFEu << child;
  const __m512i d = _mm512_set1_epi64(static_cast<int64_t>(delta));
  const __m512i low = _mm512_load_si512(node), high = _mm512_load_si512(node + 8);
  _mm512_store_si512(node, _mm512_mask_add_epi64(low, mask, low, d));
  _mm512_store_si512(node + 8, _mm512_mask_add_epi64(high, mask >> 8, high, d));
#elif FR_WIDTH == 4
  const __m256i d = _mm256_set1_epi64x(static_cast<int64_t>(delta));
  const __m256i chosen = _mm256_set1_epi64x(child);
  __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
  for (int j = 0; j < 4; ++j) {
    __m256i* entries = reinterpret_cast<__m256i*>(node) + j;
    const __m256i part = _mm256_and_si256(d, _mm256_cmpgt_epi64(lane, chosen));
    _mm256_store_si256(entries, _mm256_add_epi64(_mm256_load_si256(entries), part));
    lane = _mm256_add_epi64(lane, _mm256_set1_epi64x(4));
  }
#else
  for (int j = child + 1; j < kFanOut; ++j) node[j] += delta;
#endif
}

// Descends with n <= kBlock targets together, so that their cache misses overlap.
FR_TARGET static void find_block(const TreeLayout& layout, const uint64_t* inner,
                                 const uint32_t* leaves, uint64_t* targets, int n, int64_t* out) {
  uint32_t node[kBlock];
  for (int i = 0; i < n; ++i) node[i] = 0;
  for (int level = layout.levels - 1; level >= 0; --level) {
    const uint64_t* nodes = inner + layout.level_offset[level];
    const uint64_t* next = level > 0 ? inner + layout.level_offset[level - 1] : nullptr;
    for (int i = 0; i < n; ++i) {
      const uint64_t* entries = nodes + static_cast<int64_t>(node[i]) * kFanOut;
      const int child = choose_child(entries, targets[i]);
      targets[i] -= entries[child];
      node[i] = node[i] * kFanOut + static_cast<uint32_t>(child);
      const int64_t slot = static_cast<int64_t>(node[i]) * kFanOut;
      if (next != nullptr) {
        __builtin_prefetch(next + slot);
        __builtin_prefetch(next + slot + kFanOut / 2);
      } else {
        __builtin_prefetch(leaves + slot);
      }
    }
  }
  for (int i = 0; i < n; ++i) {
    const int64_t slot = static_cast<int64_t>(node[i]) * kFanOut;
    out[i] = slot + choose_leaf(leaves + slot, targets[i]);
  }
}

// Writes n <= kBlock leaves and adds their differences to the inner nodes, level by level, with the
// nodes prefetched. Returns the change of the total.
FR_TARGET static uint64_t set_block(const TreeLayout& layout, uint64_t* inner, uint32_t* leaves,
                                    const int64_t* indices, const uint32_t* values, int n) {
  uint64_t delta[kBlock];
  const int prefetched = layout.levels < 2 ? layout.levels : 2;  // levels; the others stay cached
  for (int i = 0; i < n; ++i) {
    __builtin_prefetch(leaves + indices[i], 1);
    for (int level = 0; level < prefetched; ++level) {
      uint64_t* entries =
          inner + layout.level_offset[level] + (indices[i] >> (level + 2) * kFanOutBits) * kFanOut;
      __builtin_prefetch(entries, 1);
      __builtin_prefetch(entries + kFanOut / 2, 1);
    }
  }
  for (int i = 0; i < n; ++i) {
    uint32_t* leaf = leaves + indices[i];
    delta[i] = static_cast<uint64_t>(values[i]) - *leaf;
    *leaf = values[i];
  }
  const int root = layout.levels - 1;
  for (int level = 0; level < root; ++level) {
    uint64_t* nodes = inner + layout.level_offset[level];
    for (int i = 0; i < n; ++i) {
      const int64_t entry = indices[i] >> (level + 1) * kFanOutBits;
      add_after(nodes + (entry & ~int64_t{kFanOut - 1}), static_cast<int>(entry & (kFanOut - 1)),
                delta[i]);
    }
  }
  // Every difference changes the root. They are first summed by child, then added in one pass.
  uint64_t sums[kFanOut] = {};
  for (int i = 0; i < n; ++i) sums[indices[i] >> (root + 1) * kFanOutBits] += delta[i];
  uint64_t* entries = inner + layout.level_offset[root];
  uint64_t change = 0;
  for (int child = 0; child < kFanOut; ++child) {
    entries[child] += change;
    change += sums[child];
  }
  return change;
}

// Random bits of samples first .. first + n - 1.
FR_TARGET static void random_block(uint64_t seed, uint64_t call, uint32_t first, int n,
                                   uint64_t* out) {
  for (int i = 0; i < n; ++i) out[i] = random64(seed, call, first + static_cast<uint32_t>(i), 0);
}

FR_TARGET static void quantise_block(const double* priorities, int n, double alpha, uint32_t* out) {
  if (alpha == 1.0) {  // tested outside the loop, so that the compiler vectorizes it
    for (int i = 0; i < n; ++i) out[i] = quantise(priorities[i], 1.0);
  } else {
    for (int i = 0; i < n; ++i) out[i] = quantise(priorities[i], alpha);
  }
}

FR_TARGET static void weight_block(const uint32_t* values, int n, uint32_t smallest, double beta,
                                   float* out) {
  for (int i = 0; i < n; ++i) out[i] = importance_weight(smallest, values[i], beta);
}

static const Kernels kernels = {find_block, set_block, random_block, quantise_block, weight_block};
