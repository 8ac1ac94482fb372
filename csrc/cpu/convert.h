// Copies frames into a batch, converting their type or their memory format on the way (pixel.h,
// FrameOutput of batch.h).
#pragma once

#include <cstdint>

#include "core/pixel.h"

namespace fastreplay {

// Converts n bytes of consecutive frames. A plain copy is memory-bound: near its end it prefetches
// the memory at `next`, which it does not read.
void convert(const uint8_t* in, int64_t n, const uint8_t* next, Output output, float scale,
             void* out);

// Converts `stack` <= 8 frames of n bytes each to channels last.
void interleave(const uint8_t* const* frames, int stack, int64_t n, Output output, float scale,
                void* out);

}  // namespace fastreplay
