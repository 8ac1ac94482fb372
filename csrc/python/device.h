// The device of a replay, and arguments that may be there or on the CPU.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "python/arguments.h"
#include "python/tensor_view.h"

namespace fastreplay {

struct Device {
  int index;                  // TensorView::kCpu, or the number of a CUDA device
  py::object torch_device;    // torch.device
  py::object current_stream;  // CUDA: maps the index to the handle of torch's current stream

  bool is_cpu() const { return index == TensorView::kCpu; }
  bool holds(const TensorView& v) const { return v.device == index; }
  std::string name() const {
    return is_cpu() ? "the CPU" : py::cast<std::string>(py::str(torch_device));
  }

  // A read-only argument, on this device or on the CPU. ValueError if it is elsewhere.
  TensorView input(const py::handle& object, const char* name) const {
    const TensorView v = view(object, name);
    if (holds(v) || v.device == TensorView::kCpu) return v;
    throw py::value_error(std::string(name) + " must be on " + this->name() + ", like the replay" +
                          (is_cpu() ? "" : ", or on the CPU"));
  }

  // ValueError unless the view is on this device.
  void check_resident(const TensorView& v, const char* name) const {
    if (holds(v)) return;
    throw py::value_error(std::string(name) + " must be on " + this->name() + ", like the replay");
  }

  // The memory of a contiguous array (n,) of T on this device, to write.
  template <typename T>
  T* output(const py::handle& object, const char* name, int64_t n) const {
    const TensorView v = view(object, name);
    check_1d(v, name, dtype_of<T>(), n);
    check_resident(v, name);
    if (!v.writable) throw_not_writable(name);
    return v.as<T>();
  }

  // The same for `out`. If it is None, it becomes a new tensor.
  template <typename T>
  T* output_or_new(py::object& out, int64_t n) const {
    if (out.is_none()) {
      out = empty_1d(n, dtype_of<T>(), is_cpu() ? py::object() : torch_device);
    }
    return output<T>(out, "out", n);
  }
};

// A list or tuple of Python integers as an int64 tensor on the CPU. TypeError for other elements,
// including bool.
inline py::object integers_from_sequence(const py::handle& sequence, const char* name) {
  const py::tuple items(py::reinterpret_borrow<py::object>(sequence));  // a copy: a list may change
  const int64_t n = static_cast<int64_t>(items.size());
  py::object tensor = empty_1d(n, DType::kInt64);
  int64_t* const to = view(tensor, name).as<int64_t>();
  for (int64_t i = 0; i < n; ++i) {
    PyObject* const item = PyTuple_GET_ITEM(items.ptr(), i);
    PyObject* const integer = PyBool_Check(item) ? nullptr : PyNumber_Index(item);
    if (integer == nullptr) {
      PyErr_Clear();
      throw py::type_error(std::string(name) + " must contain integers, not " +
                           Py_TYPE(item)->tp_name);
    }
    int overflow = 0;
    to[i] = PyLong_AsLongLongAndOverflow(integer, &overflow);
    Py_DECREF(integer);
    if (overflow != 0) throw py::index_error(std::string(name) + " must fit 64 bits");
  }
  return tensor;
}

// Read-only integers (n,): int64 is used in place, int32 and lists are converted.
struct Indices {
  py::object owner;  // of `data`
  const int64_t* data;
  int64_t n;
  bool on_cpu;

  // Indices on the CPU are checked to be in [0, size).
  Indices(const py::object& object, const char* name, const Device& device, int64_t size)
      : Indices(object, name, device) {
    if (on_cpu) check_indices(data, n, size);
  }

  Indices(const py::object& object, const char* name, const Device& device) : owner(object) {
    if (PyList_Check(object.ptr()) || PyTuple_Check(object.ptr())) {
      owner = integers_from_sequence(object, name);
    }
    TensorView v = device.input(owner, name);
    if (v.dtype == DType::kInt32) {
      check_1d(v, name, DType::kInt32);
      v = widen(v, name);
    } else if (v.dtype != DType::kInt64) {
      throw_dtype(name, "int64 or int32", v.dtype);
    }
    check_1d(v, name, DType::kInt64);
    data = v.as<const int64_t>();
    n = v.shape[0];
    on_cpu = v.device == TensorView::kCpu;
  }

 private:
  TensorView widen(const TensorView& v, const char* name) {
    if (v.device != TensorView::kCpu) {
      owner = owner.attr("long")();
      return view(owner, name);
    }
    py::object wide = empty_1d(v.shape[0], DType::kInt64);
    const TensorView to = view(wide, name);
    std::copy_n(v.as<const int32_t>(), v.shape[0], to.as<int64_t>());
    owner = std::move(wide);
    return to;
  }
};

// Rows and a float32 or float64 value for each: priorities or TD errors. What is on the CPU is
// checked here. Rows may be on the CPU with values on the device, but not the other way round.
struct Pairs {
  Indices indices;
  TensorView values;
  const double* cpu_values;  // null if on the device; valid until the thread's next Pairs

  Pairs(const py::object& rows, const py::object& numbers, const char* name, bool may_be_negative,
        int64_t size, const Device& device)
      : indices(rows, "indices", device, size), values(device.input(numbers, name)) {
    if (values.dtype != DType::kFloat32 && values.dtype != DType::kFloat64) {
      throw_dtype(name, "float32 or float64", values.dtype);
    }
    check_1d(values, name, values.dtype, indices.n);
    const bool on_cpu = values.device == TensorView::kCpu;
    if (on_cpu && !indices.on_cpu) {
      throw py::value_error(std::string(name) + " must be on " + device.name() +
                            ", like the indices");
    }
    cpu_values = on_cpu ? read_finite(name) : nullptr;
    if (!on_cpu || may_be_negative) return;
    bool negative = false;
    for (int64_t i = 0; i < indices.n; ++i) negative |= cpu_values[i] < 0.0;
    if (negative) throw_negative();
  }

 private:
  const double* read_finite(const char* name) const {
    // One per thread: another thread may call the same replay while this one waits.
    static thread_local std::vector<double> doubles;
    const int64_t n = indices.n;
    doubles.resize(static_cast<size_t>(n));
    double* const out = doubles.data();
    if (values.dtype == DType::kFloat32) {
      std::copy_n(values.as<const float>(), n, out);
    } else {
      std::copy_n(values.as<const double>(), n, out);
    }
    bool finite = true;
    for (int64_t i = 0; i < n; ++i) finite &= std::abs(out[i]) <= 1.7976931348623157e308;
    if (!finite) throw_not_finite(name);
    return out;
  }
};

}  // namespace fastreplay
