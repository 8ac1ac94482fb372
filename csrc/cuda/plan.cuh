// The plan of a sample: its row, its n-step window, and where the frames of obs and next_obs are.
//
// The first warp of a block makes the plan in shared memory; the other threads then copy the
// frames. All lanes draw the row together. The walks along the ring are short and sequential: every
// lane walks the window, then lane 0 finds the frames of obs and lane 1 those of next_obs.
//
// With one step and contiguous frames, obs and next_obs may be views of one block of stack + 1
// frames ("shared"). It is copied once, as one stack of stack + 1 frames that ends at next_obs.
//
// Cost: a draw, then O(n_step + stack) dependent reads of flags, all in one or two cache lines.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/window.h"
#include "cuda/copy.cuh"
#include "cuda/descent.cuh"
#include "cuda/device_ring.h"
#include "cuda/draw.cuh"
#include "cuda/grid.cuh"

namespace fastreplay {

struct Plan {
  int64_t index;     // flat row, or -1: the sample cannot be built
  int64_t game;      // flat row of the game's slot 0
  Window window;     // that starts at the row
  FrameRun runs[2];  // of obs and next_obs; only the first if they are shared
};

// Clears kUndrawn of a row. Several threads may do so for one row while others read its other bits:
// all of them write the same byte.
__device__ inline void mark_drawn(const DeviceRing& ring, int64_t index) {
  const uint8_t flags = ring.memory.flags[index];
  if (flags & kUndrawn) ring.memory.flags[index] = static_cast<uint8_t>(flags & ~kUndrawn);
}

// Draws or reads the row of a sample and plans its frames. Writes the row to job.indices (if it is
// drawn) and its leaf to job.is_weights (if the batch is prioritized). Returns whether there was
// something to draw. Called by a whole warp.
__device__ inline bool make_plan(const DeviceRing& ring, const DeviceTree& tree,
                                 const SampleJob& job, const Strata& strata, bool shared,
                                 int64_t sample, int lane, Plan& plan) {
  const bool is_writer = blockIdx.y == 0 && lane == 0, prioritized = tree.nodes != nullptr;
  int64_t index = -1;
  bool has_rows = true;
  uint32_t leaf = 0;
  if (job.draw && prioritized) {
    const uint64_t call = ring.counters->calls;
    const Root root = read_root(tree, lane);
    const uint64_t bits = random64(job.seed, call, static_cast<uint32_t>(sample), 0);
    has_rows = root.total > 0;
    if (has_rows && sample < job.n) {
      const Found found = draw_leaf(tree, root, bits, strata, sample, lane);
      index = found.index;
      leaf = found.leaf;
    }
  } else if (job.draw) {
    has_rows = ring.counters->n_drawable > 0;
    if (has_rows && sample < job.n) {
      index = draw_uniform(ring, job.seed, ring.counters->calls, sample, lane);
    }
  } else if (sample < job.n) {
    index = job.indices[sample];
    const int64_t size = ring.layout.num_envs * ring.layout.rows;
    const bool in_range = static_cast<uint64_t>(index) < static_cast<uint64_t>(size);
    if (in_range && prioritized) leaf = static_cast<uint32_t>(tree.nodes[index]);
    if (!in_range || !(ring.memory.flags[index] & kDrawable)) {
      if (is_writer) report(ring.counters, in_range ? kNotDrawable : kIndexOutOfRange, index);
      index = -1;
    }
  }
  if (sample >= job.n) return has_rows;
  if (is_writer && job.draw && has_rows && index < 0) report(ring.counters, kDamaged, sample);
  if (is_writer && job.draw) job.indices[sample] = index < 0 ? 0 : index;
  if (is_writer && prioritized && index >= 0) mark_drawn(ring, index);
  if (!job.gather) return has_rows;
  // finish_weights turns the leaves into weights once all of them are known.
  if (is_writer && prioritized) reinterpret_cast<uint32_t*>(job.is_weights)[sample] = leaf;

  const int64_t rows = ring.layout.rows;
  const int64_t game = index < 0 ? 0 : index / rows * rows, slot = index < 0 ? 0 : index - game;
  const Ring now{ring.memory.flags + game, rows, ring.counters->stored, ring.counters->head};
  Window window{slot, 0, true};
  if (index >= 0) window = walk_window(now, slot, ring.layout.n_step);  // the same in every lane
  if (lane == 0) {
    plan.index = index;
    plan.game = game;
    plan.window = window;
  }
  if (lane < (shared ? 1 : 2)) {
    const int64_t newest = shared || lane == 1 ? window.end : slot;
    const int count = shared ? ring.layout.stack + 1 : ring.layout.stack;
    const int depth = index < 0 ? -1 : stack_depth(now, newest, count);  // -1: all blank
    const int64_t oldest = newest - (count - 1);
    plan.runs[lane] = {game + oldest, oldest < 0 ? static_cast<int>(-oldest) : 0,
                       count - 1 - depth};
  }
  return has_rows;
}

}  // namespace fastreplay
