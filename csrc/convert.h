// Copies frames into a batch, changing their type or their memory format on the way.
//
//   contiguous      out[s][pixel] = f(frame s [pixel])      stack frames one after the other
//   channels last   out[pixel][s] = f(frame s [pixel])      a pixel's frames side by side
//
// f is the identity, or x -> x * scale in float32, rounded to nearest even for the 16-bit types:
// bit for bit what torch computes for (frames.float() * scale).to(dtype).
#pragma once

#include <cstdint>

namespace fastreplay {

enum class Output { kCopy, kFloat16, kBfloat16, kFloat32 };  // kCopy: bytes as they are

// Bytes that one byte of a frame becomes.
inline int expansion(Output output) {
  return output == Output::kCopy ? 1 : output == Output::kFloat32 ? 4 : 2;
}

// n elements (bytes, if kCopy) of one run of frames. A plain copy is bound by memory: as its end
// nears it asks for what is at `next`, which is not read here.
void convert(const uint8_t* in, int64_t n, const uint8_t* next, Output output, float scale,
             void* out);

// `stack` <= 8 frames of n bytes each, interleaved.
void interleave(const uint8_t* const* frames, int stack, int64_t n, Output output, float scale,
                void* out);

}  // namespace fastreplay
