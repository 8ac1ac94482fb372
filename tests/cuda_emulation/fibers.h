// The execution model of CUDA on one CPU thread: grids of blocks of threads, each thread a fiber.
//
//   scheduler --swapcontext--> fiber (thread t of block b) --suspend()--> scheduler ...
//
//   - A fiber runs until it waits at a barrier or a warp operation, or yields at an atomic.
//   - kConcurrentBlocks blocks run at a time. The order of blocks is shuffled for each launch and
//     the order of threads for each pass, so code that depends on an order fails sooner or later.
//   - If no fiber of a running block can continue, some threads wait at a barrier that others never
//     reach: the process aborts.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

struct dim3 {
  dim3(unsigned x = 1, unsigned y = 1) : x(x), y(y) {}
  unsigned x, y;
};

namespace emulation {

constexpr size_t kStackBytes = 128 << 10;
constexpr unsigned kConcurrentBlocks = 3;

// A reusable barrier. The last member to arrive starts the next round.
struct Barrier {
  int members = 0, arrived = 0;
  uint64_t round = 0;
};

struct Warp {
  Barrier barrier;
  // What each lane contributed to a warp operation, in this round and in the previous one, which
  // slower lanes may still be reading.
  uint64_t values[2][32];
};

struct Block {
  dim3 index;
  int running = 0;  // threads that have not returned
  Barrier barrier;
  int votes[2] = {0, 0};  // of __syncthreads_or, by round as in Warp
  std::vector<Warp> warps;
  std::map<const void*, std::unique_ptr<char[]>> shared;  // by declaration
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  Block* block;
  unsigned thread;
  bool is_done;
  const Barrier* waits_at;  // null: can run
  uint64_t round;           // of that barrier: the fiber waits until it ends

  bool can_run() const { return !is_done && (waits_at == nullptr || waits_at->round != round); }
};

struct Scheduler {
  ucontext_t context;
  Fiber* current = nullptr;
  dim3 grid, block;
  std::function<void()> kernel;
  std::vector<std::unique_ptr<Fiber>> fibers;  // reused from launch to launch
  std::mt19937 random{1};
};
inline Scheduler scheduler;

// Returns to the scheduler, which resumes this fiber in a later pass.
inline void suspend() { swapcontext(&scheduler.current->context, &scheduler.context); }

// Called before every atomic, so that other threads may come first.
inline void maybe_suspend() {
  if (scheduler.random() % 8 == 0) suspend();
}

inline void run_fiber() {
  scheduler.kernel();
  scheduler.current->is_done = true;
  --scheduler.current->block->running;
  suspend();
}

// Waits for all members. Returns the round that has ended.
inline uint64_t wait_at(Barrier& barrier) {
  const uint64_t round = barrier.round;
  if (++barrier.arrived == barrier.members) {
    barrier.arrived = 0;
    ++barrier.round;
    return round;
  }
  Fiber* const self = scheduler.current;
  self->waits_at = &barrier;
  self->round = round;
  suspend();
  self->waits_at = nullptr;
  return round;
}

inline Warp& warp() { return scheduler.current->block->warps[scheduler.current->thread / 32]; }
inline int lane() { return static_cast<int>(scheduler.current->thread % 32); }

// all[i] = the value of lane i, for every lane of the warp.
template <typename T>
void exchange(T value, T* all) {
  Warp& w = warp();
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  uint64_t* const values = w.values[w.barrier.round % 2];
  values[lane()] = bits;
  wait_at(w.barrier);
  for (int i = 0; i < w.barrier.members; ++i) std::memcpy(&all[i], &values[i], sizeof value);
}

// This block's shared variable of one declaration. `Key` is the type of a lambda in the
// declaration, which makes it unique.
template <typename T, typename Key>
T& shared(Key) {
  static const char key = 0;
  std::unique_ptr<char[]>& memory = scheduler.current->block->shared[&key];
  if (memory == nullptr) {
    memory.reset(new char[sizeof(T)]);
    std::memset(memory.get(), 0xA5, sizeof(T));  // garbage, as on a GPU
  }
  return *reinterpret_cast<T*>(memory.get());
}

// Runs blocks order[first] to order[first + count - 1] side by side.
inline void run_blocks(unsigned first, unsigned count, const std::vector<unsigned>& order) {
  Scheduler& s = scheduler;
  const unsigned threads = s.block.x;
  std::vector<Block> blocks(count);
  while (s.fibers.size() < count * threads) s.fibers.push_back(std::make_unique<Fiber>());
  for (unsigned b = 0; b < count; ++b) {
    const unsigned flat = order[first + b];
    blocks[b].index = dim3(flat % s.grid.x, flat / s.grid.x);
    blocks[b].running = blocks[b].barrier.members = static_cast<int>(threads);
    blocks[b].warps.resize((threads + 31) / 32);
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& fiber = *s.fibers[b * threads + t];
      ++blocks[b].warps[t / 32].barrier.members;
      fiber.block = &blocks[b];
      fiber.thread = t;
      fiber.is_done = false;
      fiber.waits_at = nullptr;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, run_fiber, 0);
    }
  }
  for (bool is_running = true; is_running;) {
    is_running = false;
    bool has_moved = false;
    const unsigned shift = s.random() % count;
    for (unsigned i = 0; i < count; ++i) {
      const unsigned b = (i + shift) % count;
      is_running |= blocks[b].running > 0;
      // An odd stride visits each of 2^k threads once, in another order in each pass.
      const unsigned start = s.random(), stride = s.random() | 1;
      for (unsigned j = 0; j < threads && blocks[b].running > 0; ++j) {
        Fiber& fiber = *s.fibers[b * threads + (start + j * stride) % threads];
        if (!fiber.can_run()) continue;
        has_moved = true;
        s.current = &fiber;
        swapcontext(&s.context, &fiber.context);
      }
    }
    if (is_running && !has_moved) {
      std::fprintf(stderr, "emulated CUDA: deadlock, some threads never reach a barrier\n");
      std::abort();
    }
  }
}

// Runs a whole grid; `kernel` is what one thread does.
inline void run_grid(const std::function<void()>& kernel, dim3 grid, int threads) {
  scheduler.grid = grid;
  scheduler.block = dim3(static_cast<unsigned>(threads));
  scheduler.kernel = kernel;
  std::vector<unsigned> order(grid.x * grid.y);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), scheduler.random);
  const unsigned blocks = static_cast<unsigned>(order.size());
  for (unsigned first = 0; first < blocks; first += kConcurrentBlocks) {
    run_blocks(first, std::min(kConcurrentBlocks, blocks - first), order);
  }
}

}  // namespace emulation
