#include "python/tensor_view.h"

#include <cstring>

namespace py = pybind11;

namespace fastreplay {
namespace {

// The structures of DLPack 1.x that are read here, as its specification defines them.
namespace dlpack {
struct Tensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;  // null: C order
  uint64_t byte_offset;
};
struct Exchange {
  uint32_t major, minor;
  void* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_object;
  void* managed_tensor_to_object;
  int (*tensor_from_object)(void* object, Tensor* out);
  void* current_work_stream;
};
constexpr int kCpu = 1, kCuda = 2, kCudaHost = 3;  // device types; kCudaHost: pinned host memory
}  // namespace dlpack

struct Torch {
  PyTypeObject* tensor_type = nullptr;
  const dlpack::Exchange* exchange = nullptr;
};

// torch, if the process has imported it.
const Torch& torch_module() {
  static Torch torch;
  if (torch.tensor_type == nullptr) {
    PyObject* module = PyDict_GetItemString(PyImport_GetModuleDict(), "torch");
    if (module == nullptr || !py::hasattr(module, "Tensor")) return torch;
    py::object type = py::reinterpret_borrow<py::object>(module).attr("Tensor");
    if (py::hasattr(type, "__dlpack_c_exchange_api__")) {
      py::object capsule = type.attr("__dlpack_c_exchange_api__");
      const void* pointer = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
      if (pointer == nullptr) PyErr_Clear();
      const auto* exchange = static_cast<const dlpack::Exchange*>(pointer);
      if (exchange != nullptr && exchange->major == 1) torch.exchange = exchange;
    }
    torch.tensor_type = reinterpret_cast<PyTypeObject*>(type.release().ptr());
  }
  return torch;
}

DType dtype_from_code(int code, int bits, int lanes) {
  if (lanes != 1) return DType::kOther;
  if (code == 6 && bits == 8) return DType::kBool;
  if (code == 1 && bits == 8) return DType::kUint8;
  if (code == 0 && bits == 32) return DType::kInt32;
  if (code == 0 && bits == 64) return DType::kInt64;
  if (code == 2 && bits == 16) return DType::kFloat16;
  if (code == 4 && bits == 16) return DType::kBfloat16;
  if (code == 2 && bits == 32) return DType::kFloat32;
  if (code == 2 && bits == 64) return DType::kFloat64;
  return DType::kOther;
}

void set_c_strides(TensorView& v) {
  int64_t stride = 1;
  for (int d = v.ndim - 1; d >= 0; --d) {
    v.strides[d] = stride;
    stride *= v.shape[d];
  }
}

bool from_exchange(const dlpack::Exchange& exchange, py::handle object, TensorView& v) {
  if (exchange.tensor_from_object == nullptr) return false;
  dlpack::Tensor tensor;
  if (exchange.tensor_from_object(object.ptr(), &tensor) != 0) {
    PyErr_Clear();
    return false;
  }
  if (tensor.ndim > TensorView::kMaxDims) return false;
  v.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  v.dtype = dtype_from_code(tensor.code, tensor.bits, tensor.lanes);
  v.device = TensorView::kElsewhere;
  if (tensor.device_type == dlpack::kCpu || tensor.device_type == dlpack::kCudaHost) {
    v.device = TensorView::kCpu;
  } else if (tensor.device_type == dlpack::kCuda) {
    v.device = tensor.device_id;
  }
  v.writable = true;
  v.ndim = tensor.ndim;
  for (int d = 0; d < v.ndim; ++d) v.shape[d] = tensor.shape[d];
  if (tensor.strides == nullptr) {
    set_c_strides(v);
  } else {
    for (int d = 0; d < v.ndim; ++d) v.strides[d] = tensor.strides[d];
  }
  return true;
}

void from_attributes(py::handle tensor, const char* name, TensorView& v) {
  const std::string dtype = py::str(tensor.attr("dtype"));  // "torch.float32"
  v.dtype = dtype_named(dtype.substr(dtype.find('.') + 1));
  const py::object device = tensor.attr("device");
  const std::string type = py::cast<std::string>(device.attr("type"));
  v.device = TensorView::kElsewhere;
  if (type == "cpu") v.device = TensorView::kCpu;
  if (type == "cuda") v.device = py::cast<int>(device.attr("index"));
  v.writable = true;
  const py::tuple shape = tensor.attr("shape"), strides = tensor.attr("stride")();
  v.ndim = static_cast<int>(shape.size());
  if (v.ndim > TensorView::kMaxDims) {
    throw py::value_error(std::string(name) + " has too many dimensions");
  }
  for (int d = 0; d < v.ndim; ++d) {
    v.shape[d] = py::cast<int64_t>(shape[static_cast<size_t>(d)]);
    v.strides[d] = py::cast<int64_t>(strides[static_cast<size_t>(d)]);
  }
  v.data = nullptr;
  if (v.device != TensorView::kElsewhere) {
    v.data = reinterpret_cast<char*>(py::cast<uintptr_t>(tensor.attr("data_ptr")()));
  }
}

void from_buffer(py::handle object, const char* name, TensorView& v) {
  Py_buffer buffer;
  if (PyObject_GetBuffer(object.ptr(), &buffer, PyBUF_RECORDS_RO) != 0) {
    PyErr_Clear();
    throw py::type_error(std::string(name) + " must be a torch tensor or a NumPy array, not " +
                         Py_TYPE(object.ptr())->tp_name);
  }
  v.data = static_cast<char*>(buffer.buf);
  v.device = TensorView::kCpu;
  v.writable = !buffer.readonly;
  v.ndim = buffer.ndim;
  const char* format = buffer.format == nullptr ? "B" : buffer.format;
  const char code = std::strlen(format) == 1 ? format[0] : '\0';
  const int64_t size = buffer.itemsize;
  v.dtype = DType::kOther;
  if (code == '?') v.dtype = DType::kBool;
  if (code == 'B') v.dtype = DType::kUint8;
  if (code == 'i' || code == 'l' || code == 'q') {
    v.dtype = size == 8 ? DType::kInt64 : DType::kInt32;
  }
  if (code == 'e') v.dtype = DType::kFloat16;
  if (code == 'f') v.dtype = DType::kFloat32;
  if (code == 'd') v.dtype = DType::kFloat64;
  const bool fits = v.ndim <= TensorView::kMaxDims;
  bool whole = true;
  for (int d = 0; fits && whole && d < v.ndim; ++d) {
    v.shape[d] = buffer.shape[d];
    whole = buffer.strides[d] % size == 0;
    v.strides[d] = buffer.strides[d] / size;
  }
  PyBuffer_Release(&buffer);  // the caller's reference keeps the memory alive
  if (!fits) throw py::value_error(std::string(name) + " has too many dimensions");
  if (!whole) {
    throw py::value_error(std::string(name) + " must have strides in multiples of its item size");
  }
}

}  // namespace

const char* name_of(DType dtype) {
  static const char* const names[] = {"bool",     "uint8",   "int32",   "int64",        "float16",
                                      "bfloat16", "float32", "float64", "another dtype"};
  return names[static_cast<int>(dtype)];
}

int size_of(DType dtype) {
  static const int sizes[] = {1, 1, 4, 8, 2, 2, 4, 8, 0};
  return sizes[static_cast<int>(dtype)];
}

DType dtype_named(const std::string& name) {
  for (int i = 0; i < static_cast<int>(DType::kOther); ++i) {
    if (name == name_of(static_cast<DType>(i))) return static_cast<DType>(i);
  }
  return DType::kOther;
}

int64_t TensorView::numel() const {
  int64_t n = 1;
  for (int d = 0; d < ndim; ++d) n *= shape[d];
  return n;
}

bool TensorView::contiguous_from(int first) const {
  if (numel() == 0) return true;  // the strides of an empty tensor are arbitrary
  int64_t stride = 1;
  for (int d = ndim - 1; d >= first; --d) {
    if (shape[d] != 1 && strides[d] != stride) return false;
    stride *= shape[d];
  }
  return true;
}

TensorView view(py::handle object, const char* name) {
  TensorView v;
  const Torch& torch = torch_module();
  v.is_tensor = torch.tensor_type != nullptr && PyObject_TypeCheck(object.ptr(), torch.tensor_type);
  if (v.is_tensor) {
    // A subclass may wrap another tensor, so it is read through its attributes.
    const bool exact = Py_TYPE(object.ptr()) == torch.tensor_type;
    const bool exchanged =
        exact && torch.exchange != nullptr && from_exchange(*torch.exchange, object, v);
    if (!exchanged) from_attributes(object, name, v);
  } else {
    from_buffer(object, name, v);
  }
  return v;
}

void throw_dtype(const char* name, const std::string& expected, DType dtype) {
  throw py::type_error(std::string(name) + " must be " + expected + ", not " + name_of(dtype));
}

void throw_shape(const char* name, const std::string& expected, const TensorView& v) {
  throw py::value_error(std::string(name) + " must have shape " + expected + ", not " +
                        to_string(v.shape, v.ndim));
}

void throw_not_writable(const char* name) {
  throw py::value_error(std::string(name) + " must be writable");
}

void check_1d(const TensorView& v, const char* name, DType dtype, int64_t n) {
  if (v.dtype != dtype) throw_dtype(name, name_of(dtype), v.dtype);
  if (v.ndim != 1 || (n >= 0 && v.shape[0] != n)) {
    throw_shape(name, n >= 0 ? to_string(&n, 1) : std::string("(n,)"), v);
  }
  if (!v.contiguous_from(0)) throw py::value_error(std::string(name) + " must be contiguous");
}

py::object empty_1d(int64_t n, DType dtype, py::handle device) {
  static PyObject* const torch = py::module_::import("torch").release().ptr();
  static PyObject* const empty = PyObject_GetAttrString(torch, "empty");
  static PyObject* const keywords = py::make_tuple("dtype", "device").release().ptr();
  // Given always: without it the tensor would be on torch.set_default_device().
  static PyObject* const cpu = py::str("cpu").release().ptr();
  static PyObject* dtypes[static_cast<int>(DType::kOther)] = {};
  PyObject*& torch_dtype = dtypes[static_cast<int>(dtype)];
  if (torch_dtype == nullptr) torch_dtype = PyObject_GetAttrString(torch, name_of(dtype));
  const py::int_ length(n);
  PyObject* const arguments[] = {length.ptr(), torch_dtype, device ? device.ptr() : cpu};
  PyObject* tensor = PyObject_Vectorcall(empty, arguments, 1, keywords);
  if (tensor == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(tensor);
}

std::string to_string(const int64_t* shape, int ndim) {
  std::string text = "(";
  for (int d = 0; d < ndim; ++d) text += (d > 0 ? ", " : "") + std::to_string(shape[d]);
  return text + (ndim == 1 ? ",)" : ")");
}

}  // namespace fastreplay
