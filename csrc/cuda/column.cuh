// Reads a column of numbers (device_ring.h) whose type is known only at run time.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/device_ring.h"

namespace fastreplay {

// Element i of a column, converted to T.
template <typename T>
__device__ T element_of(const Column& column, int64_t i) {
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

}  // namespace fastreplay
