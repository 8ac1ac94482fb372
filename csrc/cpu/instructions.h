// The vector instructions of this processor, detected at run time: a binary runs on any processor
// of its architecture and uses what it has.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define FR_X86 1
#include <immintrin.h>
#define FR_TARGET_AVX2 __attribute__((target("avx2,f16c,bmi,bmi2,popcnt")))
#define FR_TARGET_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c,bmi,bmi2,popcnt")))
#endif

namespace fastreplay {

enum class InstructionSet { kPlain = 0, kAvx2 = 1, kAvx512 = 2 };

// The set in use, initially the best one that the processor supports.
InstructionSet instruction_set();
// Selects another one, for tests and measurements. Throws std::invalid_argument (ValueError in
// Python) if the processor lacks it.
void use_instruction_set(InstructionSet set);

}  // namespace fastreplay
