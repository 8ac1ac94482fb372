// How a byte x of a frame is written to a batch: unchanged, or as x * scale in float32, float16 or
// bfloat16.
//
// Products are computed in float32 and rounded to nearest even: bit for bit what torch computes for
// (frames.float() * scale).to(dtype).
#pragma once

#include <cstdint>
#include <cstring>

#include "core/philox.h"

namespace fastreplay {

enum class Output { kCopy, kFloat16, kBfloat16, kFloat32 };  // kCopy: bytes, unchanged

// Output bytes for each byte of a frame.
FR_HOST_DEVICE constexpr int expansion(Output output) {
  return output == Output::kCopy ? 1 : output == Output::kFloat32 ? 4 : 2;
}

FR_HOST_DEVICE inline uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

// x is finite. Rounds to nearest even.
FR_HOST_DEVICE inline uint16_t bfloat16_bits(float x) {
  const uint32_t bits = float_bits(x);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// x is finite. Rounds to nearest even; values too large for float16 become infinity.
FR_HOST_DEVICE inline uint16_t float16_bits(float x) {
#ifdef __CUDA_ARCH__
  uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
  return half;
#else
  const uint32_t bits = float_bits(x);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  if (magnitude >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);  // 65520 and above
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 rounds to a multiple of 2^-24
    float absolute;
    memcpy(&absolute, &magnitude, sizeof absolute);
    return static_cast<uint16_t>(sign | (float_bits(absolute + 0.5f) - float_bits(0.5f)));
  }
  const uint32_t rounded = magnitude + 0xFFF + (magnitude >> 13 & 1);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13));
#endif
}

}  // namespace fastreplay
