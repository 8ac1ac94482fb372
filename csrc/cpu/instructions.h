// The vector instructions of this processor, found at run time: a binary built anywhere runs
// everywhere, and uses what is there.
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

// The set in use: at first the best one the processor has.
InstructionSet instruction_set();
// Uses another one, for tests and measurements. Throws if the processor lacks it.
void use_instruction_set(InstructionSet set);

}  // namespace fastreplay
