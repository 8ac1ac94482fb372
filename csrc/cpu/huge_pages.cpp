#include "cpu/huge_pages.h"

#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastreplay {
namespace {

#if defined(__linux__) && defined(MADV_HUGEPAGE)
constexpr int kHuge = MADV_HUGEPAGE, kSmall = MADV_NOHUGEPAGE;

// Advises the kernel about the whole pages of this memory. Returns whether it accepted.
bool advise(void* memory, int64_t bytes, int advice) {
  const uintptr_t page = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / page * page;
  return begin < end && madvise(reinterpret_cast<void*>(begin), end - begin, advice) == 0;
}
#else
constexpr int kHuge = 0, kSmall = 0;

bool advise(void*, int64_t, int) { return false; }
#endif

}  // namespace

bool use_huge_pages(void* memory, int64_t bytes) { return advise(memory, bytes, kHuge); }

Memory allocate(int64_t bytes) {
  const bool huge = bytes % kHugePage == 0;
  const int64_t alignment = huge ? kHugePage : 64;
  const int64_t whole = (bytes + alignment - 1) / alignment * alignment;
  void* const memory =
      std::aligned_alloc(static_cast<size_t>(alignment), static_cast<size_t>(whole));
  if (memory == nullptr) throw std::bad_alloc();
  Memory owner(static_cast<uint8_t*>(memory));
  if (huge && advise(memory, whole, kSmall)) {
    // Once one small page is there, the others around it come small too.
    for (int64_t page = 0; page < whole; page += kHugePage) owner.get()[page] = 0;
    advise(memory, whole, kHuge);
  }
  return owner;
}

}  // namespace fastreplay
