// Memory on huge pages: random reads miss the TLB less often.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace fastreplay {

constexpr int64_t kHugePage = int64_t{1} << 21;

// Advises the kernel to back this memory with huge pages. Returns whether it accepted.
bool use_huge_pages(void* memory, int64_t bytes);

struct Free {
  void operator()(uint8_t* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<uint8_t, Free>;

// Uninitialised memory, aligned to cache lines, or to huge pages if it is a multiple of them. Its
// pages are small when they are first touched, because the first touch of a huge page can take
// milliseconds. The kernel merges them some time later. Throws std::bad_alloc.
Memory allocate(int64_t bytes);

}  // namespace fastreplay
