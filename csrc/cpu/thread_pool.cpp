#include "cpu/thread_pool.h"

#include <chrono>

#ifdef __SSE2__
#include <immintrin.h>
#endif
#ifdef __linux__
#include <dlfcn.h>
#include <unistd.h>
#endif

namespace fastreplay {
namespace {

constexpr auto kSpinTime = std::chrono::microseconds(20);

inline void pause() {
#ifdef __SSE2__
  _mm_pause();
#endif
}

// A loop of n calls, which threads claim one by one.
struct Loop {
  const std::function<void(int64_t)>& work;
  int64_t n;
  std::atomic<int64_t> next{0};

  static void run(void* loop) {
    Loop& self = *static_cast<Loop*>(loop);
    for (int64_t i; (i = self.next.fetch_add(1, std::memory_order_relaxed)) < self.n;) self.work(i);
  }
};

// Entry points of the OpenMP runtime that torch has loaded. Linking to OpenMP would load a second
// one.
struct OpenMP {
  void (*parallel)(void (*)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
  int (*max_threads)() = nullptr;
#ifdef __linux__
  pid_t pid = getpid();
  OpenMP() {
    parallel = reinterpret_cast<decltype(parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    max_threads =
        reinterpret_cast<decltype(max_threads)>(dlsym(RTLD_DEFAULT, "omp_get_max_threads"));
  }
  bool usable() const { return parallel != nullptr && max_threads != nullptr && pid == getpid(); }
#else
  bool usable() const { return false; }
#endif
};

const OpenMP& openmp() {
  static const OpenMP runtime;
  return runtime;
}

}  // namespace

int openmp_threads() { return openmp().usable() ? openmp().max_threads() : 0; }

bool run_on_openmp(int64_t n, const std::function<void(int64_t)>& work) {
  if (!openmp().usable()) return false;
  Loop loop{work, n};
  openmp().parallel(Loop::run, &loop, 0, 0);  // 0 threads: the runtime's default
  return true;
}

ThreadPool::ThreadPool(int threads) {
  for (int i = 1; i < threads; ++i) threads_.emplace_back([this] { run_thread(); });
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::run(int64_t n, const std::function<void(int64_t)>& work) {
  if (!threads_.empty()) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      work_ = &work;
      n_ = n;
      next_.store(0, std::memory_order_relaxed);
      job_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < n;) work(i);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      work_ = nullptr;  // a thread that wakes from now on finds no job
    }
    while (busy_.load(std::memory_order_relaxed) != 0) pause();  // each has one call left at most
    const std::lock_guard<std::mutex> lock(mutex_);  // synchronizes with the last busy thread
  } else {
    for (int64_t i = 0; i < n; ++i) work(i);
  }
}

void ThreadPool::run_thread() {
  uint64_t done = 0;
  for (;;) {
    const auto sleep_at = std::chrono::steady_clock::now() + kSpinTime;
    while (job_.load(std::memory_order_acquire) == done &&
           std::chrono::steady_clock::now() < sleep_at) {
      pause();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, [&] { return stop_ || (work_ != nullptr && job_ != done); });
    if (stop_) return;
    done = job_;
    const std::function<void(int64_t)>& work = *work_;
    const int64_t n = n_;
    busy_.fetch_add(1, std::memory_order_relaxed);
    lock.unlock();
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < n;) work(i);
    lock.lock();
    busy_.fetch_sub(1, std::memory_order_relaxed);
  }
}

}  // namespace fastreplay
