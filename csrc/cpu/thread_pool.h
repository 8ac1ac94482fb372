// A few threads that share a loop with the caller.
//
// The caller works too and takes whatever no thread has taken, so a thread that wakes late costs
// nothing. Waking takes longer than a small job, so a thread looks out for the next job for
// kLookout before it sleeps. A pool does not survive fork(): the child's copy has no threads, and
// its owner makes a new one.
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
  std::condition_variable wake_;
  const std::function<void(int64_t)>* work_ = nullptr;  // null: nothing to do
  std::atomic<uint64_t> job_{0};                        // so that a thread joins a job once
  std::atomic<int> busy_{0};                            // threads inside the current job
  bool stop_ = false;
  std::atomic<int64_t> next_{0};
  int64_t n_ = 0;
  std::vector<std::thread> threads_;
};

// What ThreadPool::run does, on the OpenMP threads that torch computes with, which are awake while
// it does: threads beside them would fight them for the cores. Returns false, having done nothing,
// where torch has no GNU OpenMP and in the child of a fork(), where its threads are gone.
bool run_on_openmp(int64_t n, const std::function<void(int64_t)>& work);

// How many threads that would use: torch.get_num_threads(); 0 where it returns false.
int openmp_threads();

}  // namespace fastreplay
