// fastreplay.SumTree as Python calls it: checks every argument, then passes raw pointers to the
// backend, which trusts its caller.
//
// A backend (CpuTree in cpu_backend.h, CudaTree in cuda_backend.h) is constructed from (capacity,
// memory, device) and has
//   slots(capacity)                             sizes of the arrays in `memory`
//   capacity(), calls(), set_calls(calls)
//   set(pairs, alpha)                           on the CPU or on the device
//   get(indices, out)                           `indices` may be on the CPU,
//   find(targets, out)                          `out` is on the device
//   draw(seed, stratified, n, out)
//   weights(indices, beta, out)
//   total(), check(), check_valid(), rebuild()
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>

#include "python/arguments.h"
#include "python/device.h"

namespace fastreplay {

template <typename Tree>
class CheckedTree {
 public:
  CheckedTree(int64_t capacity, const py::tuple& memory, const Device& device, double alpha,
              uint64_t seed)
      : seed(seed),
        alpha(alpha),
        device_(device),
        memory_(memory),
        tree_(capacity, memory, device) {}

  static py::object slots(int64_t capacity) {
    check_capacity(capacity);
    return py::cast(Tree::slots(capacity));
  }

  void set(const py::object& indices, const py::object& priorities) {
    tree_.set(Pairs(indices, priorities, "priorities", false, tree_.capacity(), device_), alpha);
  }

  py::object get(const py::object& indices, py::object out) {
    const Indices rows(indices, "indices", device_, tree_.capacity());
    tree_.get(rows, device_.output_or_new<double>(out, rows.n));
    return out;
  }

  py::object find(const py::object& targets, py::object out) {
    const Indices from(targets, "targets", device_);
    tree_.find(from, device_.output_or_new<int64_t>(out, from.n));
    return out;
  }

  py::object sample(int64_t batch_size, bool stratified, py::object out) {
    check_batch_size(batch_size);
    tree_.draw(seed, stratified, batch_size, device_.output_or_new<int64_t>(out, batch_size));
    return out;
  }

  py::object weights(const py::object& indices, double beta, py::object out) {
    check_beta(beta);
    const Indices rows(indices, "indices", device_, tree_.capacity());
    tree_.weights(rows, beta, device_.output_or_new<float>(out, rows.n));
    return out;
  }

  Tree& backend() { return tree_; }

  uint64_t seed;
  const double alpha;

 private:
  const Device device_;
  const py::tuple memory_;  // keeps the tensors alive
  Tree tree_;
};

}  // namespace fastreplay
