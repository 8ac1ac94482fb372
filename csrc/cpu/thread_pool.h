// A few threads that share a loop with the caller.
//
// The caller works too, and iterations are claimed one by one, so a thread that wakes late does not
// delay the others. Waking takes longer than a small job, so an idle thread spins for kSpinTime
// before it sleeps. A pool does not survive fork(): the child's copy has no threads, and its owner
// constructs a new pool.
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
  // `threads` includes the caller.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Calls work(i) once for each i in [0, n). Returns when all calls have returned.
  void run(int64_t n, const std::function<void(int64_t)>& work);

 private:
  void run_thread();

  std::mutex mutex_;
  std::condition_variable wake_;
  const std::function<void(int64_t)>* work_ = nullptr;  // null: there is no job
  std::atomic<uint64_t> job_{0};                        // counts jobs: a thread joins each job once
  std::atomic<int> busy_{0};                            // threads inside the current job
  bool stop_ = false;
  std::atomic<int64_t> next_{0};
  int64_t n_ = 0;
  std::vector<std::thread> threads_;
};

// ThreadPool::run on torch's OpenMP threads. They spin between torch's operations, and additional
// threads would compete with them for the cores. Returns false without running anything if torch
// has no GNU OpenMP, or in the child of a fork(), where torch's threads do not exist.
bool run_on_openmp(int64_t n, const std::function<void(int64_t)>& work);

// The number of threads of run_on_openmp: torch.get_num_threads(), or 0 if it returns false.
int openmp_threads();

}  // namespace fastreplay
