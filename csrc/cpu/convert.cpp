#include "cpu/convert.h"

#include <algorithm>
#include <cstring>

#include "cpu/instructions.h"

namespace fastreplay {
namespace {

// Pixels of one block: seven blocks make an 84x84 frame, and interleaved bytes stay in the L1 cache
// until they are converted.
constexpr int kPixels = 1008;

// How far ahead a copy prefetches, in bytes: hardware prefetching stops at the end of a page.
constexpr int64_t kAhead = 4096;

struct Kernels {
  void (*copy_bytes)(const uint8_t* in, int64_t n, const uint8_t* next, uint8_t* out);
  void (*convert_bytes)(const uint8_t* in, int64_t n, Output output, float scale, void* out);
  void (*interleave_block)(const uint8_t* const* frames, int stack, int64_t first, int n,
                           uint8_t* out);
};

namespace plain {
#define FR_TARGET
#include "cpu/convert_kernels.inl"
#undef FR_TARGET
}  // namespace plain

#ifdef FR_X86
#define FR_F16C 1
namespace avx2 {
#define FR_TARGET FR_TARGET_AVX2
#include "cpu/convert_kernels.inl"
#undef FR_TARGET
}  // namespace avx2

namespace avx512 {
#define FR_TARGET FR_TARGET_AVX512
#include "cpu/convert_kernels.inl"
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
