// Copies frames into a batch, changing their type or their memory format on the way.
//
//   contiguous      out[s][pixel] = f(frame s [pixel])      stack frames one after the other
//   channels last   out[pixel][s] = f(frame s [pixel])      a pixel's frames side by side
//
// f is the identity, or x -> x * scale in float32, rounded to nearest even for the 16-bit types:
// bit for bit what torch computes for (frames.float() * scale).to(dtype).
#pragma once

#include <cstdint>
#include <cstring>

#include "core/philox.h"

namespace fastreplay {

enum class Output { kCopy, kFloat16, kBfloat16, kFloat32 };  // kCopy: bytes as they are

// Bytes that one byte of a frame becomes.
FR_HOST_DEVICE constexpr int expansion(Output output) {
  return output == Output::kCopy ? 1 : output == Output::kFloat32 ? 4 : 2;
}

FR_HOST_DEVICE inline uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

// Finite numbers only; rounded to nearest even.
FR_HOST_DEVICE inline uint16_t bfloat16_bits(float x) {
  const uint32_t bits = float_bits(x);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// Finite numbers only; rounded to nearest even, too large ones to infinity.
FR_HOST_DEVICE inline uint16_t float16_bits(float x) {
#ifdef __CUDA_ARCH__
  uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
  return half;
#else
  const uint32_t bits = float_bits(x);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  if (magnitude >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);  // 65520 and above
  if (magnitude < 0x38800000) {  // below 2^-14: a multiple of 2^-24; the sum's last bit is 2^-24
    float absolute;
    memcpy(&absolute, &magnitude, sizeof absolute);
    return static_cast<uint16_t>(sign | (float_bits(absolute + 0.5f) - float_bits(0.5f)));
  }
  const uint32_t rounded = magnitude + 0xFFF + (magnitude >> 13 & 1);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13));
#endif
}

// n elements (bytes, if kCopy) of one run of frames. A plain copy is bound by memory: as its end
// nears it asks for what is at `next`, which is not read here.
void convert(const uint8_t* in, int64_t n, const uint8_t* next, Output output, float scale,
             void* out);

// `stack` <= 8 frames of n bytes each, interleaved.
void interleave(const uint8_t* const* frames, int stack, int64_t n, Output output, float scale,
                void* out);

}  // namespace fastreplay
