// The inner loops of convert.cpp, which includes this file once for each instruction set, in a
// separate namespace each time, with
//   FR_TARGET   the attribute that lets a function use the instructions
//   FR_F16C     defined if the instruction set can convert to float16

FR_TARGET static inline void to_float16(const float* in, int n, uint16_t* out) {
#ifdef FR_F16C
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), half);
  }
  for (; i < n; ++i) out[i] = float16_bits(in[i]);
#else
  for (int i = 0; i < n; ++i) out[i] = float16_bits(in[i]);
#endif
}

FR_TARGET static void copy_bytes(const uint8_t* in, int64_t n, const uint8_t* next, uint8_t* out) {
  typedef uint8_t Vector __attribute__((vector_size(32), aligned(1), may_alias));
  int64_t i = 0;
  for (; i + 256 <= n; i += 256) {
    const uint8_t* ahead = i + kAhead < n ? in + i + kAhead : next + (i + kAhead - n);
    for (int byte = 0; byte < 256; byte += 64) __builtin_prefetch(ahead + byte);
    const Vector* from = reinterpret_cast<const Vector*>(in + i);
    Vector* to = reinterpret_cast<Vector*>(out + i);
    const Vector v0 = from[0], v1 = from[1], v2 = from[2], v3 = from[3];
    const Vector v4 = from[4], v5 = from[5], v6 = from[6], v7 = from[7];
    to[0] = v0, to[1] = v1, to[2] = v2, to[3] = v3;
    to[4] = v4, to[5] = v5, to[6] = v6, to[7] = v7;
  }
  std::memcpy(out + i, in + i, static_cast<size_t>(n - i));
}

FR_TARGET static void convert_bytes(const uint8_t* in, int64_t n, Output output, float scale,
                                    void* out) {
  if (output == Output::kFloat32) {
    float* to = static_cast<float*>(out);
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(in[i]) * scale;
  } else if (output == Output::kBfloat16) {
    uint16_t* to = static_cast<uint16_t*>(out);
    for (int64_t i = 0; i < n; ++i) to[i] = bfloat16_bits(static_cast<float>(in[i]) * scale);
  } else {
    uint16_t* to = static_cast<uint16_t*>(out);
    float block[kPixels];
    for (int64_t first = 0; first < n; first += kPixels) {
      const int count = static_cast<int>(n - first < kPixels ? n - first : kPixels);
      for (int i = 0; i < count; ++i) block[i] = static_cast<float>(in[first + i]) * scale;
      to_float16(block, count, to + first);
    }
  }
}

template <int kStack>
FR_TARGET static void interleave_bytes(const uint8_t* const* frames, int64_t first, int n,
                                       uint8_t* out) {
  const uint8_t* from[kStack];
  for (int s = 0; s < kStack; ++s) from[s] = frames[s] + first;
  for (int i = 0; i < n; ++i) {
    for (int s = 0; s < kStack; ++s) out[i * kStack + s] = from[s][i];
  }
}

#ifdef __SSE2__
// Four frames, 16 pixels at a time: bytes are unpacked to pairs, pairs to quadruples.
template <>
FR_TARGET void interleave_bytes<4>(const uint8_t* const* frames, int64_t first, int n,
                                   uint8_t* out) {
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    __m128i row[4];
    for (int s = 0; s < 4; ++s) {
      row[s] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(frames[s] + first + i));
    }
    const __m128i low01 = _mm_unpacklo_epi8(row[0], row[1]);
    const __m128i low23 = _mm_unpacklo_epi8(row[2], row[3]);
    const __m128i high01 = _mm_unpackhi_epi8(row[0], row[1]);
    const __m128i high23 = _mm_unpackhi_epi8(row[2], row[3]);
    __m128i* to = reinterpret_cast<__m128i*>(out + i * 4);
    _mm_storeu_si128(to, _mm_unpacklo_epi16(low01, low23));
    _mm_storeu_si128(to + 1, _mm_unpackhi_epi16(low01, low23));
    _mm_storeu_si128(to + 2, _mm_unpacklo_epi16(high01, high23));
    _mm_storeu_si128(to + 3, _mm_unpackhi_epi16(high01, high23));
  }
  for (; i < n; ++i) {
    for (int s = 0; s < 4; ++s) out[i * 4 + s] = frames[s][first + i];
  }
}
#endif

FR_TARGET static void interleave_block(const uint8_t* const* frames, int stack, int64_t first,
                                       int n, uint8_t* out) {
  static void (*const by_stack[8])(const uint8_t* const*, int64_t, int, uint8_t*) = {
      interleave_bytes<1>, interleave_bytes<2>, interleave_bytes<3>, interleave_bytes<4>,
      interleave_bytes<5>, interleave_bytes<6>, interleave_bytes<7>, interleave_bytes<8>};
  by_stack[stack - 1](frames, first, n, out);
}

static const Kernels kernels = {copy_bytes, convert_bytes, interleave_block};
