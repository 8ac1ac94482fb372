// Just enough of CUDA to run fastreplay's kernels on a CPU, so that their tests need no GPU.
//
// The sources of csrc/cuda, compiled as C++ with this header in place of CUDA's:
//   - each thread of a block is a fiber; warp operations and barriers switch between them;
//   - a few blocks run side by side, in an order that is shuffled anew at each launch, and threads
//     give way at atomics now and then: what depends on the order shows;
//   - a barrier that not all threads reach ends the process;
//   - a stream is a queue of launches, copies and events. Its work runs late and, between streams,
//     in any order that the events allow: what nobody waits for has not happened yet;
//   - a captured stream makes a graph of launches; whatever would break a capture on CUDA is an
//     error or ends the process.
// tests/emulated.py drives streams and graphs by the functions at the end.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(threads)

struct dim3 {
  dim3(unsigned x = 1, unsigned y = 1) : x(x), y(y) {}
  unsigned x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct EmulatedWork {
  std::function<bool()> ready;
  std::function<void()> run;
};

struct EmulatedStream {
  std::deque<EmulatedWork> work;
  std::vector<std::function<void()>>* graph = nullptr;  // not null: being captured
  bool slow = false;                                    // runs only when somebody waits for it
};

namespace emulation {

using Queue = EmulatedStream;

constexpr size_t kStack = 128 << 10;
constexpr int kBlocksAtOnce = 3;

// Threads that meet. Whoever comes last opens the next round.
struct Meeting {
  int members = 0, arrived = 0;
  uint64_t round = 0;
};

struct Warp {
  Meeting meeting;
  uint64_t values[2][32];  // of this round and the one before, which some may still be reading
};

struct Block {
  dim3 index;
  int running = 0;
  Meeting meeting;
  int votes[2] = {0, 0};
  std::vector<Warp> warps;
  std::map<const void*, std::unique_ptr<char[]>> shared;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  Block* block;
  unsigned thread;
  bool done;
  const Meeting* waits_for;  // null: can run
  uint64_t round;
  bool can_run() const { return !done && (waits_for == nullptr || waits_for->round != round); }
};

struct Machine {
  ucontext_t scheduler;
  Fiber* fiber = nullptr;
  dim3 grid, block;
  std::function<void()> kernel;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::mt19937 random{1};
};
inline Machine machine;

inline void give_way() { swapcontext(&machine.fiber->context, &machine.scheduler); }

inline void run_fiber() {
  machine.kernel();
  machine.fiber->done = true;
  --machine.fiber->block->running;
  give_way();
}

// Returns the round that was met in.
inline uint64_t meet(Meeting& meeting) {
  const uint64_t round = meeting.round;
  if (++meeting.arrived == meeting.members) {
    meeting.arrived = 0;
    ++meeting.round;
    return round;
  }
  Fiber* const self = machine.fiber;
  self->waits_for = &meeting;
  self->round = round;
  give_way();
  self->waits_for = nullptr;
  return round;
}

inline Warp& warp() { return machine.fiber->block->warps[machine.fiber->thread / 32]; }
inline int lane() { return static_cast<int>(machine.fiber->thread % 32); }

// All lanes' values.
template <typename T>
void exchange(T value, T* all) {
  Warp& w = warp();
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  uint64_t* const values = w.values[w.meeting.round % 2];
  values[lane()] = bits;
  meet(w.meeting);
  for (int i = 0; i < w.meeting.members; ++i) std::memcpy(&all[i], &values[i], sizeof value);
}

template <typename T, typename Key>
T& shared(Key) {
  static const char key = 0;  // one for each place in the sources
  std::unique_ptr<char[]>& memory = machine.fiber->block->shared[&key];
  if (memory == nullptr) {
    memory.reset(new char[sizeof(T)]);
    std::memset(memory.get(), 0xA5, sizeof(T));  // nothing may rely on zeros
  }
  return *reinterpret_cast<T*>(memory.get());
}

inline void run_blocks(unsigned first, unsigned count, const std::vector<unsigned>& order) {
  Machine& m = machine;
  const unsigned threads = m.block.x;
  std::vector<Block> blocks(count);
  while (m.fibers.size() < count * threads) m.fibers.push_back(std::make_unique<Fiber>());
  for (unsigned b = 0; b < count; ++b) {
    const unsigned number = order[first + b];
    blocks[b].index = dim3(number % m.grid.x, number / m.grid.x);
    blocks[b].running = blocks[b].meeting.members = static_cast<int>(threads);
    blocks[b].warps.resize((threads + 31) / 32);
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& fiber = *m.fibers[b * threads + t];
      ++blocks[b].warps[t / 32].meeting.members;
      fiber.block = &blocks[b];
      fiber.thread = t;
      fiber.done = false;
      fiber.waits_for = nullptr;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, run_fiber, 0);
    }
  }
  for (bool left = true; left;) {
    left = false;
    bool moved = false;
    const unsigned shift = m.random() % count;
    for (unsigned i = 0; i < count; ++i) {
      const unsigned b = (i + shift) % count;
      left |= blocks[b].running > 0;
      const unsigned start = m.random(), stride = m.random() | 1;  // any order of 2^k threads
      for (unsigned j = 0; j < threads && blocks[b].running > 0; ++j) {
        Fiber& fiber = *m.fibers[b * threads + (start + j * stride) % threads];
        if (!fiber.can_run()) continue;
        moved = true;
        m.fiber = &fiber;
        swapcontext(&m.scheduler, &fiber.context);
      }
    }
    if (left && !moved) {
      std::fprintf(stderr, "emulated CUDA: a barrier that not all threads reach\n");
      std::abort();
    }
  }
}

// ------------------------------------------------------------------------ streams, events, graphs

struct Streams {
  std::vector<std::unique_ptr<Queue>> all;
  std::mt19937 random{2};
  int capturing = 0, beside_captures = 0;
  int64_t waits = 0;     // of the host, for work that had not been done yet
  int64_t launches = 0;  // of kernels, captured ones included
};
inline Streams streams;

inline Queue& queue_of(Queue* handle) {
  static Queue* const first = new Queue;  // the default stream
  if (streams.all.empty()) streams.all.emplace_back(first);
  return handle == nullptr ? *first : *handle;
}

inline bool step(Queue& queue) {
  if (queue.work.empty() || !queue.work.front().ready()) return false;
  const EmulatedWork work = std::move(queue.work.front());
  queue.work.pop_front();
  work.run();
  return true;
}

// Does one piece of work that could be next; false if there is none.
inline bool step_any(bool slow_too) {
  const size_t n = streams.all.size(), start = streams.random() % std::max<size_t>(n, 1);
  for (size_t i = 0; i < n; ++i) {
    Queue& queue = *streams.all[(start + i) % n];
    if ((slow_too || !queue.slow) && step(queue)) return true;
  }
  return false;
}

// The host waits for something.
template <typename Done>
void wait_until(Done done) {
  if (!done()) ++streams.waits;
  while (!done()) {
    if (step_any(true)) continue;
    std::fprintf(stderr, "emulated CUDA: a wait that never ends\n");
    std::abort();
  }
}

inline void drain(Queue& queue) {
  wait_until([&] { return queue.work.empty(); });
}

inline void enqueue(
    Queue& queue, std::function<void()> run, std::function<bool()> ready = [] { return true; }) {
  queue.work.push_back({std::move(ready), std::move(run)});
  for (unsigned steps = streams.random() % 3; steps > 0 && step_any(false); --steps) {
  }
}

inline void run_kernel(const std::function<void()>& kernel, dim3 grid, int threads) {
  machine.grid = grid;
  machine.block = dim3(static_cast<unsigned>(threads));
  machine.kernel = kernel;
  std::vector<unsigned> order(grid.x * grid.y);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), machine.random);
  const unsigned all = static_cast<unsigned>(order.size());
  for (unsigned first = 0; first < all; first += kBlocksAtOnce) {
    run_blocks(first, std::min<unsigned>(kBlocksAtOnce, all - first), order);
  }
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, Queue* stream,
            const Arguments&... arguments) {
  const std::tuple<Arguments...> values(arguments...);
  const std::function<void()> thread = [kernel, values] { std::apply(kernel, values); };
  const std::function<void()> run = [=] { run_kernel(thread, grid, threads); };
  Queue& queue = queue_of(stream);
  ++streams.launches;
  if (queue.graph != nullptr) {
    queue.graph->push_back(run);
  } else {
    enqueue(queue, run);
  }
}

// Before every atomic: another thread may come first.
inline void perhaps_give_way() {
  if (machine.random() % 8 == 0) give_way();
}

}  // namespace emulation

#define threadIdx (dim3(emulation::machine.fiber->thread))
#define blockIdx (emulation::machine.fiber->block->index)
#define blockDim (emulation::machine.block)
#define gridDim (emulation::machine.grid)

inline void __syncthreads() { emulation::meet(emulation::machine.fiber->block->meeting); }
inline int __syncthreads_or(int vote) {
  emulation::Block& block = *emulation::machine.fiber->block;
  int& votes = block.votes[block.meeting.round % 2];
  if (block.meeting.arrived == 0) votes = 0;
  votes |= vote;
  emulation::meet(block.meeting);
  return votes;
}
inline void __syncwarp(unsigned = 0) { emulation::meet(emulation::warp().meeting); }
inline void __threadfence() {}

template <typename T>
T __shfl_sync(unsigned, T value, int from) {
  T all[32];
  emulation::exchange(value, all);
  return all[from];
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int distance) {
  T all[32];
  emulation::exchange(value, all);
  return emulation::lane() >= distance ? all[emulation::lane() - distance] : value;
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  bool all[32] = {};
  emulation::exchange(vote, all);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<unsigned>(all[i]) << i;
  return bits;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

template <typename T, typename F>
T emulated_atomic(T* to, F change) {
  emulation::perhaps_give_way();
  const T before = *to;
  *to = change(before);
  return before;
}
template <typename T>
T atomicAdd(T* to, T x) {
  return emulated_atomic(to, [x](T old) { return static_cast<T>(old + x); });
}
inline unsigned atomicInc(unsigned* to, unsigned most) {
  return emulated_atomic(to, [most](unsigned old) { return old >= most ? 0 : old + 1; });
}
template <typename T>
T atomicMax(T* to, T x) {
  return emulated_atomic(to, [x](T old) { return std::max(old, x); });
}
template <typename T>
T atomicMin(T* to, T x) {
  return emulated_atomic(to, [x](T old) { return std::min(old, x); });
}
template <typename T>
T atomicAnd(T* to, T x) {
  return emulated_atomic(to, [x](T old) { return old & x; });
}
inline unsigned atomicOr(unsigned* to, unsigned x) {
  return emulated_atomic(to, [x](unsigned old) { return old | x; });
}
template <typename T>
T atomicExch(T* to, T x) {
  return emulated_atomic(to, [x](T) { return x; });
}

// ------------------------------------------------------------------------------- the runtime

using cudaStream_t = EmulatedStream*;
using cudaEvent_t = std::shared_ptr<bool>*;  // whether the work before its last record is done
enum cudaError_t {
  cudaSuccess,
  cudaErrorMemoryAllocation = 2,
  cudaErrorNotReady = 600,
  cudaErrorStreamCaptureUnsupported = 900
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeRelaxed = 2 };
constexpr unsigned cudaEventDisableTiming = 2, cudaStreamNonBlocking = 1;
constexpr unsigned cudaHostAllocPortable = 1, cudaHostAllocMapped = 2;

namespace emulation {
inline cudaError_t last_error = cudaSuccess;
inline cudaError_t failed(cudaError_t error) { return last_error = error; }
// Whether a call that a capture forbids to all threads is forbidden now.
inline bool is_forbidden() { return streams.capturing > 0 && streams.beside_captures == 0; }
}  // namespace emulation

inline cudaError_t cudaGetLastError() { return std::exchange(emulation::last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : "not permitted during a capture";
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  int& relaxed = emulation::streams.beside_captures;
  const bool was = relaxed > 0;
  relaxed = *mode == cudaStreamCaptureModeRelaxed;
  return *mode = was ? cudaStreamCaptureModeRelaxed : cudaStreamCaptureModeGlobal, cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  const bool yes = emulation::queue_of(stream).graph != nullptr;
  return *status = yes ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone, cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return *event = new std::shared_ptr<bool>(new bool(true)), cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  emulation::Queue& queue = emulation::queue_of(stream);
  if (queue.graph != nullptr) return emulation::failed(cudaErrorStreamCaptureUnsupported);
  const std::shared_ptr<bool> done(new bool(false));
  *event = done;
  return emulation::enqueue(queue, [done] { *done = true; }), cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  emulation::Queue& queue = emulation::queue_of(stream);
  if (queue.graph != nullptr) return emulation::failed(cudaErrorStreamCaptureUnsupported);
  const std::shared_ptr<bool> done = *event;
  return emulation::enqueue(queue, [] {}, [done] { return *done; }), cudaSuccess;
}
inline cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (emulation::is_forbidden()) return emulation::failed(cudaErrorStreamCaptureUnsupported);
  return **event ? cudaSuccess : emulation::failed(cudaErrorNotReady);
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (emulation::is_forbidden()) return emulation::failed(cudaErrorStreamCaptureUnsupported);
  const std::shared_ptr<bool> done = *event;
  return emulation::wait_until([&] { return *done; }), cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  (void)emulation::queue_of(nullptr);  // stands first
  emulation::streams.all.push_back(std::make_unique<emulation::Queue>());
  return *stream = emulation::streams.all.back().get(), cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  if (emulation::is_forbidden()) return emulation::failed(cudaErrorStreamCaptureUnsupported);
  if (!stream->work.empty()) {
    std::fprintf(stderr, "emulated CUDA: a stream is destroyed before its work is done\n");
    std::abort();
  }
  auto& all = emulation::streams.all;
  all.erase(std::find_if(all.begin(), all.end(), [&](auto& one) { return one.get() == stream; }));
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (emulation::is_forbidden()) return emulation::failed(cudaErrorStreamCaptureUnsupported);
  return emulation::drain(emulation::queue_of(stream)), cudaSuccess;
}
// Memory of the host is pinned when it is the source, and pageable when it is the destination.
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                                   cudaStream_t stream) {
  emulation::Queue& queue = emulation::queue_of(stream);
  const bool back = kind == cudaMemcpyDeviceToHost;
  if (queue.graph != nullptr || (back && emulation::is_forbidden())) {
    return emulation::failed(cudaErrorStreamCaptureUnsupported);
  }
  emulation::enqueue(queue, [=] { std::memcpy(to, from, bytes); });
  if (back) emulation::drain(queue);
  return cudaSuccess;
}
inline cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  if (emulation::is_forbidden()) return emulation::failed(cudaErrorStreamCaptureUnsupported);
  *memory = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  return *memory == nullptr ? emulation::failed(cudaErrorMemoryAllocation) : cudaSuccess;
}
inline cudaError_t cudaFreeHost(void* memory) {
  if (emulation::is_forbidden()) return emulation::failed(cudaErrorStreamCaptureUnsupported);
  return std::free(memory), cudaSuccess;
}
inline cudaError_t cudaMemGetInfo(size_t* free, size_t* all) {
  return *free = *all = size_t{1} << 30, cudaSuccess;
}

// ----------------------------------------------------------------- for tests/emulated.py, by
// ctypes

#define EMULATION_API extern "C" inline __attribute__((used, visibility("default")))

EMULATION_API void* emulation_stream() {
  cudaStream_t stream = nullptr;
  (void)cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  return stream;
}
EMULATION_API void emulation_slow(void* stream, int slow) {
  emulation::queue_of(static_cast<cudaStream_t>(stream)).slow = slow != 0;
}
// What torch does on a stream comes after the work that is there.
EMULATION_API void emulation_drain(void* stream) {
  const int64_t before = emulation::streams.waits;
  emulation::drain(emulation::queue_of(static_cast<cudaStream_t>(stream)));
  emulation::streams.waits = before;
}
// What torch does late: a tensor is filled when the work before is done.
EMULATION_API void emulation_fill(void* stream, void* memory, int byte, int64_t bytes) {
  emulation::enqueue(emulation::queue_of(static_cast<cudaStream_t>(stream)),
                     [=] { std::memset(memory, byte, static_cast<size_t>(bytes)); });
}
EMULATION_API int emulation_is_idle() {
  for (const auto& queue : emulation::streams.all) {
    if (!queue->work.empty()) return 0;
  }
  return 1;
}
EMULATION_API int64_t emulation_waits() { return emulation::streams.waits; }
EMULATION_API int64_t emulation_launches() { return emulation::streams.launches; }
EMULATION_API void* emulation_capture(void* stream) {
  ++emulation::streams.capturing;
  auto* const graph = new std::vector<std::function<void()>>;
  return emulation::queue_of(static_cast<cudaStream_t>(stream)).graph = graph;
}
EMULATION_API void emulation_end_capture(void* stream) {
  --emulation::streams.capturing;
  emulation::queue_of(static_cast<cudaStream_t>(stream)).graph = nullptr;
}
EMULATION_API void emulation_replay(void* graph, void* stream) {
  for (const auto& run : *static_cast<std::vector<std::function<void()>>*>(graph)) {
    emulation::enqueue(emulation::queue_of(static_cast<cudaStream_t>(stream)), run);
  }
}
EMULATION_API void emulation_free(void* graph) {
  delete static_cast<std::vector<std::function<void()>>*>(graph);
}
