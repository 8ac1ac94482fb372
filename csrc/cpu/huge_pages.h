#pragma once

#include <cstdint>

namespace fastreplay {

// Advises the kernel to back this memory with huge pages. Returns whether it accepted.
bool use_huge_pages(void* memory, int64_t bytes);

}  // namespace fastreplay
