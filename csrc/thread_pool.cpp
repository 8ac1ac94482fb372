#include "thread_pool.h"

namespace fastreplay {

ThreadPool::ThreadPool(int threads) {
  for (int i = 1; i < threads; ++i) threads_.emplace_back([this] { serve(); });
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
      ++job_;
    }
    wake_.notify_all();
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < n;) work(i);
    std::unique_lock<std::mutex> lock(mutex_);
    work_ = nullptr;  // whoever wakes only now finds nothing to do
    finished_.wait(lock, [this] { return busy_ == 0; });
  } else {
    for (int64_t i = 0; i < n; ++i) work(i);
  }
}

void ThreadPool::serve() {
  uint64_t done = 0;
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    wake_.wait(lock, [&] { return stop_ || (work_ != nullptr && job_ != done); });
    if (stop_) return;
    done = job_;
    const std::function<void(int64_t)>& work = *work_;
    const int64_t n = n_;
    ++busy_;
    lock.unlock();
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < n;) work(i);
    lock.lock();
    if (--busy_ == 0) finished_.notify_one();
  }
}

}  // namespace fastreplay
