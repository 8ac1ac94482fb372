#include "cpu/huge_pages.h"

#ifdef __unix__
#include <sys/mman.h>
#endif

namespace fastreplay {

bool use_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / page * page;
  return begin < end && madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE) == 0;
#else
  (void)memory;
  (void)bytes;
  return false;
#endif
}

}  // namespace fastreplay
