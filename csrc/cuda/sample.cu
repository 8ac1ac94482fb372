// Draws a batch and builds it, in one launch.
//
//   grid     one column of blocks per sample (blockIdx.x), of 1 to kMaxBlocksPerSample blocks
//   block    warp 0     makes the plan (plan.cuh), then writes action, reward and discount
//            others     copy the planned frames (copy.cuh): half of them obs, the others next_obs
//            all        if frames are in tiles, copy obs, then next_obs (tiles.cuh)
//   last block          turns leaves into importance weights (weights.cuh) and counts the call
//
// Blocks arrive (grid.cuh) as soon as they have a plan, not when their frames are copied: weights
// need only the leaves of the other samples.
//
// A sample that cannot be built (no such row, not drawable, nothing to draw, a damaged tree) is all
// zeros, and its error is latched.
//
// Cost at 84x84, stack 4: 5 frames read and written per sample with one step (shared block),
// 8 otherwise. Small batches are latency-bound: launch, draw, plan, copy, arrival.
#include "core/window.h"
#include "cuda/copy.cuh"
#include "cuda/device_ring.h"
#include "cuda/grid.cuh"
#include "cuda/plan.cuh"
#include "cuda/reference.h"
#include "cuda/tiles.cuh"
#include "cuda/weights.cuh"

namespace fastreplay {
namespace {

constexpr int kThreads = 256;             // of a block, at most
constexpr int kPlanThreads = 32;          // of these: warp 0, which copies no frames
constexpr int kMaxBlocksPerSample = 8;    // that share the copying
constexpr int kBlocksToFillDevice = 512;  // a small batch gets several blocks per sample up to this

// The task of a copying thread, without the run of frames, which is in the plan.
__device__ CopyTask make_task(const DeviceRing& ring, const SampleJob& job, bool shared,
                              int64_t sample) {
  const int copiers = static_cast<int>(blockDim.x) - kPlanThreads;
  const int threads = shared ? copiers : copiers / 2;
  const int thread = static_cast<int>(threadIdx.x) - kPlanThreads;
  const bool is_next = thread >= threads;
  uint8_t* const batch = is_next ? job.batch.next_obs : job.batch.obs;
  const int64_t stride = is_next ? job.batch.next_obs_stride : job.batch.obs_stride;
  return {ring.memory.frames,
          ring.layout.frame_bytes,
          ring.layout.rows,
          job.format.scale,
          is_next,
          is_aligned(batch, stride, 16),
          batch + sample * stride,
          static_cast<int>(blockIdx.y) * threads + (is_next ? thread - threads : thread),
          static_cast<int>(gridDim.y) * threads,
          ring.layout.stack + shared,
          {}};
}

// Writes action, n-step return and discount of a sample, and a weight of 1 if the batch is uniform.
// Called by one thread.
__device__ void write_columns(const DeviceRing& ring, const SampleJob& job, bool prioritized,
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

// Copies the frames of a sample from tiles. Called by all threads of a block.
template <Output kOutput>
__device__ void copy_sample_of_tiles(const DeviceRing& ring, const SampleJob& job, bool shared,
                                     int64_t sample, const Plan& plan, int window_rows) {
  FR_SHARED(TileTable, table);
  CopyTask task{};
  task.frame_bytes = ring.layout.frame_bytes;
  task.rows = ring.layout.rows;
  task.scale = job.format.scale;
  task.count = ring.layout.stack + shared;
  for (int i = 0; i < (shared ? 1 : 2); ++i) {
    uint8_t* const batch = i == 1 ? job.batch.next_obs : job.batch.obs;
    const int64_t stride = i == 1 ? job.batch.next_obs_stride : job.batch.obs_stride;
    task.is_aligned = is_aligned(batch, stride, 16);
    task.out = batch + sample * stride;
    task.run = plan.runs[i];
    copy_tiles<kOutput>(ring, task, job.format.channels_last, plan.game, window_rows, table);
  }
}

// `window_rows`: of tiles (tiles.cuh).
template <Output kOutput, bool kTiles>
__global__ void sample_kernel(const __grid_constant__ DeviceRing ring,
                              const __grid_constant__ DeviceTree tree,
                              const __grid_constant__ SampleJob job,
                              const __grid_constant__ Strata strata, bool shared, int window_rows) {
  FR_SHARED(Plan, plan);
  FR_SHARED(bool, is_last);
  const int64_t sample = blockIdx.x;
  const bool gathers = job.gather && sample < job.n, prioritized = tree.nodes != nullptr;
  bool has_rows = true;
  CopyTask task{};
  if (threadIdx.x < kPlanThreads) {
    has_rows =
        make_plan(ring, tree, job, strata, shared, sample, static_cast<int>(threadIdx.x), plan);
  } else if (!kTiles) {
    task = make_task(ring, job, shared, sample);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    const unsigned arrival = arrive(ring.counters);
    if (gathers && blockIdx.y == 0) write_columns(ring, job, prioritized, sample, plan);
    is_last = is_last_arrival(arrival);
    if (is_last && job.draw) {
      if (has_rows) {
        atomicAdd(reinterpret_cast<Word*>(&ring.counters->calls), Word{1});
      } else {
        report(ring.counters, kNothingToDraw, 0);
      }
    }
  } else if (!kTiles && threadIdx.x >= kPlanThreads && gathers) {
    task.run = plan.runs[task.is_next];
    copy_stack<kOutput>(task, job.format.channels_last);
  }
  if (kTiles && gathers) {
    copy_sample_of_tiles<kOutput>(ring, job, shared, sample, plan, window_rows);
  }
  __syncthreads();
  if (is_last && job.gather && prioritized) {
    finish_weights(job.is_weights, job.n, ring.counters->beta);
  }
}

__global__ void drawable_kernel(const __grid_constant__ DeviceRing ring, const int64_t* indices,
                                int64_t n, bool* out) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const uint64_t size = static_cast<uint64_t>(ring.layout.num_envs * ring.layout.rows);
  const bool in_range = static_cast<uint64_t>(indices[i]) < size;
  if (!in_range) report(ring.counters, kIndexOutOfRange, indices[i]);
  out[i] = in_range && (ring.memory.flags[indices[i]] & kDrawable);
}

}  // namespace

void launch_sample(const DeviceRing& ring, const DeviceTree& tree, const SampleJob& job,
                   cudaStream_t stream) {
  if (uses_reference()) return reference::launch_sample(ring, tree, job, stream);
  const int64_t n = job.n < 1 ? 1 : job.n;
  const int64_t bytes = 2 * ring.layout.stack * ring.layout.frame_bytes;
  const int64_t stores = job.gather ? bytes * expansion(job.format.output) / 16 : 0;
  // At least one warp in addition to the plan's, if there is something to copy.
  const int64_t copiers = stores / kLoadsInFlight < 32 ? 32 : stores / kLoadsInFlight;
  const int threads = job.gather ? threads_for(kPlanThreads + copiers, kThreads) : kPlanThreads;
  const int64_t per_sample =
      kBlocksToFillDevice / n < kMaxBlocksPerSample ? kBlocksToFillDevice / n : kMaxBlocksPerSample;
  const int64_t most = per_sample < 1 ? 1 : per_sample;
  unsigned blocks_per_sample = blocks_for(stores, (kThreads - kPlanThreads) * kLoadsInFlight, most);
  void (*const kernels[][2])(DeviceRing, DeviceTree, SampleJob, Strata, bool, int) = {
      {sample_kernel<Output::kCopy, false>, sample_kernel<Output::kCopy, true>},
      {sample_kernel<Output::kFloat16, false>, sample_kernel<Output::kFloat16, true>},
      {sample_kernel<Output::kBfloat16, false>, sample_kernel<Output::kBfloat16, true>},
      {sample_kernel<Output::kFloat32, false>, sample_kernel<Output::kFloat32, true>}};
  const bool tiles = ring.memory.frames == nullptr;
  int rows = 0;
  if (tiles) {
    rows = window_rows(ring.tiles, static_cast<int>(blocks_per_sample));
    blocks_per_sample = blocks_for(count_windows(ring.tiles, rows), 1, blocks_per_sample);
  }
  launch(kernels[static_cast<int>(job.format.output)][tiles],
         dim3(static_cast<unsigned>(n), blocks_per_sample), threads, stream, ring, tree, job,
         Strata(job.stratified, n), shares_block(ring.layout, job.format, job.batch), rows);
}

void launch_drawable(const DeviceRing& ring, const int64_t* indices, int64_t n, bool* out,
                     cudaStream_t stream) {
  if (n == 0) return;
  launch(drawable_kernel, blocks_for(n, kThreads), kThreads, stream, ring, indices, n, out);
}

}  // namespace fastreplay
