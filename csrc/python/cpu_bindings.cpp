// fastreplay._cpu: the classes of bindings.h on the CPU, and what only the CPU has.
#include <pybind11/pybind11.h>

#include "cpu/huge_pages.h"
#include "cpu/instructions.h"
#include "cpu/thread_pool.h"
#include "python/bindings.h"
#include "python/cpu_backend.h"

namespace fastreplay {
namespace {

const char* const kInstructionSets[] = {"plain", "avx2", "avx512"};

std::string instruction_set_name() { return kInstructionSets[static_cast<int>(instruction_set())]; }

void use_instruction_set_name(const std::string& name) {
  for (int i = 0; i < 3; ++i) {
    if (name == kInstructionSets[i]) return use_instruction_set(static_cast<InstructionSet>(i));
  }
  throw py::value_error("no such instruction set: " + name);
}

}  // namespace
}  // namespace fastreplay

PYBIND11_MODULE(_cpu, m) {
  using namespace fastreplay;
  m.doc() = "The C++ half of fastreplay: use fastreplay.SumTree and fastreplay.FrameReplay.";
  bind_device(m);
  bind_tree<CpuTree>(m);
  bind_ring<CpuRing>(m);

  m.def(
      "use_huge_pages",
      [](uintptr_t address, int64_t bytes) {
        return use_huge_pages(reinterpret_cast<void*>(address), bytes);
      },
      py::arg("address"), py::arg("bytes"),
      "Asks the kernel to back this memory with huge pages. Returns whether it accepted.");
  m.def(
      "mark_drawable",
      [](const py::object& flags, int64_t stored, int64_t head, int stack, int n_step) {
        const TensorView v = view(flags, "flags");
        uint8_t* all = reinterpret_cast<uint8_t*>(v.data);
        return mark_drawable(all, v.shape[0], v.shape[1], stored, head, stack, n_step);
      },
      py::arg("flags"), py::arg("stored"), py::arg("head"), py::arg("stack"), py::arg("n_step"),
      "Recomputes flag kDrawable of flags (num_envs, rows) uint8. Returns how many rows have it.");
  // Looks up torch's OpenMP runtime in this process: a child of fork() must not use it.
  (void)openmp_threads();
  m.def("openmp_threads", &openmp_threads,
        "How many threads torch's OpenMP runtime uses; 0 if it cannot be used.");
  m.def("instruction_set", &instruction_set_name, "plain, avx2 or avx512: the one in use.");
  m.def("use_instruction_set", &use_instruction_set_name, py::arg("name"),
        "Selects an instruction set. Raises ValueError if the processor lacks it.");
}
