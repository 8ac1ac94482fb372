// fastreplay._cuda: the classes of bindings.h on a CUDA device, and what only CUDA has.
#include <pybind11/pybind11.h>

#include "cuda/reference.h"
#include "python/bindings.h"
#include "python/cuda_backend.h"

namespace py = pybind11;

PYBIND11_MODULE(_cuda, m) {
  using namespace fastreplay;
  m.doc() = "The CUDA half of fastreplay: use fastreplay.SumTree and FrameReplay with device=...";
  bind_device(m);
  bind_tree<CudaTree>(m);
  bind_ring<CudaRing>(m).def_static("row_bytes", &CudaRing::row_bytes, py::arg("num_envs"),
                                    py::arg("frame_bytes"), py::arg("tiles"),
                                    "Bytes of a staging slot for one row of each game.");

  py::class_<PinnedMemory>(m, "PinnedMemory", py::module_local(), py::buffer_protocol(),
                           "Pinned host memory, which the device can read and write.")
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
        "whole process. Returns the previous name. Raises ValueError for another name.");
  m.attr("STAGING_SLOTS") = py::int_(Staging::kSlots);
  m.def(
      "free_memory",
      [](int index) {
        const DeviceGuard guard(std::max(index, 0));
        size_t free = 0, all = 0;
        check_cuda(cudaMemGetInfo(&free, &all), "cudaMemGetInfo");
        return free;
      },
      py::arg("index"), "Free bytes on a CUDA device.");
}
