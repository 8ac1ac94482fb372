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
  char* data;
  DType dtype;
  bool on_cpu;
  bool writable;
  int ndim;
  int64_t shape[kMaxDims];
  int64_t strides[kMaxDims];  // in elements

  int64_t numel() const;
  // Whether dimensions first, first + 1, ... lie densely in C order.
  bool contiguous_from(int first) const;
};

// `name` is what errors call the object. Raises TypeError if it is neither a tensor nor an array,
// ValueError if it is not on the CPU.
TensorView view(pybind11::handle object, const char* name);

// The view of a 1-D, contiguous object of this dtype; ValueError or TypeError if it is another, or,
// with n >= 0, not of length n.
TensorView view_1d(pybind11::handle object, const char* name, DType dtype, int64_t n = -1);

// torch.empty(n, dtype=...). torch must be imported.
pybind11::object empty_1d(int64_t n, DType dtype);

// "(2, 84, 84)"
std::string to_string(const int64_t* shape, int ndim);

}  // namespace fastreplay
