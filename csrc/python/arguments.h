// Checks of what Python passes, and the errors that say what is wrong with it. Shared by the CPU
// and the CUDA classes: the views may lie on either, unless a comment says otherwise.
#pragma once

#include <pybind11/pybind11.h>

#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/convert.h"
#include "python/tensor_view.h"

namespace fastreplay {

namespace py = pybind11;

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

inline void check_indices(const int64_t* indices, int64_t n, int64_t size) {
  uint64_t bad = 0;  // negative numbers are large as unsigned ones
  for (int64_t i = 0; i < n; ++i) bad |= static_cast<uint64_t>(indices[i]) >= uint64_t(size);
  if (!bad) return;
  for (int64_t i = 0; i < n; ++i) {
    if (indices[i] < 0 || indices[i] >= size) throw_index_out_of_range(indices[i], size);
  }
}

// `name` is what errors call the view.
inline void check_floats(const TensorView& v, const char* name, int64_t n) {
  if (v.dtype != DType::kFloat32 && v.dtype != DType::kFloat64) {
    throw py::type_error(std::string(name) + " must be float32 or float64, not " +
                         name_of(v.dtype));
  }
  check_1d(v, name, v.dtype, n);
}

// float32 or float64 numbers on the CPU as doubles, each finite.
inline const double* finite_doubles(const TensorView& v, const char* name, int64_t n,
                                    std::vector<double>& scratch) {
  scratch.resize(static_cast<size_t>(n));
  double* out = scratch.data();
  if (v.dtype == DType::kFloat32) {
    const float* in = reinterpret_cast<const float*>(v.data);
    for (int64_t i = 0; i < n; ++i) out[i] = in[i];
  } else {
    const double* in = reinterpret_cast<const double*>(v.data);
    for (int64_t i = 0; i < n; ++i) out[i] = in[i];
  }
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) finite &= std::abs(out[i]) <= 1.7976931348623157e308;
  if (!finite) throw_not_finite(name);
  return out;
}

// Element i of a 1-D view of numbers, as a T.
template <typename T>
T element(const TensorView& v, int64_t i) {
  const int64_t at = i * v.strides[0];
  if (v.dtype == DType::kFloat32) return static_cast<T>(reinterpret_cast<const float*>(v.data)[at]);
  if (v.dtype == DType::kFloat64) {
    return static_cast<T>(reinterpret_cast<const double*>(v.data)[at]);
  }
  if (v.dtype == DType::kInt32) return static_cast<T>(reinterpret_cast<const int32_t*>(v.data)[at]);
  return static_cast<T>(reinterpret_cast<const int64_t*>(v.data)[at]);
}

template <typename T>
T* writable_1d(const py::handle& object, const char* name, DType dtype, int64_t n) {
  const TensorView v = view_1d(object, name, dtype, n);
  if (!v.writable) throw py::value_error(std::string(name) + " must be writable");
  return reinterpret_cast<T*>(v.data);
}

// The shape of one frame, its dtype, and whether a batch has an axis for the stack.
struct FrameFormat {
  std::vector<int64_t> shape;
  bool floats;  // float32, or else uint8
  int stack;
  bool stack_axis;

  int64_t bytes() const {
    int64_t n = floats ? 4 : 1;
    for (const int64_t side : shape) n *= side;
    return n;
  }
};

// One frame for each of n games.
inline void check_frames(const TensorView& v, const FrameFormat& format, int64_t n) {
  const DType dtype = format.floats ? DType::kFloat32 : DType::kUint8;
  if (v.dtype != dtype) {
    throw py::type_error(std::string("frames must be ") + name_of(dtype) + ", not " +
                         name_of(v.dtype));
  }
  std::vector<int64_t> expected{n};
  expected.insert(expected.end(), format.shape.begin(), format.shape.end());
  bool fits = v.ndim == static_cast<int>(expected.size());
  for (int d = 0; fits && d < v.ndim; ++d) fits = v.shape[d] == expected[static_cast<size_t>(d)];
  if (!fits) {
    throw py::value_error("frames must have shape " +
                          to_string(expected.data(), static_cast<int>(expected.size())) + ", not " +
                          to_string(v.shape, v.ndim));
  }
  if (!v.contiguous_from(1)) throw py::value_error("each game's frame must be contiguous");
}

inline void check_column(const TensorView& v, const char* name, int64_t n) {
  if (v.ndim != 1 || v.shape[0] != n) {
    throw py::value_error(std::string(name) + " must have shape (" + std::to_string(n) +
                          ",), not " + to_string(v.shape, v.ndim));
  }
}

inline void check_actions(const TensorView& v, int64_t n) {
  check_column(v, "actions", n);
  if (v.dtype != DType::kInt64 && v.dtype != DType::kInt32) {
    throw py::type_error(std::string("actions must be int64 or int32, not ") + name_of(v.dtype));
  }
}

inline void check_rewards(const TensorView& v, int64_t n) {
  check_column(v, "rewards", n);
  if (v.dtype != DType::kFloat32 && v.dtype != DType::kFloat64 && v.dtype != DType::kInt32 &&
      v.dtype != DType::kInt64) {
    throw py::type_error(std::string("rewards must be floats or integers, not ") +
                         name_of(v.dtype));
  }
}

// Actions on the CPU.
inline void read_actions(const TensorView& v, int64_t n, int32_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t action = element<int64_t>(v, i);
    if (action != static_cast<int32_t>(action)) throw_action_too_large(action);
    out[i] = static_cast<int32_t>(action);
  }
}

// A batch of n observations to write: shape (n, [stack,] *frame_shape), each sample dense. Returns
// the bytes from one to the next.
inline int64_t check_frames_out(const TensorView& v, const char* name, int64_t n,
                                const FrameFormat& format, bool channels_last) {
  const bool known = format.floats ? v.dtype == DType::kFloat32
                                   : v.dtype == DType::kUint8 || v.dtype == DType::kFloat16 ||
                                         v.dtype == DType::kBfloat16 || v.dtype == DType::kFloat32;
  if (!known) throw py::type_error(std::string(name) + " cannot be " + name_of(v.dtype));
  const int stack = format.stack;
  std::vector<int64_t> expected{n};
  if (format.stack_axis) expected.push_back(stack);
  expected.insert(expected.end(), format.shape.begin(), format.shape.end());
  bool fits = v.ndim == static_cast<int>(expected.size());
  for (int d = 0; fits && d < v.ndim; ++d) fits = v.shape[d] == expected[static_cast<size_t>(d)];
  if (!fits) {
    throw py::value_error(std::string(name) + " must have shape " +
                          to_string(expected.data(), static_cast<int>(expected.size())) + ", not " +
                          to_string(v.shape, v.ndim));
  }
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
    throw py::value_error(std::string(name) + " must hold each sample densely, " +
                          (channels_last ? "channels last" : "in C order"));
  }
  return v.strides[0] * size_of(v.dtype);
}

// What the dtype of a batch of frames asks for.
inline Output output_of(DType dtype, bool float_frames) {
  if (float_frames || dtype == DType::kUint8) return Output::kCopy;
  return dtype == DType::kFloat16    ? Output::kFloat16
         : dtype == DType::kBfloat16 ? Output::kBfloat16
                                     : Output::kFloat32;
}

inline void check_beta(double beta) {
  if (!(beta >= 0.0 && beta <= 100.0)) throw py::value_error("beta must be from 0 to 100");
}

inline void check_batch_size(int64_t batch_size) {
  if (batch_size < 0 || batch_size > INT32_MAX) {
    throw py::value_error("batch_size must be from 0 to 2^31 - 1");
  }
}

inline void check_capacity(int64_t capacity, int64_t most) {
  if (capacity < 1 || capacity > most) {
    throw py::value_error("capacity must be from 1 to 2^27, not " + std::to_string(capacity));
  }
}

}  // namespace fastreplay
