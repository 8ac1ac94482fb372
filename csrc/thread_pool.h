// A few sleeping threads that share a loop with the caller.
//
// The caller works too and takes whatever no thread has taken, so a thread that wakes late costs
// nothing. A pool does not survive fork(): the child's copy has no threads, and its owner makes a
// new one.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace fastreplay {

class ThreadPool {
 public:
  // `threads` counts the caller.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Calls work(i) once for each i in [0, n), and returns when all calls have.
  void run(int64_t n, const std::function<void(int64_t)>& work);

 private:
  void serve();

  std::mutex mutex_;
  std::condition_variable wake_, finished_;
  const std::function<void(int64_t)>* work_ = nullptr;  // null: nothing to do
  uint64_t job_ = 0;                                    // so that a thread joins a job once
  int busy_ = 0;                                        // threads inside the current job
  bool stop_ = false;
  std::atomic<int64_t> next_{0};
  int64_t n_ = 0;
  std::vector<std::thread> threads_;
};

}  // namespace fastreplay
