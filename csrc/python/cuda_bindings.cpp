// The names of fastreplay._cuda. Docstrings of methods that _cpu has too are in cpu_bindings.cpp.
#include <pybind11/pybind11.h>

#include "cuda/reference.h"
#include "python/cuda_checked.h"

namespace py = pybind11;

PYBIND11_MODULE(_cuda, m) {
  using namespace fastreplay;
  m.doc() = "The CUDA half of fastreplay: use fastreplay.SumTree and FrameReplay with device=...";

  // module_local: the tests load this module a second time, compiled for the CPU.
  py::class_<Device>(m, "Device", py::module_local(), "A device of torch.")
      .def(py::init([](int index, py::object torch_device, py::object current_stream) {
             return Device{index, std::move(torch_device), std::move(current_stream)};
           }),
           py::arg("index"), py::arg("torch_device"), py::arg("current_stream"));

  py::class_<CudaSumTree>(m, "SumTree", py::module_local(),
                          "Memory checks and calls for fastreplay.SumTree.")
      .def(py::init<int64_t, py::tuple, const Device&, double, uint64_t>(), py::arg("capacity"),
           py::arg("memory"), py::arg("device"), py::arg("alpha"), py::arg("seed"))
      .def_static("slots", &CudaSumTree::slots, "Words of the tree: its leaves first.")
      .def("set", &CudaSumTree::set, py::arg("indices"), py::arg("priorities"))
      .def("get", &CudaSumTree::get, py::arg("indices"), py::arg("out") = py::none())
      .def("total", &CudaSumTree::total, "The exact sum of all leaves. Waits for the stream.")
      .def("find", &CudaSumTree::find, py::arg("targets"), py::arg("out") = py::none())
      .def("sample", &CudaSumTree::sample, py::arg("batch_size"), py::arg("stratified") = false,
           py::arg("out") = py::none())
      .def("weights", &CudaSumTree::weights, py::arg("indices"), py::arg("beta"),
           py::arg("out") = py::none())
      .def("check", &CudaSumTree::check,
           "Waits for the stream, and raises what the device has seen going wrong since the last\n"
           "call that waited.")
      .def("check_valid", &CudaSumTree::check_valid)
      .def("rebuild", &CudaSumTree::rebuild)
      .def_property_readonly("capacity", [](const CudaSumTree& t) { return t.tree.capacity; })
      .def_readwrite("seed", &CudaSumTree::seed)
      .def_property("calls", &CudaSumTree::calls, &CudaSumTree::set_calls)
      .def_readonly("alpha", &CudaSumTree::alpha);

  py::class_<CudaFrameRing>(m, "FrameRing", py::module_local(),
                            "Memory checks and calls for fastreplay.FrameReplay.")
      .def(py::init<py::tuple, py::object, const Device&, py::tuple, bool, int, bool, uint64_t>(),
           py::arg("memory"), py::arg("tree"), py::arg("device"), py::arg("frame_shape"),
           py::arg("float_frames"), py::arg("stack"), py::arg("stack_axis"), py::arg("seed"))
      .def_static("row_bytes", &CudaFrameRing::row_bytes)
      .def("add", &CudaFrameRing::add, py::arg("frames"), py::arg("actions"), py::arg("rewards"),
           py::arg("terminations"), py::arg("episode_starts"))
      .def("draw", &CudaFrameRing::draw)
      .def("gather", &CudaFrameRing::gather)
      .def("drawable", &CudaFrameRing::drawable)
      .def("update", &CudaFrameRing::update)
      .def("restore", &CudaFrameRing::restore)
      .def("check", [](CudaFrameRing& r) { (void)r.read(); })
      .def_property_readonly("stored", &CudaFrameRing::stored)
      .def_property_readonly("head", [](CudaFrameRing& r) { return r.read().head; })
      .def_property_readonly("n_drawable", [](CudaFrameRing& r) { return r.read().n_drawable; })
      .def_property_readonly("max_leaf", [](CudaFrameRing& r) { return r.read().max_leaf; })
      .def_property_readonly("calls", [](CudaFrameRing& r) { return r.read().calls; })
      .def_property("beta", &CudaFrameRing::beta, &CudaFrameRing::set_beta)
      .def_readwrite("seed", &CudaFrameRing::seed);

  py::class_<PinnedMemory>(m, "PinnedMemory", py::module_local(), py::buffer_protocol(),
                           "Bytes of the host that the device reads and writes too.")
      .def(py::init([](int64_t bytes, int index) {
             const DeviceGuard guard(std::max(index, 0));
             return std::make_unique<PinnedMemory>(bytes);
           }),
           py::arg("bytes"), py::arg("index"))
      .def_buffer([](PinnedMemory& memory) {
        return py::buffer_info(memory.data(), 1, "B", memory.bytes());
      });

  m.def("use_kernels", &use_kernels, py::arg("kernels"),
        "Launches the \"tuned\" (default) or the plain \"reference\" kernels from now on, in the\n"
        "whole process. Returns the name in use before. Raises ValueError for another name.");
  m.attr("STAGING_SLOTS") = py::int_(Staging::kSlots);
  m.def("free_memory", [](int index) {
    const DeviceGuard guard(std::max(index, 0));
    size_t free = 0, all = 0;
    check_cuda(cudaMemGetInfo(&free, &all), "cudaMemGetInfo");
    return free;
  });
}
