// Checks of the arguments that Python passes, and the errors they raise.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/batch.h"
#include "core/tiles.h"
#include "python/tensor_view.h"

namespace fastreplay {

namespace py = pybind11;

// --------------------------------------------------------------- errors that CPU and CUDA share

[[noreturn]] inline void throw_nothing_drawable() {
  throw py::value_error("the replay holds no whole transition yet: add more rows first");
}

[[noreturn]] inline void throw_index_out_of_range(int64_t index, int64_t size) {
  throw py::index_error("index " + std::to_string(index) + " is out of range for " +
                        std::to_string(size) + " rows");
}

[[noreturn]] inline void throw_not_drawable(int64_t index) {
  throw py::value_error("row " + std::to_string(index) +
                        " is not drawable: it is empty, a final observation, or its stack "
                        "or n-step window is not complete");
}

[[noreturn]] inline void throw_target_out_of_range(int64_t target, uint64_t total) {
  throw py::index_error("target " + std::to_string(target) +
                        " is not in [0, total = " + std::to_string(total) + ")");
}

[[noreturn]] inline void throw_no_weight(int64_t index) {
  throw py::value_error("index " + std::to_string(index) +
                        " has priority 0: it is never drawn and has no weight");
}

[[noreturn]] inline void throw_not_finite(const char* name) {
  throw py::value_error(std::string(name) + " must be finite, not NaN or infinity");
}

[[noreturn]] inline void throw_negative() {
  throw py::value_error("priorities must not be negative");
}

[[noreturn]] inline void throw_nothing_to_draw() {
  throw py::value_error("every priority is 0: there is nothing to draw");
}

[[noreturn]] inline void throw_action_too_large(int64_t action) {
  throw py::value_error("action " + std::to_string(action) + " does not fit 32 bits");
}

[[noreturn]] inline void throw_damaged() {
  throw std::runtime_error("the sum-tree is damaged: an inner node is not the sum of its leaves");
}

// ------------------------------------------------------------------------------------- numbers

inline void check_indices(const int64_t* indices, int64_t n, int64_t size) {
  uint64_t bad = 0;  // negative numbers are large when unsigned
  for (int64_t i = 0; i < n; ++i) bad |= static_cast<uint64_t>(indices[i]) >= uint64_t(size);
  if (!bad) return;
  for (int64_t i = 0; i < n; ++i) {
    if (indices[i] < 0 || indices[i] >= size) throw_index_out_of_range(indices[i], size);
  }
}

inline void check_beta(double beta) {
  if (!(beta >= 0.0 && beta <= 100.0)) throw py::value_error("beta must be from 0 to 100");
}

inline void check_batch_size(int64_t batch_size) {
  if (batch_size < 0 || batch_size > INT32_MAX) {
    throw py::value_error("batch_size must be from 0 to 2^31 - 1");
  }
}

inline void check_capacity(int64_t capacity) {
  if (capacity < 1 || capacity > int64_t{1} << 27) {
    throw py::value_error("capacity must be from 1 to 2^27, not " + std::to_string(capacity));
  }
}

// ------------------------------------------------------------------------- columns of one value

inline void check_column(const TensorView& v, const char* name, int64_t n) {
  if (v.ndim != 1 || v.shape[0] != n) throw_shape(name, to_string(&n, 1), v);
}

inline void check_actions(const TensorView& v, int64_t n) {
  check_column(v, "actions", n);
  if (v.dtype != DType::kInt64 && v.dtype != DType::kInt32) {
    throw_dtype("actions", "int64 or int32", v.dtype);
  }
}

inline void check_rewards(const TensorView& v, int64_t n) {
  check_column(v, "rewards", n);
  if (v.dtype != DType::kFloat32 && v.dtype != DType::kFloat64 && v.dtype != DType::kInt32 &&
      v.dtype != DType::kInt64) {
    throw_dtype("rewards", "floats or integers", v.dtype);
  }
}

// Element i of a 1-D view of numbers on the CPU, as a T.
template <typename T>
T element(const TensorView& v, int64_t i) {
  const int64_t at = i * v.strides[0];
  if (v.dtype == DType::kFloat32) return static_cast<T>(v.as<const float>()[at]);
  if (v.dtype == DType::kFloat64) return static_cast<T>(v.as<const double>()[at]);
  if (v.dtype == DType::kInt32) return static_cast<T>(v.as<const int32_t>()[at]);
  return static_cast<T>(v.as<const int64_t>()[at]);
}

// Actions on the CPU, as int32. ValueError if one does not fit.
inline void read_actions(const TensorView& v, int64_t n, int32_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t action = element<int64_t>(v, i);
    if (action != static_cast<int32_t>(action)) throw_action_too_large(action);
    out[i] = static_cast<int32_t>(action);
  }
}

inline void read_rewards(const TensorView& v, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = element<float>(v, i);
}

// -------------------------------------------------------------------------------------- frames

// The frames that a replay takes, and the observations that it returns.
struct FrameFormat {
  std::vector<int64_t> shape;  // of one frame
  bool float_frames;           // float32, otherwise uint8
  int stack;
  bool stack_axis;  // whether an observation has an axis for the stack
  DType output;     // of obs and next_obs

  int64_t bytes() const {
    int64_t n = float_frames ? 4 : 1;
    for (const int64_t side : shape) n *= side;
    return n;
  }

  // Bytes of a row of pixels: of the last axis, or of as many as make a row of a tile.
  int64_t width() const {
    int64_t n = float_frames ? 4 : 1;
    for (size_t d = shape.size(); d > 0 && n < kLeastTileRow; --d) n *= shape[d - 1];
    return n;
  }

  Output conversion() const {
    if (float_frames || output == DType::kUint8) return Output::kCopy;
    return output == DType::kFloat16    ? Output::kFloat16
           : output == DType::kBfloat16 ? Output::kBfloat16
                                        : Output::kFloat32;
  }

  // Raises unless the view has shape (n, *shape), or with `stacked` (n, [stack,] *shape).
  void check_shape(const TensorView& v, const char* name, int64_t n, bool stacked) const {
    int64_t expected[TensorView::kMaxDims];
    int ndim = 0;
    expected[ndim++] = n;
    if (stacked && stack_axis) expected[ndim++] = stack;
    for (const int64_t side : shape) expected[ndim++] = side;
    bool fits = v.ndim == ndim;
    for (int d = 0; fits && d < ndim; ++d) fits = v.shape[d] == expected[d];
    if (!fits) throw_shape(name, to_string(expected, ndim), v);
  }

  // Frames to store: one for each of n games.
  void check_frames(const TensorView& v, int64_t n) const {
    const DType dtype = float_frames ? DType::kFloat32 : DType::kUint8;
    if (v.dtype != dtype) throw_dtype("frames", name_of(dtype), v.dtype);
    check_shape(v, "frames", n, false);
    if (!v.contiguous_from(1)) throw py::value_error("each game's frame must be contiguous");
  }

  // n observations to write. Returns the stride between them, in bytes.
  int64_t check_observations(const TensorView& v, const char* name, int64_t n,
                             bool channels_last) const {
    if (v.dtype != output) throw_dtype(name, name_of(output), v.dtype);
    check_shape(v, name, n, true);
    int64_t sample = 1;
    for (int d = 1; d < v.ndim; ++d) sample *= v.shape[d];
    bool dense = n == 1 || v.strides[0] >= sample;
    if (channels_last) {
      dense = dense && (stack == 1 || v.strides[1] == 1) &&
              (v.shape[3] == 1 || v.strides[3] == stack) &&
              (v.shape[2] == 1 || v.strides[2] == stack * v.shape[3]);
    } else {
      dense = dense && v.contiguous_from(1);
    }
    if (!dense) {
      throw py::value_error(std::string(name) + " must have contiguous samples, " +
                            (channels_last ? "channels last" : "in C order"));
    }
    if (!v.writable) throw_not_writable(name);
    return v.strides[0] * size_of(v.dtype);
  }
};

}  // namespace fastreplay
