// Importance weights of a batch: w_i = (smallest leaf of the batch / leaf i)^beta, in (0, 1].
//
// Computed by one block, in place: sample.cu has written the leaves of the batch, as uint32, to the
// memory of the weights. A leaf of 0 means that the sample could not be built. Its weight is 0.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/priority.h"
#include "cuda/grid.cuh"

namespace fastreplay {

__device__ inline void finish_weights(float* weights, int64_t n, double beta) {
  FR_SHARED(uint32_t, smallest);
  if (threadIdx.x == 0) smallest = UINT32_MAX;
  // Volatile: other blocks wrote them during this launch.
  const volatile uint32_t* const leaves = reinterpret_cast<volatile uint32_t*>(weights);
  const int64_t first = threadIdx.x;
  const uint32_t first_leaf = first < n ? leaves[first] : 0;  // loaded during the barrier
  __syncthreads();
  for (int64_t i = first; i < n; i += blockDim.x) {
    uint32_t leaf = first_leaf;
    if (i != first) leaf = leaves[i];
    if (leaf > 0) atomicMin(&smallest, leaf);
  }
  __syncthreads();
  for (int64_t i = first; i < n; i += blockDim.x) {
    uint32_t leaf = first_leaf;
    if (i != first) leaf = leaves[i];
    weights[i] = leaf > 0 ? importance_weight(smallest, leaf, beta) : 0.0f;
  }
}

}  // namespace fastreplay
