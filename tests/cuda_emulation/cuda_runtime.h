// Just enough of CUDA to run fastreplay's kernels on a CPU, so that their tests need no GPU.
//
// The sources of csrc/cuda are compiled as C++ with this header in place of CUDA's:
//   fibers.h     grids, blocks, warps and barriers
//   streams.h    streams, events and graphs
//   this file    CUDA's names: qualifiers, intrinsics, atomics, calls of the runtime
//
// A call that CUDA forbids during a capture fails here, too. tests/emulated.py controls streams and
// graphs through the functions at the end.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>

#include "fibers.h"
#include "streams.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(threads)

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// ---------------------------------------------------------------------- in kernels: intrinsics

#define threadIdx (dim3(emulation::scheduler.current->thread))
#define blockIdx (emulation::scheduler.current->block->index)
#define blockDim (emulation::scheduler.block)
#define gridDim (emulation::scheduler.grid)

inline void __syncthreads() { emulation::wait_at(emulation::scheduler.current->block->barrier); }
inline int __syncthreads_or(int vote) {
  emulation::Block& block = *emulation::scheduler.current->block;
  int& votes = block.votes[block.barrier.round % 2];
  if (block.barrier.arrived == 0) votes = 0;
  votes |= vote;
  emulation::wait_at(block.barrier);
  return votes;
}
inline void __syncwarp(unsigned = 0) { emulation::wait_at(emulation::warp().barrier); }
inline void __threadfence() {}

template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  T all[32];
  emulation::exchange(value, all);
  return all[source];
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
  emulation::maybe_suspend();
  const T before = *to;
  *to = change(before);
  return before;
}
template <typename T>
T atomicAdd(T* to, T x) {
  return emulated_atomic(to, [x](T old) { return static_cast<T>(old + x); });
}
inline unsigned atomicInc(unsigned* to, unsigned last) {
  return emulated_atomic(to, [last](unsigned old) { return old >= last ? 0 : old + 1; });
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

// ----------------------------------------------------------------- on the host: the runtime

using cudaStream_t = emulation::Stream*;
inline const cudaStream_t cudaStreamPerThread = reinterpret_cast<cudaStream_t>(2);
using cudaEvent_t = std::shared_ptr<bool>*;  // whether the stream has reached the last record
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
constexpr unsigned cudaEventRecordExternal = 1, cudaEventWaitExternal = 1;
constexpr unsigned cudaHostAllocPortable = 1, cudaHostAllocMapped = 2;

namespace emulation {
inline cudaError_t last_error = cudaSuccess;
inline cudaError_t failed(cudaError_t error) { return last_error = error; }
// Whether a call that is forbidden to all threads during a capture in global mode would fail now.
inline bool is_forbidden() { return streams.captures > 0 && !streams.is_relaxed; }
}  // namespace emulation

inline cudaError_t cudaGetLastError() { return std::exchange(emulation::last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : "not permitted during a capture";
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  bool& is_relaxed = emulation::streams.is_relaxed;
  const bool was_relaxed = is_relaxed;
  is_relaxed = *mode == cudaStreamCaptureModeRelaxed;
  *mode = was_relaxed ? cudaStreamCaptureModeRelaxed : cudaStreamCaptureModeGlobal;
  return cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  const bool is_captured = emulation::stream_of(stream).graph != nullptr;
  *status = is_captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                            unsigned long long* id) {
  const emulation::Graph* const graph = emulation::stream_of(stream).graph;
  if (graph != nullptr) *id = graph->id;
  return cudaStreamIsCapturing(stream, status);
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return *event = new std::shared_ptr<bool>(new bool(true)), cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }
// In a capture, external records and waits become nodes: each launch records the event again, and
// waits for the last record before the launch.
inline cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t handle,
                                            unsigned flags) {
  const auto record = [event](emulation::Stream& stream) {
    const std::shared_ptr<bool> is_done(new bool(false));
    *event = is_done;
    emulation::enqueue(stream, [is_done] { *is_done = true; });
  };
  emulation::Stream& stream = emulation::stream_of(handle);
  if (stream.graph == nullptr) return record(stream), cudaSuccess;
  if (flags != cudaEventRecordExternal) return emulation::failed(cudaErrorStreamCaptureUnsupported);
  return stream.graph->nodes.push_back(record), cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned flags) {
  const auto wait = [event](emulation::Stream& stream) {
    const std::shared_ptr<bool> is_done = *event;
    emulation::enqueue(stream, [] {}, [is_done] { return *is_done; });
  };
  emulation::Stream& stream = emulation::stream_of(handle);
  if (stream.graph == nullptr) return wait(stream), cudaSuccess;
  if (flags != cudaEventWaitExternal) return emulation::failed(cudaErrorStreamCaptureUnsupported);
  return stream.graph->nodes.push_back(wait), cudaSuccess;
}
inline cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (emulation::is_forbidden()) return emulation::failed(cudaErrorStreamCaptureUnsupported);
  return **event ? cudaSuccess : emulation::failed(cudaErrorNotReady);
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (emulation::is_forbidden()) return emulation::failed(cudaErrorStreamCaptureUnsupported);
  const std::shared_ptr<bool> is_done = *event;
  return emulation::wait_until([&] { return *is_done; }), cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  (void)emulation::stream_of(nullptr);  // makes the default stream the first
  emulation::streams.all.push_back(std::make_unique<emulation::Stream>());
  return *stream = emulation::streams.all.back().get(), cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  if (emulation::is_forbidden()) return emulation::failed(cudaErrorStreamCaptureUnsupported);
  if (!stream->tasks.empty()) {
    std::fprintf(stderr, "emulated CUDA: a stream was destroyed before its work was done\n");
    std::abort();
  }
  auto& all = emulation::streams.all;
  all.erase(std::find_if(all.begin(), all.end(), [&](auto& one) { return one.get() == stream; }));
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (emulation::is_forbidden()) return emulation::failed(cudaErrorStreamCaptureUnsupported);
  return emulation::drain(emulation::stream_of(stream)), cudaSuccess;
}
// A copy to the device reads pinned memory and is asynchronous. A copy to the host writes pageable
// memory and waits.
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                                   cudaStream_t handle) {
  emulation::Stream& stream = emulation::stream_of(handle);
  const bool waits = kind == cudaMemcpyDeviceToHost;
  if (stream.graph != nullptr || (waits && emulation::is_forbidden())) {
    return emulation::failed(cudaErrorStreamCaptureUnsupported);
  }
  emulation::enqueue(stream, [=] { std::memcpy(to, from, bytes); });
  if (waits) emulation::drain(stream);
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
inline cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  return *free = *total = size_t{1} << 30, cudaSuccess;
}

// ------------------------------------------------- for tests/emulated.py, which calls by ctypes

#define EMULATION_API extern "C" inline __attribute__((used, visibility("default")))

EMULATION_API void* emulation_stream() {
  cudaStream_t stream = nullptr;
  (void)cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  return stream;
}
EMULATION_API void emulation_slow(void* stream, int slow) {
  emulation::stream_of(static_cast<cudaStream_t>(stream)).is_slow = slow != 0;
}
// Runs all enqueued work before torch uses a stream. Does not count as a wait of the host.
EMULATION_API void emulation_drain(void* stream) {
  const int64_t before = emulation::streams.waits;
  emulation::drain(emulation::stream_of(static_cast<cudaStream_t>(stream)));
  emulation::streams.waits = before;
}
// Fills a torch tensor in stream order, as torch.zeros does.
EMULATION_API void emulation_fill(void* stream, void* memory, int byte, int64_t bytes) {
  emulation::enqueue(emulation::stream_of(static_cast<cudaStream_t>(stream)),
                     [=] { std::memset(memory, byte, static_cast<size_t>(bytes)); });
}
EMULATION_API int emulation_is_idle() {
  for (const auto& stream : emulation::streams.all) {
    if (!stream->tasks.empty()) return 0;
  }
  return 1;
}
EMULATION_API int64_t emulation_waits() { return emulation::streams.waits; }
EMULATION_API int64_t emulation_launches() { return emulation::streams.launches; }
EMULATION_API void* emulation_capture(void* stream) {
  ++emulation::streams.captures;
  auto* const graph = new emulation::Graph{++emulation::streams.capture_ids, {}};
  return emulation::stream_of(static_cast<cudaStream_t>(stream)).graph = graph;
}
// Makes another stream part of the capture of `stream`, as waiting for its event would do.
EMULATION_API void emulation_fork(void* stream, void* other) {
  emulation::stream_of(static_cast<cudaStream_t>(other)).graph =
      emulation::stream_of(static_cast<cudaStream_t>(stream)).graph;
}
EMULATION_API void emulation_end_capture(void* handle) {
  --emulation::streams.captures;
  const auto* const graph = emulation::stream_of(static_cast<cudaStream_t>(handle)).graph;
  for (const auto& stream : emulation::streams.all) {
    if (stream->graph == graph) stream->graph = nullptr;
  }
}
EMULATION_API void emulation_replay(void* graph, void* stream) {
  for (const auto& enqueue : static_cast<emulation::Graph*>(graph)->nodes) {
    enqueue(emulation::stream_of(static_cast<cudaStream_t>(stream)));
  }
}
EMULATION_API void emulation_free(void* graph) { delete static_cast<emulation::Graph*>(graph); }
