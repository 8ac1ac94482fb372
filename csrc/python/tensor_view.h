// What a torch tensor or a NumPy array says about its memory, without linking to either.
//
// torch tensors are read through the exchange table of DLPack (torch 2.10 and later; some tens of
// nanoseconds) or else through their Python attributes; anything else through the buffer protocol.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

namespace fastreplay {

enum class DType { kBool, kUint8, kInt32, kInt64, kFloat16, kBfloat16, kFloat32, kFloat64, kOther };

const char* name_of(DType dtype);
int size_of(DType dtype);

struct TensorView {
  static constexpr int kMaxDims = 10;
  static constexpr int kCpu = -1, kElsewhere = -2;
  char* data;  // null if neither on the CPU nor on a CUDA device
  DType dtype;
  int device;      // kCpu, kElsewhere, or the number of a CUDA device
  bool is_tensor;  // of torch
  bool writable;
  int ndim;
  int64_t shape[kMaxDims];
  int64_t strides[kMaxDims];  // in elements

  int64_t numel() const;
  // Whether dimensions first, first + 1, ... lie densely in C order.
  bool contiguous_from(int first) const;
};

// `name` is what errors call the object. Raises TypeError if it is neither a tensor nor an array.
TensorView view_anywhere(pybind11::handle object, const char* name);

// The same on the CPU; ValueError elsewhere.
TensorView view(pybind11::handle object, const char* name);

// Raises ValueError or TypeError unless the view is 1-D, contiguous, of this dtype and, with n >=
// 0, of length n.
void check_1d(const TensorView& v, const char* name, DType dtype, int64_t n = -1);

// view() and check_1d().
TensorView view_1d(pybind11::handle object, const char* name, DType dtype, int64_t n = -1);

// torch.empty(n, dtype=..., device=...), without a device on the CPU. torch must be imported.
pybind11::object empty_1d(int64_t n, DType dtype, pybind11::handle device = {});

// "(2, 84, 84)"
std::string to_string(const int64_t* shape, int ndim);

}  // namespace fastreplay
