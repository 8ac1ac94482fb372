// The memory of a torch tensor or a NumPy array, without linking to either library.
//
// torch tensors are read through DLPack's C exchange table (torch 2.10 and later; some tens of
// nanoseconds), older ones through their Python attributes, anything else through the buffer
// protocol.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <type_traits>

namespace fastreplay {

enum class DType { kBool, kUint8, kInt32, kInt64, kFloat16, kBfloat16, kFloat32, kFloat64, kOther };

template <typename T>
constexpr DType dtype_of() {
  if constexpr (std::is_same_v<T, bool>) return DType::kBool;
  if constexpr (std::is_same_v<T, uint8_t>) return DType::kUint8;
  if constexpr (std::is_same_v<T, int32_t>) return DType::kInt32;
  if constexpr (std::is_same_v<T, int64_t>) return DType::kInt64;
  if constexpr (std::is_same_v<T, float>) return DType::kFloat32;
  if constexpr (std::is_same_v<T, double>) return DType::kFloat64;
  return DType::kOther;
}

const char* name_of(DType dtype);
int size_of(DType dtype);
// The dtype of this name; kOther if there is none.
DType dtype_named(const std::string& name);

struct TensorView {
  static constexpr int kMaxDims = 10;
  static constexpr int kCpu = -1, kElsewhere = -2;
  char* data;  // null if neither on the CPU nor on a CUDA device
  DType dtype;
  int device;      // kCpu, the number of a CUDA device, or kElsewhere
  bool is_tensor;  // a torch tensor
  bool writable;
  int ndim;
  int64_t shape[kMaxDims];
  int64_t strides[kMaxDims];  // in elements

  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data);
  }
  int64_t numel() const;
  // Whether the dimensions from `first` on are contiguous in C order.
  bool contiguous_from(int first) const;
};

// The view of `object`, which is called `name` in error messages. TypeError if it is neither a
// tensor nor an array.
TensorView view(pybind11::handle object, const char* name);

// TypeError or ValueError unless the view is 1-D, contiguous, of this dtype and, with n >= 0, of
// length n.
void check_1d(const TensorView& v, const char* name, DType dtype, int64_t n = -1);

[[noreturn]] void throw_dtype(const char* name, const std::string& expected, DType dtype);
[[noreturn]] void throw_shape(const char* name, const std::string& expected, const TensorView& v);
[[noreturn]] void throw_not_writable(const char* name);

// torch.empty(n, dtype=..., device=...); no device means the CPU.
pybind11::object empty_1d(int64_t n, DType dtype, pybind11::handle device = {});

// "(2, 84, 84)"
std::string to_string(const int64_t* shape, int ndim);

}  // namespace fastreplay
