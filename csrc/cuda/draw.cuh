// A uniform draw over the drawable rows of a ring, by rejection.
//
// Attempt a of a sample is a stored row, drawable or not, chosen by the random bits
// (seed, call, sample, a). The first drawable one is the result. A warp makes 32 attempts at a time
// and takes the first drawable one, like the sequential loop in FrameRing::draw. If none of
// kAttempts is drawable, which happens if few rows are, the random bits of attempt kAttempts choose
// k, and the k-th drawable row is found by counting.
//
// Cost: one random number and one byte of flags per lane in nearly all cases.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/philox.h"
#include "core/window.h"
#include "cuda/device_ring.h"
#include "cuda/warp.cuh"

namespace fastreplay {

static_assert(kAttempts % 32 == 0, "all lanes of a warp make the same number of attempts");

// The row that sample `sample` of call `call` draws; n_drawable must be above 0. -1 if fewer than
// n_drawable rows are drawable. Called by a whole warp.
__device__ inline int64_t draw_uniform(const DeviceRing& ring, uint64_t seed, uint64_t call,
                                       int64_t sample, int lane) {
  const int64_t stored = ring.counters->stored, rows = ring.layout.rows;
  const uint64_t stored_rows = static_cast<uint64_t>(ring.layout.num_envs * stored);
  const uint32_t sample32 = static_cast<uint32_t>(sample);
  for (uint32_t attempt = lane; attempt < kAttempts; attempt += 32) {
    const uint64_t bits = random64(seed, call, sample32, attempt);
    const int64_t row = static_cast<int64_t>(mulhi64(bits, stored_rows));
    const int64_t candidate = row / stored * rows + row % stored;
    const bool is_drawable = ring.memory.flags[candidate] & kDrawable;
    const int found = first_lane(__ballot_sync(kAllLanes, is_drawable));
    if (found >= 0) return __shfl_sync(kAllLanes, candidate, found);
  }
  const uint64_t bits = random64(seed, call, sample32, kAttempts);
  uint64_t k = mulhi64(bits, static_cast<uint64_t>(ring.counters->n_drawable));
  const int64_t size = static_cast<int64_t>(stored_rows);
  for (int64_t first = 0; first < size; first += 32) {
    const int64_t nth = first + lane, row = nth / stored * rows + nth % stored;
    const bool is_drawable = nth < size && (ring.memory.flags[row] & kDrawable);
    unsigned ballot = __ballot_sync(kAllLanes, is_drawable);
    const unsigned count = static_cast<unsigned>(__popc(ballot));
    if (k >= count) {
      k -= count;
      continue;
    }
    for (; k > 0; --k) ballot &= ballot - 1;  // clears the lowest bit; k < count, so one remains
    const int64_t chosen = first + first_lane(ballot);
    return chosen / stored * rows + chosen % stored;
  }
  return -1;
}

}  // namespace fastreplay
