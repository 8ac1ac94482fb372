// Operations of a whole warp: all 32 lanes call them together.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/device_tree.h"

namespace fastreplay {

constexpr unsigned kAllLanes = 0xFFFFFFFF;

__device__ inline int lane_of_thread() { return static_cast<int>(threadIdx.x) % 32; }

// Inclusive prefix sum, modulo 2^64: lane i gets the sum of x over lanes 0 to i. Five shuffles.
__device__ inline Word prefix_sum(Word x, int lane) {
  for (int distance = 1; distance < 32; distance *= 2) {
    const Word below = __shfl_up_sync(kAllLanes, x, distance);
    if (lane >= distance) x += below;
  }
  return x;
}

// The first lane of a ballot (a mask of lanes), or -1 if the ballot is empty.
__device__ inline int first_lane(unsigned ballot) {
  return ballot == 0 ? -1 : __ffs(static_cast<int>(ballot)) - 1;
}

}  // namespace fastreplay
