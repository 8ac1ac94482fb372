#include "cpu/instructions.h"

#include <stdexcept>

namespace fastreplay {
namespace {

InstructionSet best_set() {
#ifdef FR_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2")) {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      return InstructionSet::kAvx512;
    }
    return InstructionSet::kAvx2;
  }
#endif
  return InstructionSet::kPlain;
}

InstructionSet in_use = best_set();

}  // namespace

InstructionSet instruction_set() { return in_use; }

void use_instruction_set(InstructionSet set) {
  if (static_cast<int>(set) > static_cast<int>(best_set())) {
    throw std::invalid_argument("this processor lacks these vector instructions");
  }
  in_use = set;
}

}  // namespace fastreplay
