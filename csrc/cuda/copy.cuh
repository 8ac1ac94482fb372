// Copies the frames of a stack from the ring into a batch, converting their type or their memory
// format on the way (core/pixel.h, FrameOutput of core/batch.h). Four paths:
//
//   copy_frames<16>     contiguous; each store is 16 bytes           the usual case
//   copy_frames<1>      contiguous; one element at a time            odd sizes or alignments
//   interleave_four     channels last, 4 frames; stores of 16 bytes
//   interleave_any      channels last; one element at a time
//
// A stack is a run of consecutive rows. It may wrap around the end of the ring. Frames before the
// start of the episode are blank (zeros):
//
//   rows = 8, newest slot 1, 5 frames, of which 3 belong to the episode
//   frame           0       1       2       3       4
//   slot           -3      -2      -1       0       1       first: the row of slot -3
//   read from    zeros   zeros   slot 7  slot 0  slot 1     blanks = 2, wrapped = 3
//
// Invariant: a frame is at most 2^26 bytes (cuda_backend.h), so offsets in a stack fit an int.
//
// Cost: each frame is read once and each element written once; neighbouring threads touch
// neighbouring memory. copy_frames keeps kLoadsInFlight loads per thread in flight.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "cpu/convert.h"

namespace fastreplay {

constexpr int kLoadsInFlight = 4;

// The frames of a stack; see the picture above.
struct FrameRun {
  int64_t first;  // flat row of frame 0, as if the ring continued below slot 0
  int wrapped;    // frames 0 to wrapped - 1: add `rows` to their flat row
  int blanks;     // frames 0 to blanks - 1 are zeros
};

// One thread's share of copying the frames of one sample.
struct CopyTask {
  const uint8_t* frames;  // begins with the frame of row 0
  int64_t frame_bytes, rows;
  float scale;
  bool is_next;     // copies next_obs, not obs
  bool is_aligned;  // every sample of the batch begins at a multiple of 16 bytes
  uint8_t* out;     // of this sample
  int thread;       // 0 to threads - 1
  int threads;      // that share these frames, possibly in several blocks
  int count;        // of frames
  FrameRun run;
};

// Whether a pointer and a stride, in bytes, are multiples of `bytes`.
__device__ inline bool is_aligned(const void* pointer, int64_t stride, int bytes) {
  return (reinterpret_cast<uintptr_t>(pointer) | static_cast<uintptr_t>(stride)) % bytes == 0;
}

// 1 to 16 bytes that one instruction loads or stores.
template <int kBytes>
struct Chunk;
template <>
struct Chunk<1> {
  using Type = uint8_t;
};
template <>
struct Chunk<2> {
  using Type = uint16_t;
};
template <>
struct Chunk<4> {
  using Type = uint32_t;
};
template <>
struct Chunk<8> {
  using Type = uint2;
};
template <>
struct Chunk<16> {
  using Type = uint4;
};

template <typename T>
__device__ inline T zero_chunk() {
  T chunk;
  memset(&chunk, 0, sizeof chunk);
  return chunk;
}

// One byte of a frame as an element of the batch.
template <Output kOutput>
struct Pixel;
template <>
struct Pixel<Output::kCopy> {
  using Type = uint8_t;
  static __device__ Type of(uint8_t byte, float) { return byte; }
};
template <>
struct Pixel<Output::kFloat16> {
  using Type = uint16_t;
  static __device__ Type of(uint8_t byte, float scale) {
    return float16_bits(static_cast<float>(byte) * scale);
  }
};
template <>
struct Pixel<Output::kBfloat16> {
  using Type = uint16_t;
  static __device__ Type of(uint8_t byte, float scale) {
    return bfloat16_bits(static_cast<float>(byte) * scale);
  }
};
template <>
struct Pixel<Output::kFloat32> {
  using Type = float;
  static __device__ Type of(uint8_t byte, float scale) { return static_cast<float>(byte) * scale; }
};

// Contiguous: frames one after the other, kBytes of a frame at a time.
template <Output kOutput, int kBytes>
__device__ void copy_frames(const CopyTask& task) {
  using Load = typename Chunk<kBytes>::Type;
  using Store = typename Chunk<kBytes * expansion(kOutput)>::Type;
  using Element = typename Pixel<kOutput>::Type;
  const int per_frame = static_cast<int>(task.frame_bytes / kBytes);  // loads
  const int loads_in_all = task.count * per_frame;
  const int blank = task.run.blanks * per_frame, wrapped = task.run.wrapped * per_frame;
  const Load* const run = reinterpret_cast<const Load*>(task.frames) + task.run.first * per_frame;
  const Load* const wrapped_run = run + task.rows * per_frame;
  Store* const to = reinterpret_cast<Store*>(task.out);
  for (int first = task.thread; first < loads_in_all; first += task.threads * kLoadsInFlight) {
    Load loads[kLoadsInFlight];
#pragma unroll
    for (int j = 0; j < kLoadsInFlight; ++j) {
      const int at = first + j * task.threads;
      loads[j] = zero_chunk<Load>();
      if (at >= blank && at < loads_in_all) loads[j] = (at < wrapped ? wrapped_run : run)[at];
    }
#pragma unroll
    for (int j = 0; j < kLoadsInFlight; ++j) {
      const int at = first + j * task.threads;
      if (at >= loads_in_all) break;
      uint8_t bytes[kBytes];
      Element elements[kBytes];
      memcpy(bytes, &loads[j], sizeof bytes);
#pragma unroll
      for (int i = 0; i < kBytes; ++i) elements[i] = Pixel<kOutput>::of(bytes[i], task.scale);
      Store store;
      memcpy(&store, elements, sizeof store);
      to[at] = store;
    }
  }
}

// Where a frame of the stack begins; null if it is blank.
__device__ inline const uint8_t* find_frame(const CopyTask& task, int frame) {
  if (frame < task.run.blanks) return nullptr;
  const int64_t row = task.run.first + frame + (frame < task.run.wrapped ? task.rows : 0);
  return task.frames + row * task.frame_bytes;
}

// Channels last, four frames: each store of 16 bytes has the 4 elements of each of 1 to 4 pixels.
template <Output kOutput>
__device__ void interleave_four(const CopyTask& task) {
  constexpr int kPixels = 4 / expansion(kOutput);  // of each frame in one store
  using Load = typename Chunk<kPixels>::Type;
  using Element = typename Pixel<kOutput>::Type;
  const Load* from[4];
#pragma unroll
  for (int s = 0; s < 4; ++s) from[s] = reinterpret_cast<const Load*>(find_frame(task, s));
  const int stores = static_cast<int>(task.frame_bytes / kPixels);
  for (int at = task.thread; at < stores; at += task.threads) {
    Load loads[4];
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      loads[s] = zero_chunk<Load>();
      if (from[s] != nullptr) loads[s] = from[s][at];
    }
    Element elements[4 * kPixels];
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      uint8_t bytes[kPixels];
      memcpy(bytes, &loads[s], sizeof bytes);
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        elements[4 * i + s] = Pixel<kOutput>::of(bytes[i], task.scale);
      }
    }
    uint4 store;
    memcpy(&store, elements, sizeof store);
    reinterpret_cast<uint4*>(task.out)[at] = store;
  }
}

// Channels last, any number of frames: one element at a time.
template <Output kOutput>
__device__ void interleave_any(const CopyTask& task) {
  using Element = typename Pixel<kOutput>::Type;
  const int elements = static_cast<int>(task.frame_bytes) * task.count;
  for (int at = task.thread; at < elements; at += task.threads) {
    const uint8_t* const frame = find_frame(task, at % task.count);
    const uint8_t byte = frame == nullptr ? 0 : frame[at / task.count];
    reinterpret_cast<Element*>(task.out)[at] = Pixel<kOutput>::of(byte, task.scale);
  }
}

// Copies this thread's share on the fastest path that sizes and alignment allow.
template <Output kOutput>
__device__ void copy_stack(const CopyTask& task, bool channels_last) {
  constexpr int kExpansion = expansion(kOutput);
  const int64_t bytes = task.frame_bytes;
  if (channels_last) {
    if (task.count == 4 && task.is_aligned && bytes % (4 / kExpansion) == 0) {
      interleave_four<kOutput>(task);
    } else {
      interleave_any<kOutput>(task);
    }
  } else if (task.is_aligned && bytes % (16 / kExpansion) == 0) {
    copy_frames<kOutput, 16 / kExpansion>(task);
  } else {
    copy_frames<kOutput, 1>(task);
  }
}

}  // namespace fastreplay
