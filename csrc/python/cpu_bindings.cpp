// The names and docstrings of fastreplay._cpu.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "python/cpu_checked.h"
#include "cpu/instructions.h"
#include "cpu/thread_pool.h"

namespace py = pybind11;

namespace fastreplay {
namespace {

std::string instruction_set_name() {
  static const char* const names[] = {"plain", "avx2", "avx512"};
  return names[static_cast<int>(instruction_set())];
}

void use_instruction_set_name(const std::string& name) {
  if (name == "plain") return use_instruction_set(InstructionSet::kPlain);
  if (name == "avx2") return use_instruction_set(InstructionSet::kAvx2);
  if (name == "avx512") return use_instruction_set(InstructionSet::kAvx512);
  throw py::value_error("no such instruction set: " + name);
}

}  // namespace
}  // namespace fastreplay

PYBIND11_MODULE(_cpu, m) {
  using namespace fastreplay;
  m.doc() = "The C++ half of fastreplay: use fastreplay.SumTree and fastreplay.FrameReplay.";

  py::class_<CheckedSumTree>(m, "SumTree", "Memory checks and calls for fastreplay.SumTree.")
      .def(py::init<int64_t, py::object, py::object, double, uint64_t>(), py::arg("capacity"),
           py::arg("leaves"), py::arg("inner"), py::arg("alpha"), py::arg("seed"))
      .def_static("slots", &CheckedSumTree::slots, "Entries of the leaf and of the inner array.")
      .def("set", &CheckedSumTree::set, py::arg("indices"), py::arg("priorities"),
           "Sets priorities (n,) float32 or float64, >= 0, at indices (n,) int64. Among duplicate\n"
           "indices the last wins. 0 means never drawn.\n\n"
           "IndexError: an index out of range. ValueError: a negative, NaN or infinite priority,\n"
           "or another shape. TypeError: another dtype. Nothing is changed then.")
      .def("get", &CheckedSumTree::get, py::arg("indices"), py::arg("out") = py::none(),
           "p^alpha at indices (n,) int64, as quantised: (n,) float64, multiples of 2^-20.")
      .def(
          "total", [](const CheckedSumTree& t) { return t.tree.total(); },
          "The exact sum of all leaves (int), in units of 2^-20.")
      .def("find", &CheckedSumTree::find, py::arg("targets"), py::arg("out") = py::none(),
           "The row under each target: the i with sum(rows < i) <= target < sum(rows <= i).\n\n"
           "targets (n,) int64 in [0, total()), in units of 2^-20. Returns (n,) int64. IndexError\n"
           "if a target is out of range.")
      .def("sample", &CheckedSumTree::sample, py::arg("batch_size"), py::arg("stratified") = false,
           py::arg("out") = py::none(),
           "Draws (batch_size,) int64 rows with replacement, in proportion to p^alpha.\n\n"
           "With stratified, draw i comes from the i-th of batch_size equal parts of the total.\n"
           "ValueError if every priority is 0.")
      .def("weights", &CheckedSumTree::weights, py::arg("indices"), py::arg("beta"),
           py::arg("out") = py::none(),
           "Importance weights (n,) float32 of drawn rows: (N P(i))^-beta over their largest.\n\n"
           "They come from the quantised priorities, so they fit the law that was sampled.\n"
           "ValueError if a row has priority 0.")
      .def("check_valid", &CheckedSumTree::check_valid,
           "Raises RuntimeError unless every inner node is the exact sum of its leaves.\n"
           "Takes time in proportion to the capacity.")
      .def("rebuild", [](CheckedSumTree& t) { t.tree.rebuild(); })
      .def_property_readonly("capacity", [](const CheckedSumTree& t) { return t.tree.capacity(); })
      .def_readwrite("seed", &CheckedSumTree::seed)
      .def_readwrite("calls", &CheckedSumTree::calls)
      .def_readonly("alpha", &CheckedSumTree::alpha);

  py::class_<CheckedFrameRing>(m, "FrameRing",
                               "Memory checks and calls for fastreplay.FrameReplay.")
      .def(py::init<py::tuple, py::object, py::tuple, bool, int, bool, std::vector<float>, int,
                    uint64_t>(),
           py::arg("memory"), py::arg("tree"), py::arg("frame_shape"), py::arg("float_frames"),
           py::arg("stack"), py::arg("stack_axis"), py::arg("powers"), py::arg("threads"),
           py::arg("seed"))
      .def("add", &CheckedFrameRing::add, py::arg("frames"), py::arg("actions"), py::arg("rewards"),
           py::arg("terminations"), py::arg("episode_starts"))
      .def("draw", &CheckedFrameRing::draw)
      .def("gather", &CheckedFrameRing::gather)
      .def("drawable", &CheckedFrameRing::drawable)
      .def("update", &CheckedFrameRing::update)
      .def("restore", &CheckedFrameRing::restore)
      .def_property_readonly("stored", [](const CheckedFrameRing& r) { return r.ring().stored(); })
      .def_property_readonly("head", [](const CheckedFrameRing& r) { return r.ring().head(); })
      .def_property_readonly("n_drawable",
                             [](const CheckedFrameRing& r) { return r.ring().n_drawable(); })
      .def_property_readonly("max_leaf",
                             [](const CheckedFrameRing& r) { return r.ring().max_leaf(); })
      .def_property_readonly("calls", &CheckedFrameRing::calls)
      .def_property("beta", &CheckedFrameRing::beta, &CheckedFrameRing::set_beta)
      .def_readwrite("seed", &CheckedFrameRing::seed);

  m.def("use_huge_pages", [](uintptr_t address, int64_t bytes) {
    return use_huge_pages(reinterpret_cast<void*>(address), bytes);
  });
  m.def("mark_drawable",
        [](const py::object& flags, int64_t stored, int64_t head, int stack, int n_step) {
          const TensorView v = view(flags, "flags");
          uint8_t* all = reinterpret_cast<uint8_t*>(v.data);
          return mark_drawable(all, v.shape[0], v.shape[1], stored, head, stack, n_step);
        });
  // Looks for torch's OpenMP now, so that a child of fork() does not take it for its own.
  (void)fastreplay::openmp_threads();
  m.def("openmp_threads", &fastreplay::openmp_threads);
  m.def("instruction_set", &instruction_set_name);
  m.def("use_instruction_set", &use_instruction_set_name);
}
