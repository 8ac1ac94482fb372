// The names and docstrings that fastreplay._cpu and fastreplay._cuda share.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>

#include "python/checked_ring.h"
#include "python/checked_tree.h"
#include "python/device.h"

namespace fastreplay {

// module_local: both modules, and in tests a third one, are loaded into one process.

inline void bind_device(py::module_& m) {
  py::class_<Device>(m, "Device", py::module_local(), "A torch device, as passed to these classes.")
      .def(py::init([](int index, py::object torch_device, py::object current_stream) {
             return Device{index, std::move(torch_device), std::move(current_stream)};
           }),
           py::arg("index"), py::arg("torch_device"), py::arg("current_stream") = py::none());
  m.attr("CPU_INDEX") = py::int_(static_cast<int>(TensorView::kCpu));
}

template <typename Backend>
void bind_tree(py::module_& m) {
  using Tree = CheckedTree<Backend>;
  py::class_<Tree>(m, "SumTree", py::module_local(), "The compiled half of fastreplay.SumTree.")
      .def(py::init<int64_t, py::tuple, const Device&, double, uint64_t>(), py::arg("capacity"),
           py::arg("memory"), py::arg("device"), py::arg("alpha"), py::arg("seed"))
      .def_static("slots", &Tree::slots, py::arg("capacity"),
                  "Sizes of the arrays of a tree, in elements. ValueError for a bad capacity.")
      .def("set", &Tree::set, py::arg("indices"), py::arg("priorities"),
           "Sets priorities (n,) float32 or float64, >= 0, of rows (n,) int64 or int32. Among\n"
           "duplicate rows the last one wins. A row of priority 0 is never drawn.\n\n"
           "Raises IndexError for a row out of range, ValueError for a negative, NaN or infinite\n"
           "priority or a wrong shape, TypeError for a wrong dtype. The tree is unchanged then.")
      .def("get", &Tree::get, py::arg("indices"), py::arg("out") = py::none(),
           "p^alpha of rows (n,) int64 or int32: (n,) float64, multiples of 2^-20.")
      .def(
          "total", [](Tree& t) { return t.backend().total(); },
          "The exact sum of all leaves (int), in units of 2^-20. On CUDA, waits for the stream.")
      .def("find", &Tree::find, py::arg("targets"), py::arg("out") = py::none(),
           "The row of each target: the i with sum(leaves before i) <= target < sum(leaves up to\n"
           "and including i).\n\n"
           "targets (n,) int64 or int32 in [0, total()), in units of 2^-20. Returns (n,) int64.\n"
           "Raises IndexError if a target is out of range.")
      .def("sample", &Tree::sample, py::arg("batch_size"), py::arg("stratified") = false,
           py::arg("out") = py::none(),
           "Draws (batch_size,) int64 rows with replacement, with probability proportional to\n"
           "p^alpha. With stratified, draw i comes from the i-th of batch_size equal parts of the\n"
           "total. Raises ValueError if every priority is 0.")
      .def("weights", &Tree::weights, py::arg("indices"), py::arg("beta"),
           py::arg("out") = py::none(),
           "Importance weights (n,) float32 of drawn rows (n,): (N P(i))^-beta, divided by the\n"
           "largest of them, from the quantised priorities. Raises ValueError if a row has\n"
           "priority 0 or beta is not in [0, 100].")
      .def(
          "check", [](Tree& t) { t.backend().check(); },
          "On CUDA: waits for the stream, and raises the error that the device has latched since\n"
          "the last call that waited. On the CPU: does nothing, because errors are raised at once.")
      .def(
          "check_valid", [](Tree& t) { t.backend().check_valid(); },
          "Raises RuntimeError unless every inner node is the exact sum of its leaves. Takes time\n"
          "proportional to the capacity.")
      .def(
          "rebuild", [](Tree& t) { t.backend().rebuild(); },
          "Recomputes every inner node from the leaves.")
      .def_property_readonly("capacity", [](Tree& t) { return t.backend().capacity(); })
      .def_property(
          "calls", [](Tree& t) { return t.backend().calls(); },
          [](Tree& t, uint64_t calls) { t.backend().set_calls(calls); },
          "Draws so far. On CUDA, reading it waits for the stream.")
      .def_readwrite("seed", &Tree::seed)
      .def_readonly("alpha", &Tree::alpha);
}

template <typename Backend>
py::class_<CheckedRing<Backend>> bind_ring(py::module_& m) {
  using Ring = CheckedRing<Backend>;
  py::class_<Ring> ring(m, "FrameRing", py::module_local(),
                        "The compiled half of fastreplay.FrameReplay.");
  ring.def(py::init<py::tuple, py::object, const Device&, py::tuple, std::string, std::string, int,
                    bool, int, uint64_t>(),
           py::arg("memory"), py::arg("tree"), py::arg("device"), py::arg("frame_shape"),
           py::arg("frame_dtype"), py::arg("output_dtype"), py::arg("stack"), py::arg("stack_axis"),
           py::arg("threads"), py::arg("seed"))
      .def("add", &Ring::add, py::arg("frames"), py::arg("actions"), py::arg("rewards"),
           py::arg("terminations"), py::arg("episode_starts"))
      .def("draw", &Ring::draw, py::arg("batch_size"), py::arg("stratified"))
      .def("gather", &Ring::gather, py::arg("indices"), py::arg("n"), py::arg("batch"),
           py::arg("stratified"), py::arg("scale"), py::arg("channels_last"),
           "Fills `batch`, a tuple of seven arrays. With indices None, draws its rows first.")
      .def("drawable", &Ring::drawable, py::arg("indices"))
      .def("update", &Ring::update, py::arg("indices"), py::arg("td_error"), py::arg("alpha"),
           py::arg("epsilon"), py::arg("added") = false)
      .def(
          "restore",
          [](Ring& r, int64_t stored, int64_t head, int64_t n_drawable, uint32_t max_leaf,
             uint64_t calls) { r.backend().restore({stored, head, n_drawable, max_leaf, calls}); },
          py::arg("stored"), py::arg("head"), py::arg("n_drawable"), py::arg("max_leaf"),
          py::arg("calls"))
      .def("check", [](Ring& r) { r.backend().check(); })
      .def_property_readonly("stored", [](Ring& r) { return r.backend().stored(); })
      .def_property_readonly("head", [](Ring& r) { return r.backend().state().head; })
      .def_property_readonly("n_drawable", [](Ring& r) { return r.backend().state().n_drawable; })
      .def_property_readonly("max_leaf", [](Ring& r) { return r.backend().state().max_leaf; })
      .def_property_readonly("calls", [](Ring& r) { return r.backend().state().calls; })
      .def_property("beta", &Ring::beta, &Ring::set_beta)
      .def(
          "tile_state", [](Ring& r) { return r.backend().tile_state(); },
          "The frames of a ring of tiles: (tiles, chunk sizes of each game, chunks of each game).")
      .def(
          "restore_tiles",
          [](Ring& r, int64_t added, const py::object& tiles, const py::list& sizes,
             const py::list& chunks) { r.backend().restore_tiles(added, tiles, sizes, chunks); },
          py::arg("added"), py::arg("tiles"), py::arg("chunk_sizes"), py::arg("chunks"),
          "Replaces the frames by those of tile_state(). ValueError if they are damaged.")
      .def(
          "tile_counts", [](Ring& r) { return r.backend().tile_counts(); },
          "Of a ring of tiles: (rows added to each game, tiles, bytes in use on its device).")
      .def(
          "check_tiles", [](Ring& r) { r.backend().check_tiles(); },
          "Raises RuntimeError unless all tiles are counted correctly. Slow.")
      .def_readwrite("seed", &Ring::seed);
  return ring;
}

}  // namespace fastreplay
