#include "convert.h"

#include <algorithm>
#include <cstring>

#include "instructions.h"

namespace fastreplay {
namespace {

// Pixels at a time: seven blocks make an 84x84 frame, and the bytes between stay in the first
// cache.
constexpr int kPixels = 1008;

// How far ahead a copy asks for memory: the processor's own prefetching stops where a page ends.
constexpr int64_t kAhead = 4096;

struct Kernels {
  void (*copy_bytes)(const uint8_t* in, int64_t n, const uint8_t* next, uint8_t* out);
  void (*convert_bytes)(const uint8_t* in, int64_t n, Output output, float scale, void* out);
  void (*interleave_block)(const uint8_t* const* frames, int stack, int64_t first, int n,
                           uint8_t* out);
};

inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// Finite numbers only; rounded to nearest even.
inline uint16_t bfloat16_bits(float x) {
  const uint32_t bits = float_bits(x);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// Finite numbers only; rounded to nearest even, too large ones to infinity.
inline uint16_t float16_bits(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  if (magnitude >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);  // 65520 and above
  if (magnitude < 0x38800000) {  // below 2^-14: a multiple of 2^-24; the sum's last bit is 2^-24
    float absolute;
    std::memcpy(&absolute, &magnitude, sizeof absolute);
    return static_cast<uint16_t>(sign | (float_bits(absolute + 0.5f) - float_bits(0.5f)));
  }
  const uint32_t rounded = magnitude + 0xFFF + (magnitude >> 13 & 1);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13));
}

namespace plain {
#define FR_TARGET
#include "convert_kernels.inl"
#undef FR_TARGET
}  // namespace plain

#ifdef FR_X86
#define FR_F16C 1
namespace avx2 {
#define FR_TARGET FR_TARGET_AVX2
#include "convert_kernels.inl"
#undef FR_TARGET
}  // namespace avx2

namespace avx512 {
#define FR_TARGET FR_TARGET_AVX512
#include "convert_kernels.inl"
#undef FR_TARGET
}  // namespace avx512
#endif

const Kernels& kernels() {
#ifdef FR_X86
  if (instruction_set() == InstructionSet::kAvx512) return avx512::kernels;
  if (instruction_set() == InstructionSet::kAvx2) return avx2::kernels;
#endif
  return plain::kernels;
}

}  // namespace

void convert(const uint8_t* in, int64_t n, const uint8_t* next, Output output, float scale,
             void* out) {
  if (output == Output::kCopy) {
    kernels().copy_bytes(in, n, next, static_cast<uint8_t*>(out));
  } else {
    kernels().convert_bytes(in, n, output, scale, out);
  }
}

void interleave(const uint8_t* const* frames, int stack, int64_t n, Output output, float scale,
                void* out) {
  const Kernels& k = kernels();
  uint8_t block[kPixels * 8];
  uint8_t* to = static_cast<uint8_t*>(out);
  for (int64_t first = 0; first < n; first += kPixels) {
    const int count = static_cast<int>(std::min<int64_t>(kPixels, n - first));
    if (output == Output::kCopy) {
      k.interleave_block(frames, stack, first, count, to);
    } else {
      k.interleave_block(frames, stack, first, count, block);
      k.convert_bytes(block, int64_t{count} * stack, output, scale, to);
    }
    to += count * stack * expansion(output);
  }
}

}  // namespace fastreplay
