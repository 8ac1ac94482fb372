#include "core/window.h"
#include "cuda/device_ring.h"
#include "cuda/kernel.cuh"

namespace fastreplay {
namespace {

constexpr int kThreads = 256;
constexpr int kPlanners = 32;     // of these: the first warp, which copies nothing
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

// Frames of rows that follow each other, except where the ring wraps around.
struct Stack {
  int64_t first;  // the flat row of the oldest frame, had the ring not wrapped around
  int wrapped;    // so many frames lie `rows` further on
  int blanks;     // so many, those before the opening frame, are zeros
};

// What the first warp of a block finds out for the others.
struct Plan {
  int64_t index;    // the row, or -1
  int64_t game;     // the first row of its game
  Window window;    // of the row
  Stack stacks[2];  // of obs and next_obs, or one for the block that they share
};

// What a thread writes together with others, maybe of several blocks.
struct Part {
  const uint8_t* frames;  // of row 0
  int64_t frame_bytes, rows;
  float scale;
  bool next;     // of next_obs
  bool aligned;  // the samples begin at multiples of 16 bytes
  uint8_t* out;
  int thread, threads;  // which one this is, of how many
  int count;            // frames
  Stack stack;          // of the plan
};

// Row `back` steps before `slot`.
__device__ int64_t earlier(int64_t slot, int64_t back, int64_t rows) {
  return slot >= back ? slot - back : slot - back + rows;
}

// Copies frames one after the other, kBytes of them at a time.
template <Output kOutput, int kBytes>
__device__ void copy_frames(const Part& part) {
  using Load = typename Chunk<kBytes>::Type;
  using Store = typename Chunk<kBytes * expansion(kOutput)>::Type;
  using To = typename Pixel<kOutput>::Type;
  const int a_frame = static_cast<int>(part.frame_bytes / kBytes), all = part.count * a_frame;
  const int blank = part.stack.blanks * a_frame, wrapped = part.stack.wrapped * a_frame;
  const Load* const late = reinterpret_cast<const Load*>(part.frames) + part.stack.first * a_frame;
  const Load* const early = late + part.rows * a_frame;
  Store* const to = reinterpret_cast<Store*>(part.out);
  for (int first = part.thread; first < all; first += part.threads * kInFlight) {
    Load loads[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int at = first + j * part.threads;
      loads[j] = zero_chunk<Load>();
      if (at >= blank && at < all) loads[j] = (at < wrapped ? early : late)[at];
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int at = first + j * part.threads;
      if (at >= all) break;
      uint8_t bytes[kBytes];
      To pixels[kBytes];
      memcpy(bytes, &loads[j], sizeof bytes);
#pragma unroll
      for (int i = 0; i < kBytes; ++i) pixels[i] = Pixel<kOutput>::of(bytes[i], part.scale);
      Store store;
      memcpy(&store, pixels, sizeof store);
      to[at] = store;
    }
  }
}

// Where a frame of the stack begins, or null if it is blank.
__device__ const uint8_t* find_frame(const Part& part, int frame) {
  if (frame < part.stack.blanks) return nullptr;
  const int64_t row = part.stack.first + frame + (frame < part.stack.wrapped ? part.rows : 0);
  return part.frames + row * part.frame_bytes;
}

// Interleaves four frames; a store is 16 bytes.
template <Output kOutput>
__device__ void interleave_four(const Part& part) {
  constexpr int kPixels = 4 / expansion(kOutput);
  using Load = typename Chunk<kPixels>::Type;
  using To = typename Pixel<kOutput>::Type;
  const Load* from[4];
#pragma unroll
  for (int s = 0; s < 4; ++s) from[s] = reinterpret_cast<const Load*>(find_frame(part, s));
  const int all = static_cast<int>(part.frame_bytes / kPixels);
  for (int at = part.thread; at < all; at += part.threads) {
    Load loads[4];
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      loads[s] = zero_chunk<Load>();
      if (from[s] != nullptr) loads[s] = from[s][at];
    }
    To pixels[4 * kPixels];
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      uint8_t bytes[kPixels];
      memcpy(bytes, &loads[s], sizeof bytes);
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        pixels[4 * i + s] = Pixel<kOutput>::of(bytes[i], part.scale);
      }
    }
    uint4 store;
    memcpy(&store, pixels, sizeof store);
    reinterpret_cast<uint4*>(part.out)[at] = store;
  }
}

// Interleaves any number of frames, one element at a time.
template <Output kOutput>
__device__ void interleave_any(const Part& part) {
  using To = typename Pixel<kOutput>::Type;
  const int all = static_cast<int>(part.frame_bytes) * part.count;
  for (int at = part.thread; at < all; at += part.threads) {
    const uint8_t* const frame = find_frame(part, at % part.count);
    const uint8_t byte = frame == nullptr ? 0 : frame[at / part.count];
    reinterpret_cast<To*>(part.out)[at] = Pixel<kOutput>::of(byte, part.scale);
  }
}

__device__ bool is_aligned(const void* pointer, int64_t stride, int bytes) {
  return (reinterpret_cast<uintptr_t>(pointer) | static_cast<uintptr_t>(stride)) % bytes == 0;
}

// Whether obs and next_obs are one block of stack + 1 frames.
bool is_shared(const DeviceRing& ring, const SampleJob& job) {
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

// Draws or takes the row of a sample, and plans its frames. By a whole warp. Returns whether there
// was something to draw.
__device__ bool make_plan(const DeviceRing& ring, const DeviceTree& tree, const SampleJob& job,
                          const Strata& strata, bool shared, int64_t sample, int lane, Plan& plan) {
  const bool writes = blockIdx.y == 0 && lane == 0, prioritized = tree.nodes != nullptr;
  int64_t index = -1;
  bool able = true;
  uint32_t leaf = 0;
  if (job.draw && prioritized) {
    const uint64_t call = ring.counters->calls;
    const Root root = read_root(tree, lane);
    const uint64_t bits = random64(job.seed, call, static_cast<uint32_t>(sample), 0);
    able = root.total > 0;
    if (able && sample < job.n) {
      const Found found = draw_leaf(tree, root, bits, strata, sample, lane);
      index = found.index;
      leaf = found.leaf;
    }
  } else if (job.draw) {
    able = ring.counters->n_drawable > 0;
    if (able && sample < job.n) {
      index = draw_uniform(ring, job.seed, ring.counters->calls, sample, lane);
    }
  } else if (sample < job.n) {
    index = job.indices[sample];
    const int64_t size = ring.layout.num_envs * ring.layout.rows;
    const bool fits = static_cast<uint64_t>(index) < static_cast<uint64_t>(size);
    if (fits && prioritized) leaf = static_cast<uint32_t>(tree.nodes[index]);  // or 0: not drawable
    if (!fits || !(ring.memory.flags[index] & kDrawable)) {
      if (writes) report(ring.counters, fits ? kNotDrawable : kIndexOutOfRange, index);
      index = -1;
    }
  }
  if (sample >= job.n) return able;
  if (writes && job.draw) job.indices[sample] = index < 0 ? 0 : index;
  if (!job.gather) return able;
  // The leaf itself, until those of all samples are known.
  if (writes && prioritized) reinterpret_cast<uint32_t*>(job.is_weights)[sample] = leaf;

  const int64_t rows = ring.layout.rows;
  const int64_t game = index < 0 ? 0 : index / rows * rows, slot = index < 0 ? 0 : index - game;
  const Ring now{ring.memory.flags + game, rows, ring.counters->stored, ring.counters->head};
  Window window{slot, 0, true};
  if (index >= 0) window = walk_window(now, slot, ring.layout.n_step);  // alike in every lane
  if (lane == 0) {
    plan.index = index;
    plan.game = game;
    plan.window = window;
  }
  // Lane 0 finds the frames of obs, lane 1 those of next_obs; or lane 0 those of the block that
  // they share, which is a stack of one more frame.
  if (lane < (shared ? 1 : 2)) {
    const int64_t newest = shared || lane == 1 ? window.end : slot;
    const int count = shared ? ring.layout.stack + 1 : ring.layout.stack;
    const int depth = index < 0 ? -1 : stack_depth(now, newest, count);
    const int64_t oldest = newest - (count - 1);
    plan.stacks[lane] = {game + oldest, oldest < 0 ? static_cast<int>(-oldest) : 0,
                         count - 1 - depth};
  }
  return able;
}

// The part of a thread behind the first warp, all but the stack. Half of these threads write obs
// and half next_obs, unless both are one block.
__device__ Part find_part(const DeviceRing& ring, const SampleJob& job, bool shared,
                          int64_t sample) {
  const int copiers = static_cast<int>(blockDim.x) - kPlanners;
  const int threads = shared ? copiers : copiers / 2;
  const int thread = static_cast<int>(threadIdx.x) - kPlanners;
  const bool next = thread >= threads;
  uint8_t* const batch = next ? job.batch.next_obs : job.batch.obs;
  const int64_t stride = next ? job.batch.next_obs_stride : job.batch.obs_stride;
  return {ring.memory.frames,
          ring.layout.frame_bytes,
          ring.layout.rows,
          job.format.scale,
          next,
          is_aligned(batch, stride, 16),
          batch + sample * stride,
          static_cast<int>(blockIdx.y) * threads + (next ? thread - threads : thread),
          static_cast<int>(gridDim.y) * threads,
          ring.layout.stack + shared,
          {}};
}

template <Output kOutput>
__device__ void write_part(const Part& part, bool channels_last) {
  constexpr int kExpansion = expansion(kOutput);
  const int64_t bytes = part.frame_bytes;
  if (channels_last) {
    if (part.count == 4 && part.aligned && bytes % (4 / kExpansion) == 0) {
      interleave_four<kOutput>(part);
    } else {
      interleave_any<kOutput>(part);
    }
  } else if (part.aligned && bytes % (16 / kExpansion) == 0) {
    copy_frames<kOutput, 16 / kExpansion>(part);
  } else {
    copy_frames<kOutput, 1>(part);
  }
}

// Writes what is neither a frame nor a leaf. By one thread.
__device__ void write_numbers(const DeviceRing& ring, const SampleJob& job, bool prioritized,
                              int64_t sample, const Plan& plan) {
  const Window& window = plan.window;
  const int32_t action = ring.memory.actions[plan.index < 0 ? 0 : plan.index];
  const float discount = window.terminated ? 0.0f : ring.powers[window.steps];
  const float* const rewards = ring.memory.rewards + plan.game;
  float sum = 0.0f;
  int64_t slot = plan.index - plan.game;
  for (int k = 0; k < window.steps; ++k) {
    sum += ring.powers[k] * rewards[slot];
    slot = slot + 1 == ring.layout.rows ? 0 : slot + 1;
  }
  job.batch.actions[sample] = plan.index < 0 ? 0 : action;
  job.batch.rewards[sample] = sum;
  job.batch.discounts[sample] = discount;
  if (!prioritized) job.is_weights[sample] = plan.index < 0 ? 0.0f : 1.0f;
}

// Leaves, as left by make_plan, to weights. By one block.
__device__ void finish_weights(const SampleJob& job, double beta) {
  FR_SHARED(uint32_t, smallest);
  if (threadIdx.x == 0) smallest = UINT32_MAX;
  const volatile uint32_t* const leaves = reinterpret_cast<volatile uint32_t*>(job.is_weights);
  const int64_t first = threadIdx.x;
  const uint32_t kept = first < job.n ? leaves[first] : 0;
  __syncthreads();
  for (int64_t i = first; i < job.n; i += blockDim.x) {
    uint32_t leaf = kept;
    if (i != first) leaf = leaves[i];
    if (leaf > 0) atomicMin(&smallest, leaf);
  }
  __syncthreads();
  for (int64_t i = first; i < job.n; i += blockDim.x) {
    uint32_t leaf = kept;
    if (i != first) leaf = leaves[i];
    job.is_weights[i] = leaf > 0 ? importance_weight(smallest, leaf, beta) : 0.0f;
  }
}

template <Output kOutput>
__global__ void sample_kernel(const __grid_constant__ DeviceRing ring,
                              const __grid_constant__ DeviceTree tree,
                              const __grid_constant__ SampleJob job,
                              const __grid_constant__ Strata strata, bool shared) {
  FR_SHARED(Plan, plan);
  FR_SHARED(bool, last);
  const int64_t sample = blockIdx.x;
  const bool gathers = job.gather && sample < job.n, prioritized = tree.nodes != nullptr;
  bool able = true;
  Part part{};  // what is known of it without the plan
  if (threadIdx.x < kPlanners) {
    able = make_plan(ring, tree, job, strata, shared, sample, static_cast<int>(threadIdx.x), plan);
  } else {
    part = find_part(ring, job, shared, sample);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    // What the last block needs of this one has been read and written: the frames need not be.
    const unsigned ticket = take_ticket(ring.counters);
    if (gathers && blockIdx.y == 0) write_numbers(ring, job, prioritized, sample, plan);
    last = is_last_ticket(ring.counters, ticket);
    if (last && job.draw) {
      if (able) {
        atomicAdd(reinterpret_cast<Word*>(&ring.counters->calls), Word{1});  // waits for nothing
      } else {
        report(ring.counters, kNothingToDraw, 0);
      }
    }
  } else if (threadIdx.x >= kPlanners && gathers) {
    part.stack = plan.stacks[part.next];
    write_part<kOutput>(part, job.format.channels_last);
  }
  __syncthreads();
  if (last && job.gather && prioritized) finish_weights(job, ring.counters->beta);
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

void launch_add(const DeviceRing& ring, const DeviceTree& tree, const Row& row,
                cudaStream_t stream) {
  const int threads = threads_for(ring.layout.frame_bytes / 16, kThreads);
  launch(add_kernel, blocks_for(ring.layout.num_envs, 1), threads, stream, ring, tree, row);
}

void launch_sample(const DeviceRing& ring, const DeviceTree& tree, const SampleJob& job,
                   cudaStream_t stream) {
  const int64_t n = job.n < 1 ? 1 : job.n;
  const int64_t bytes = 2 * ring.layout.stack * ring.layout.frame_bytes;
  const int64_t stores = job.gather ? bytes * expansion(job.format.output) / 16 : 0;
  // A planner, and where there is something to copy at least one more warp.
  const int64_t copiers = stores / kInFlight < 32 ? 32 : stores / kInFlight;
  const int threads = job.gather ? threads_for(kPlanners + copiers, kThreads) : kPlanners;
  const int64_t most = kManyBlocks / n < kMostParts ? kManyBlocks / n : kMostParts;
  const dim3 blocks(static_cast<unsigned>(n),
                    blocks_for(stores, (kThreads - kPlanners) * kInFlight, most < 1 ? 1 : most));
  void (*const kernels[])(DeviceRing, DeviceTree, SampleJob, Strata, bool) = {
      sample_kernel<Output::kCopy>, sample_kernel<Output::kFloat16>,
      sample_kernel<Output::kBfloat16>, sample_kernel<Output::kFloat32>};
  launch(kernels[static_cast<int>(job.format.output)], blocks, threads, stream, ring, tree, job,
         Strata(job.stratified, n), is_shared(ring, job));
}

void launch_drawable(const DeviceRing& ring, const int64_t* indices, int64_t n, bool* out,
                     cudaStream_t stream) {
  if (n == 0) return;
  launch(drawable_kernel, blocks_for(n, kThreads), kThreads, stream, ring, indices, n, out);
}

}  // namespace fastreplay
