#include "../window.h"
#include "device_ring.h"
#include "kernel.cuh"

namespace fastreplay {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 4;      // loads of a thread before its first store
constexpr int kMostParts = 8;     // blocks that share one sample
constexpr int kManyBlocks = 512;  // enough to fill a device

// Integers of 1 to 16 bytes, each moved by one instruction.
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
__device__ T zero_chunk() {
  T chunk;
  memset(&chunk, 0, sizeof chunk);
  return chunk;
}

// What one byte of a frame becomes.
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

constexpr int64_t kBlank = -1;

// What the first warp of a block finds out for the others.
struct Plan {
  int64_t index;        // the row, or -1
  bool able;            // there was something to draw
  int64_t sources[16];  // flat rows of the frames to write, kBlank before the opening frame
};

// Row `back` steps before `slot`.
__device__ int64_t earlier(int64_t slot, int64_t back, int64_t rows) {
  return slot >= back ? slot - back : slot - back + rows;
}

// Copies frames from `sources` to `out`, one after the other, kBytes of them at a time.
template <Output kOutput, int kBytes>
__device__ void copy_frames(const uint8_t* frames, int64_t frame_bytes, const int64_t* sources,
                            int count, float scale, uint8_t* out) {
  using Load = typename Chunk<kBytes>::Type;
  using Store = typename Chunk<kBytes * expansion(kOutput)>::Type;
  using To = typename Pixel<kOutput>::Type;
  const int a_frame = static_cast<int>(frame_bytes / kBytes), all = count * a_frame;
  const int threads = static_cast<int>(blockDim.x * gridDim.y);
  Store* const to = reinterpret_cast<Store*>(out);
  for (int first = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x); first < all;
       first += threads * kInFlight) {
    Load loads[kInFlight];
    bool blank[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int at = first + j * threads;
      const int64_t source = at < all ? sources[at / a_frame] : kBlank;
      blank[j] = source == kBlank;
      if (blank[j]) continue;
      loads[j] = reinterpret_cast<const Load*>(frames + source * frame_bytes)[at % a_frame];
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int at = first + j * threads;
      if (at >= all) break;
      Store store = zero_chunk<Store>();
      if (!blank[j]) {
        uint8_t bytes[kBytes];
        To pixels[kBytes];
        memcpy(bytes, &loads[j], sizeof bytes);
#pragma unroll
        for (int i = 0; i < kBytes; ++i) pixels[i] = Pixel<kOutput>::of(bytes[i], scale);
        memcpy(&store, pixels, sizeof store);
      }
      to[at] = store;
    }
  }
}

// Interleaves four frames; a store is 16 bytes.
template <Output kOutput>
__device__ void interleave_four(const uint8_t* frames, int64_t frame_bytes, const int64_t* sources,
                                float scale, uint8_t* out) {
  constexpr int kPixels = 4 / expansion(kOutput);
  using Load = typename Chunk<kPixels>::Type;
  using To = typename Pixel<kOutput>::Type;
  const int all = static_cast<int>(frame_bytes / kPixels);
  const int threads = static_cast<int>(blockDim.x * gridDim.y);
  for (int at = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x); at < all; at += threads) {
    Load loads[4];
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      loads[s] = zero_chunk<Load>();
      if (sources[s] == kBlank) continue;
      loads[s] = reinterpret_cast<const Load*>(frames + sources[s] * frame_bytes)[at];
    }
    To pixels[4 * kPixels];
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      uint8_t bytes[kPixels];
      memcpy(bytes, &loads[s], sizeof bytes);
#pragma unroll
      for (int i = 0; i < kPixels; ++i) pixels[4 * i + s] = Pixel<kOutput>::of(bytes[i], scale);
    }
    uint4 store;
    memcpy(&store, pixels, sizeof store);
    reinterpret_cast<uint4*>(out)[at] = store;
  }
}

// Interleaves any number of frames, one element at a time.
template <Output kOutput>
__device__ void interleave_any(const uint8_t* frames, int64_t frame_bytes, const int64_t* sources,
                               int stack, float scale, uint8_t* out) {
  using To = typename Pixel<kOutput>::Type;
  const int all = static_cast<int>(frame_bytes) * stack;
  const int threads = static_cast<int>(blockDim.x * gridDim.y);
  for (int at = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x); at < all; at += threads) {
    const int64_t source = sources[at % stack];
    const uint8_t byte = source == kBlank ? 0 : frames[source * frame_bytes + at / stack];
    reinterpret_cast<To*>(out)[at] = Pixel<kOutput>::of(byte, scale);
  }
}

__device__ bool is_aligned(const void* pointer, int64_t stride, int bytes) {
  return (reinterpret_cast<uintptr_t>(pointer) | static_cast<uintptr_t>(stride)) % bytes == 0;
}

template <Output kOutput>
__device__ void write_frames(const DeviceRing& ring, const FrameOutput& format, const int64_t* plan,
                             int count, uint8_t* out, bool aligned) {
  const int64_t bytes = ring.layout.frame_bytes;
  const uint8_t* frames = ring.memory.frames;
  constexpr int kWide = 16 / expansion(kOutput);
  if (format.channels_last) {
    if (count == 4 && aligned && bytes % (4 / expansion(kOutput)) == 0) {
      interleave_four<kOutput>(frames, bytes, plan, format.scale, out);
    } else {
      interleave_any<kOutput>(frames, bytes, plan, count, format.scale, out);
    }
  } else if (aligned && bytes % kWide == 0) {
    copy_frames<kOutput, kWide>(frames, bytes, plan, count, format.scale, out);
  } else {
    copy_frames<kOutput, 1>(frames, bytes, plan, count, format.scale, out);
  }
}

__device__ bool is_shared(const DeviceRing& ring, const SampleJob& job) {
  return ring.layout.n_step == 1 && !job.format.channels_last &&
         job.batch.obs_stride == job.batch.next_obs_stride &&
         job.batch.next_obs ==
             job.batch.obs + ring.layout.frame_bytes * expansion(job.format.output);
}

// The row of a uniform draw, by a whole warp: 32 attempts at a time, of which the first that finds
// a drawable row counts. There is one.
__device__ int64_t draw_uniform(const DeviceRing& ring, uint64_t seed, uint64_t call,
                                int64_t sample, int lane) {
  const int64_t stored = ring.counters->stored, rows = ring.layout.rows;
  const uint64_t all = static_cast<uint64_t>(ring.layout.num_envs * stored);
  const uint32_t number = static_cast<uint32_t>(sample);
  for (uint32_t attempt = lane; attempt < kAttempts; attempt += 32) {
    const uint64_t bits = random64(seed, call, number, attempt);
    const int64_t row = static_cast<int64_t>(mulhi64(bits, all));
    const int64_t candidate = row / stored * rows + row % stored;
    const bool yes = ring.memory.flags[candidate] & kDrawable;
    const unsigned found = __ballot_sync(kAllLanes, yes);
    if (found != 0) return __shfl_sync(kAllLanes, candidate, __ffs(static_cast<int>(found)) - 1);
  }
  // Hardly any row is drawable: take the k-th of those that are.
  const uint64_t bits = random64(seed, call, number, kAttempts);
  uint64_t k = mulhi64(bits, static_cast<uint64_t>(ring.counters->n_drawable));
  const int64_t size = ring.layout.num_envs * rows;
  for (int64_t first = 0; first < size; first += 32) {
    const int64_t row = first + lane;
    const bool yes = row < size && (ring.memory.flags[row] & kDrawable);
    unsigned found = __ballot_sync(kAllLanes, yes);
    const unsigned count = static_cast<unsigned>(__popc(found));
    if (k >= count) {
      k -= count;
      continue;
    }
    for (; k > 0; --k) found &= found - 1;  // drops the lowest bit
    return first + __ffs(static_cast<int>(found)) - 1;
  }
  return 0;
}

// Draws or takes the row of a sample, writes what is not a frame, and plans the frames. By a whole
// warp.
__device__ void make_plan(const DeviceRing& ring, const DeviceTree& tree, const SampleJob& job,
                          int64_t sample, int lane, Plan& plan) {
  const bool writes = blockIdx.y == 0;
  const bool prioritized = tree.nodes != nullptr;
  int64_t index = -1;
  bool able = true;
  uint32_t leaf = 0;
  if (job.draw) {
    able = ring.counters->n_drawable > 0;
    const uint64_t call = ring.counters->calls;
    if (able && sample < job.n && prioritized) {
      const uint64_t bits = random64(job.seed, call, static_cast<uint32_t>(sample), 0);
      const Word total = tree_total(tree, lane);
      const Found found = draw_leaf(tree, total, bits, job.stratified, sample, job.n, lane);
      index = found.index;
      leaf = found.leaf;
    } else if (able && sample < job.n) {
      index = draw_uniform(ring, job.seed, call, sample, lane);
    }
  } else if (sample < job.n) {
    index = job.indices[sample];
    const int64_t size = ring.layout.num_envs * ring.layout.rows;
    const bool fits = static_cast<uint64_t>(index) < static_cast<uint64_t>(size);
    if (!fits || !(ring.memory.flags[index] & kDrawable)) {
      if (lane == 0 && writes) {
        report(ring.counters, fits ? kNotDrawable : kIndexOutOfRange, index);
      }
      index = -1;
    } else if (prioritized) {
      leaf = static_cast<uint32_t>(tree.nodes[index]);
    }
  }
  if (lane == 0) {
    plan.index = index;
    plan.able = able;
  }
  if (sample >= job.n) return;
  if (job.draw && lane == 0 && writes) job.indices[sample] = index < 0 ? 0 : index;
  if (!job.gather) return;

  const int64_t rows = ring.layout.rows;
  const int64_t game = index < 0 ? 0 : index / rows, slot = index < 0 ? 0 : index % rows;
  const Ring now{ring.memory.flags + game * rows, rows, ring.counters->stored, ring.counters->head};
  const int stack = ring.layout.stack;
  Window window{slot, 0, true};
  int depth = -1, next_depth = -1;
  if (index >= 0) {  // the same in every lane: their loads fall together
    window = walk_window(now, slot, ring.layout.n_step);
    depth = stack_depth(now, slot, stack);
    next_depth = stack_depth(now, window.end, stack);
  }
  // The frames of obs, then of next_obs; or the stack + 1 frames of their shared block.
  const bool shared = is_shared(ring, job);
  const int frames = shared ? stack + 1 : 2 * stack;
  if (lane < frames) {
    const bool next = shared || lane >= stack;
    const int64_t newest = next ? window.end : slot;
    const int reach = shared ? depth + 1 : next ? next_depth : depth;
    const int back = shared ? stack - lane : stack - 1 - lane % stack;
    plan.sources[lane] =
        index < 0 || back > reach ? kBlank : game * rows + earlier(newest, back, rows);
  }
  if (lane == 0 && writes) {
    float sum = 0.0f;
    int64_t row = slot;
    for (int k = 0; k < window.steps; ++k, row = now.after(row)) {
      sum += ring.powers[k] * ring.memory.rewards[game * rows + row];
    }
    job.batch.actions[sample] = index < 0 ? 0 : ring.memory.actions[index];
    job.batch.rewards[sample] = sum;
    job.batch.discounts[sample] = window.terminated ? 0.0f : ring.powers[window.steps];
    if (prioritized) {  // the leaf itself, until those of all samples are known
      reinterpret_cast<uint32_t*>(job.is_weights)[sample] = leaf;
    } else {
      job.is_weights[sample] = index < 0 ? 0.0f : 1.0f;
    }
  }
}

// Leaves, as left by make_plan, to weights. By one block.
__device__ void finish_weights(const SampleJob& job, double beta) {
  FR_SHARED(uint32_t, smallest);
  if (threadIdx.x == 0) smallest = UINT32_MAX;
  __syncthreads();
  volatile uint32_t* const leaves = reinterpret_cast<volatile uint32_t*>(job.is_weights);
  for (int64_t i = threadIdx.x; i < job.n; i += blockDim.x) {
    const uint32_t leaf = leaves[i];
    if (leaf > 0) atomicMin(&smallest, leaf);
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < job.n; i += blockDim.x) {
    const uint32_t leaf = leaves[i];
    const float weight = leaf > 0 ? importance_weight(smallest, leaf, beta) : 0.0f;
    memcpy(&job.is_weights[i], &weight, sizeof weight);
  }
}

template <Output kOutput>
__global__ void sample_kernel(const __grid_constant__ DeviceRing ring,
                              const __grid_constant__ DeviceTree tree,
                              const __grid_constant__ SampleJob job) {
  FR_SHARED(Plan, plan);
  const int64_t sample = blockIdx.x;
  if (threadIdx.x < 32) {
    make_plan(ring, tree, job, sample, static_cast<int>(threadIdx.x), plan);
  }
  __syncthreads();
  if (job.gather && sample < job.n) {
    const int stack = ring.layout.stack;
    const bool obs_aligned = is_aligned(job.batch.obs, job.batch.obs_stride, 16);
    uint8_t* const obs = job.batch.obs + sample * job.batch.obs_stride;
    if (is_shared(ring, job)) {
      write_frames<kOutput>(ring, job.format, plan.sources, stack + 1, obs, obs_aligned);
    } else {
      const bool next_aligned = is_aligned(job.batch.next_obs, job.batch.next_obs_stride, 16);
      uint8_t* const next_obs = job.batch.next_obs + sample * job.batch.next_obs_stride;
      write_frames<kOutput>(ring, job.format, plan.sources, stack, obs, obs_aligned);
      write_frames<kOutput>(ring, job.format, plan.sources + stack, stack, next_obs, next_aligned);
    }
  }
  if (!is_last_block(ring.counters)) return;
  if (job.gather && tree.nodes != nullptr) finish_weights(job, ring.counters->beta);
  if (!job.draw || threadIdx.x > 0) return;
  if (plan.able) {
    ++ring.counters->calls;
  } else {
    report(ring.counters, kNothingToDraw, 0);
  }
}

template <typename T>
__device__ T number(const Column& column, int64_t i) {
  const int64_t at = i * column.stride;
  switch (column.type) {
    case Column::kInt32:
      return static_cast<T>(static_cast<const int32_t*>(column.data)[at]);
    case Column::kInt64:
      return static_cast<T>(static_cast<const int64_t*>(column.data)[at]);
    case Column::kFloat32:
      return static_cast<T>(static_cast<const float*>(column.data)[at]);
    default:
      return static_cast<T>(static_cast<const double*>(column.data)[at]);
  }
}

// Keeps flag, counter and leaf of the rows that a new one may have changed. By a whole warp, each
// lane a row; `now` counts the new row already.
__device__ void refresh(const DeviceRing& ring, const DeviceTree& tree, const Ring& now,
                        int64_t game, bool full, int lane) {
  const int64_t rows = ring.layout.rows, newest = now.newest(), before = now.stored - 1;
  const int n_step = ring.layout.n_step, stack = ring.layout.stack;
  // Rows whose window may have been completed: 1 to `near` before the newest. Rows whose stack may
  // have lost its first frame: the `old` oldest ones.
  const int near = static_cast<int>(before < n_step ? before : n_step);
  const int old = !full ? 0 : static_cast<int>(now.stored < stack - 1 ? now.stored : stack - 1);
  uint8_t* const flags = ring.memory.flags + game * rows;
  for (int first = 0; first < near + old; first += 32) {
    const int i = first + lane;
    const int64_t back = i < near ? i + 1 : before - (i - near);
    bool changed = false, yes = false;
    int64_t row = 0;
    if (i < near + old && (i < near || back > near)) {  // no row twice, and never the newest
      row = earlier(newest, back, rows);
      yes = drawable(now, row, stack, n_step);
      changed = yes != static_cast<bool>(flags[row] & kDrawable);
    }
    __syncwarp();  // all have read the flags
    if (changed) {
      flags[row] ^= kDrawable;
      atomicAdd(reinterpret_cast<Word*>(&ring.counters->n_drawable),
                yes ? Word{1} : ~Word{0});  // plus or minus 1
      if (tree.nodes != nullptr) {
        write_leaf(tree, game * rows + row, yes ? ring.counters->max_leaf : 0);
      }
    }
    __syncwarp();
  }
}

__global__ void add_kernel(const __grid_constant__ DeviceRing ring,
                           const __grid_constant__ DeviceTree tree,
                           const __grid_constant__ Row row) {
  const int64_t game = blockIdx.x, rows = ring.layout.rows, bytes = ring.layout.frame_bytes;
  const int64_t slot = ring.counters->head, stored = ring.counters->stored;
  const bool full = stored == rows;
  const int64_t index = game * rows + slot;
  const int64_t new_head = slot + 1 == rows ? 0 : slot + 1, new_stored = full ? rows : stored + 1;
  const uint8_t* const from = row.frames + game * row.frame_stride;
  uint8_t* const to = ring.memory.frames + index * bytes;
  if (is_aligned(row.frames, row.frame_stride, 16) && bytes % 16 == 0) {
    for (int64_t i = threadIdx.x; i < bytes / 16; i += blockDim.x) {
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
    }
  } else {
    for (int64_t i = threadIdx.x; i < bytes; i += blockDim.x) to[i] = from[i];
  }
  if (threadIdx.x < 32) {
    const int lane = static_cast<int>(threadIdx.x);
    if (lane == 0) {
      if (full && ring.memory.flags[index] & kDrawable) {
        atomicAdd(reinterpret_cast<Word*>(&ring.counters->n_drawable), ~Word{0});  // minus 1
        if (tree.nodes != nullptr) write_leaf(tree, index, 0);
      }
      const int64_t action = number<int64_t>(row.actions, game);
      if (action != static_cast<int32_t>(action)) report(ring.counters, kActionTooLarge, action);
      ring.memory.actions[index] = static_cast<int32_t>(action);
      ring.memory.rewards[index] = number<float>(row.rewards, game);
      // Nothing is known before the first row, so it opens an episode.
      ring.memory.flags[index] =
          static_cast<uint8_t>((row.terminations[game] ? kTerminated : 0) |
                               (stored == 0 || row.episode_starts[game] ? kOpens : 0));
    }
    __syncwarp();
    const Ring now{ring.memory.flags + game * rows, rows, new_stored, new_head};
    refresh(ring, tree, now, game, full, lane);
  }
  if (is_last_block(ring.counters) && threadIdx.x == 0) {
    ring.counters->head = new_head;
    ring.counters->stored = new_stored;
  }
}

__global__ void drawable_kernel(const __grid_constant__ DeviceRing ring, const int64_t* indices,
                                int64_t n, bool* out) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const uint64_t size = static_cast<uint64_t>(ring.layout.num_envs * ring.layout.rows);
  const bool fits = static_cast<uint64_t>(indices[i]) < size;
  if (!fits) report(ring.counters, kIndexOutOfRange, indices[i]);
  out[i] = fits && (ring.memory.flags[indices[i]] & kDrawable);
}

}  // namespace

// One warp to kThreads for so many stores of 16 bytes.
static int threads_for(int64_t stores) {
  int threads = 32;
  while (threads < kThreads && threads < stores) threads *= 2;
  return threads;
}

void launch_add(const DeviceRing& ring, const DeviceTree& tree, const Row& row,
                cudaStream_t stream) {
  const int threads = threads_for(ring.layout.frame_bytes / 16);
  launch(add_kernel, blocks_for(ring.layout.num_envs, 1), threads, stream, ring, tree, row);
}

void launch_sample(const DeviceRing& ring, const DeviceTree& tree, const SampleJob& job,
                   cudaStream_t stream) {
  const int64_t n = job.n < 1 ? 1 : job.n;
  const int64_t bytes = 2 * ring.layout.stack * ring.layout.frame_bytes;
  const int64_t stores = bytes * expansion(job.format.output) / 16;
  int64_t parts = job.gather ? stores / (kThreads * kInFlight) : 1;
  parts = parts < kManyBlocks / n ? parts : kManyBlocks / n;
  parts = parts < kMostParts ? parts : kMostParts;
  const dim3 blocks(static_cast<unsigned>(n), static_cast<unsigned>(parts < 1 ? 1 : parts));
  const int threads = threads_for(job.gather ? stores / kInFlight : 0);
  void (*const kernels[])(DeviceRing, DeviceTree, SampleJob) = {
      sample_kernel<Output::kCopy>, sample_kernel<Output::kFloat16>,
      sample_kernel<Output::kBfloat16>, sample_kernel<Output::kFloat32>};
  launch(kernels[static_cast<int>(job.format.output)], blocks, threads, stream, ring, tree, job);
}

void launch_drawable(const DeviceRing& ring, const int64_t* indices, int64_t n, bool* out,
                     cudaStream_t stream) {
  if (n == 0) return;
  launch(drawable_kernel, blocks_for(n, kThreads), kThreads, stream, ring, indices, n, out);
}

}  // namespace fastreplay
