#include "cpu/huge_pages.h"

#include <new>

#ifdef __linux__
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace fastreplay {
namespace {

#ifdef __linux__
// The address of a number of huge pages, which stands in the low bits: they are 0 in the address.
void* merge(void* pages) {
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, Linux 6.1; older kernels refuse it
  const uintptr_t value = reinterpret_cast<uintptr_t>(pages), number = value % kHugePage;
  (void)madvise(reinterpret_cast<void*>(value - number), number * kHugePage, kCollapse);
  return nullptr;
}
#endif

// Merges the small pages of this memory, a number of huge pages, in a thread of its own. If there
// is none, the kernel merges them some time later. If the memory is freed meanwhile, nothing
// happens, or other pages of the process are merged.
void merge_pages(void* memory, int64_t bytes) {
#ifdef __linux__
  constexpr size_t kStack = 1 << 20;
  pthread_attr_t attributes;
  if (pthread_attr_init(&attributes) != 0) return;
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  pthread_attr_setstacksize(&attributes, kStack);
  pthread_t thread;
  uint8_t* const pages = static_cast<uint8_t*>(memory) + bytes / kHugePage;
  (void)pthread_create(&thread, &attributes, merge, pages);
  pthread_attr_destroy(&attributes);
#else
  (void)memory;
  (void)bytes;
#endif
}

}  // namespace

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

Memory allocate(int64_t bytes) {
  const bool huge = bytes % kHugePage == 0;
  const int64_t alignment = huge ? kHugePage : 64;
  const int64_t whole = (bytes + alignment - 1) / alignment * alignment;
  void* const memory =
      std::aligned_alloc(static_cast<size_t>(alignment), static_cast<size_t>(whole));
  if (memory == nullptr) throw std::bad_alloc();
  Memory owner(static_cast<uint8_t*>(memory));
  if (huge) {
    for (int64_t page = 0; page < whole; page += kHugePage) owner.get()[page] = 0;
    use_huge_pages(memory, whole);
    merge_pages(memory, whole);
  }
  return owner;
}

}  // namespace fastreplay
