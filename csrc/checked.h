// The classes that Python calls: they own nothing but references, check everything that Python can
// get wrong, and pass raw pointers on. The classes below them trust their callers.
//
//   CheckedSumTree     SumTree, with its tensors, its seed and its counter of calls
//   CheckedFrameRing   FrameRing, with its tensors and a lock that lets one call in at a time
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "frame_ring.h"
#include "priority.h"
#include "sum_tree.h"
#include "tensor_view.h"

#ifdef __unix__
#include <unistd.h>
#endif

namespace fastreplay {

namespace py = pybind11;

inline void check_indices(const int64_t* indices, int64_t n, int64_t size) {
  uint64_t bad = 0;  // negative numbers are large as unsigned ones
  for (int64_t i = 0; i < n; ++i) bad |= static_cast<uint64_t>(indices[i]) >= uint64_t(size);
  if (!bad) return;
  for (int64_t i = 0; i < n; ++i) {
    if (indices[i] < 0 || indices[i] >= size) {
      throw py::index_error("index " + std::to_string(indices[i]) + " is out of range for " +
                            std::to_string(size) + " rows");
    }
  }
}

// float32 or float64 numbers as doubles, each finite; `name` is what errors call them.
inline const double* finite_doubles(const py::handle& object, const char* name, int64_t n,
                                    std::vector<double>& scratch) {
  const TensorView v = view(object, name);
  if (v.dtype != DType::kFloat32 && v.dtype != DType::kFloat64) {
    throw py::type_error(std::string(name) + " must be float32 or float64, not " +
                         name_of(v.dtype));
  }
  if (v.ndim != 1 || v.shape[0] != n) {
    throw py::value_error(std::string(name) + " must have shape (" + std::to_string(n) +
                          ",), not " + to_string(v.shape, v.ndim));
  }
  if (!v.contiguous_from(0)) throw py::value_error(std::string(name) + " must be contiguous");
  scratch.resize(static_cast<size_t>(n));
  double* out = scratch.data();
  if (v.dtype == DType::kFloat32) {
    const float* in = reinterpret_cast<const float*>(v.data);
    for (int64_t i = 0; i < n; ++i) out[i] = in[i];
  } else {
    const double* in = reinterpret_cast<const double*>(v.data);
    for (int64_t i = 0; i < n; ++i) out[i] = in[i];
  }
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) finite &= std::abs(out[i]) <= 1.7976931348623157e308;
  if (!finite) throw py::value_error(std::string(name) + " must be finite, not NaN or infinity");
  return out;
}

// Element i of a 1-D view of numbers, as a T.
template <typename T>
T element(const TensorView& v, int64_t i) {
  const int64_t at = i * v.strides[0];
  if (v.dtype == DType::kFloat32) return static_cast<T>(reinterpret_cast<const float*>(v.data)[at]);
  if (v.dtype == DType::kFloat64) {
    return static_cast<T>(reinterpret_cast<const double*>(v.data)[at]);
  }
  if (v.dtype == DType::kInt32) return static_cast<T>(reinterpret_cast<const int32_t*>(v.data)[at]);
  return static_cast<T>(reinterpret_cast<const int64_t*>(v.data)[at]);
}

template <typename T>
T* writable_1d(const py::handle& object, const char* name, DType dtype, int64_t n) {
  const TensorView v = view_1d(object, name, dtype, n);
  if (!v.writable) throw py::value_error(std::string(name) + " must be writable");
  return reinterpret_cast<T*>(v.data);
}

// A SumTree, the tensors that hold its memory, and what draws from it: seed, calls, alpha.
class CheckedSumTree {
 public:
  CheckedSumTree(int64_t capacity, const py::object& leaves, const py::object& inner, double alpha,
                 uint64_t seed)
      : tree(
            capacity,
            writable_1d<uint32_t>(leaves, "leaves", DType::kInt32, TreeLayout(capacity).leaf_slots),
            writable_1d<uint64_t>(inner, "inner", DType::kInt64, TreeLayout(capacity).inner_slots)),
        seed(seed),
        alpha(alpha),
        leaves_(leaves),
        inner_(inner) {}

  static py::tuple slots(int64_t capacity) {
    if (capacity < 1 || capacity > kMaxCapacity) {
      throw py::value_error("capacity must be from 1 to 2^27, not " + std::to_string(capacity));
    }
    const TreeLayout layout(capacity);
    return py::make_tuple(layout.leaf_slots, layout.inner_slots);
  }

  void set(const py::object& indices, const py::object& priorities) {
    const TensorView v = view_1d(indices, "indices", DType::kInt64);
    const int64_t n = v.shape[0];
    const int64_t* rows = reinterpret_cast<const int64_t*>(v.data);
    const double* values = finite_doubles(priorities, "priorities", n, scratch_);
    check_indices(rows, n, tree.capacity());
    bool negative = false;
    for (int64_t i = 0; i < n; ++i) negative |= values[i] < 0.0;
    if (negative) throw py::value_error("priorities must not be negative");
    values_.resize(static_cast<size_t>(n));
    quantise_many(values, n, alpha, values_.data());
    tree.set(rows, values_.data(), n);
  }

  py::object get(const py::object& indices, py::object out) const {
    const TensorView v = view_1d(indices, "indices", DType::kInt64);
    const int64_t n = v.shape[0];
    const int64_t* rows = reinterpret_cast<const int64_t*>(v.data);
    check_indices(rows, n, tree.capacity());
    if (out.is_none()) out = empty_1d(n, DType::kFloat64);
    double* to = writable_1d<double>(out, "out", DType::kFloat64, n);
    for (int64_t i = 0; i < n; ++i) to[i] = tree.leaves()[rows[i]] / double{kUnitLeaf};
    return out;
  }

  py::object find(const py::object& targets, py::object out) const {
    const TensorView v = view_1d(targets, "targets", DType::kInt64);
    const int64_t n = v.shape[0];
    const uint64_t* from = reinterpret_cast<const uint64_t*>(v.data);
    for (int64_t i = 0; i < n; ++i) {
      if (from[i] >= tree.total()) {
        throw py::index_error("target " + std::to_string(static_cast<int64_t>(from[i])) +
                              " is not in [0, total = " + std::to_string(tree.total()) + ")");
      }
    }
    if (out.is_none()) out = empty_1d(n, DType::kInt64);
    tree.find(from, n, writable_1d<int64_t>(out, "out", DType::kInt64, n));
    return out;
  }

  py::object sample(int64_t batch_size, bool stratified, py::object out) {
    if (batch_size < 0 || batch_size > INT32_MAX) {
      throw py::value_error("batch_size must be from 0 to 2^31 - 1");
    }
    if (tree.total() == 0) throw py::value_error("every priority is 0: there is nothing to draw");
    if (out.is_none()) out = empty_1d(batch_size, DType::kInt64);
    int64_t* to = writable_1d<int64_t>(out, "out", DType::kInt64, batch_size);
    tree.draw(seed, calls++, stratified, batch_size, to);
    return out;
  }

  py::object weights(const py::object& indices, double beta, py::object out) const {
    const TensorView v = view_1d(indices, "indices", DType::kInt64);
    const int64_t n = v.shape[0];
    const int64_t* rows = reinterpret_cast<const int64_t*>(v.data);
    if (!(beta >= 0.0 && beta <= 100.0)) throw py::value_error("beta must be from 0 to 100");
    check_indices(rows, n, tree.capacity());
    for (int64_t i = 0; i < n; ++i) {
      if (tree.leaves()[rows[i]] == 0) {
        throw py::value_error("index " + std::to_string(rows[i]) +
                              " has priority 0: it is never drawn and has no weight");
      }
    }
    if (out.is_none()) out = empty_1d(n, DType::kFloat32);
    tree.weights(rows, n, beta, writable_1d<float>(out, "out", DType::kFloat32, n));
    return out;
  }

  void check_valid() const {
    if (!tree.is_valid()) {
      throw std::runtime_error(
          "the sum-tree is damaged: an inner node is not the sum of its leaves");
    }
  }

  SumTree tree;
  uint64_t seed;
  uint64_t calls = 0;
  double alpha;

 private:
  py::object leaves_, inner_;
  std::vector<double> scratch_;
  std::vector<uint32_t> values_;
};

// A FrameRing, the tensors that hold its memory, and the lock that lets one call in at a time.
class CheckedFrameRing {
 public:
  CheckedFrameRing(const py::tuple& memory, const py::object& tree, const py::tuple& frame_shape,
                   bool float_frames, int stack, bool stack_axis, std::vector<float> powers,
                   int threads, uint64_t seed)
      : seed(seed),
        memory_(memory),
        tree_object_(tree),
        float_frames_(float_frames),
        stack_axis_(stack_axis) {
    const TensorView frames = view(memory[0], "frames");
    RingLayout layout;
    layout.num_envs = frames.shape[0];
    layout.rows = frames.shape[1];
    layout.frame_bytes = size_of(frames.dtype);
    for (const py::handle& side : frame_shape) {
      frame_shape_.push_back(py::cast<int64_t>(side));
      layout.frame_bytes *= frame_shape_.back();
    }
    layout.stack = stack;
    layout.n_step = static_cast<int>(powers.size()) - 1;
    RingMemory pointers;
    pointers.frames = reinterpret_cast<uint8_t*>(frames.data);
    pointers.actions = reinterpret_cast<int32_t*>(view(memory[1], "actions").data);
    pointers.rewards = reinterpret_cast<float*>(view(memory[2], "rewards").data);
    pointers.flags = reinterpret_cast<uint8_t*>(view(memory[3], "flags").data);
    tree_ = tree.is_none() ? nullptr : &py::cast<CheckedSumTree&>(tree);
    ring_ = std::make_unique<FrameRing>(layout, pointers, std::move(powers),
                                        tree_ == nullptr ? nullptr : &tree_->tree, threads);
    actions_.resize(static_cast<size_t>(layout.num_envs));
    rewards_.resize(static_cast<size_t>(layout.num_envs));
  }

  void add(const py::object& frames, const py::object& actions, const py::object& rewards,
           const py::object& terminations, const py::object& episode_starts) {
    const RingLayout& layout = ring_->layout();
    const int64_t n = layout.num_envs;
    const TensorView f = view(frames, "frames");
    const DType dtype = float_frames_ ? DType::kFloat32 : DType::kUint8;
    if (f.dtype != dtype) {
      throw py::type_error(std::string("frames must be ") + name_of(dtype) + ", not " +
                           name_of(f.dtype));
    }
    bool fits = f.ndim == static_cast<int>(frame_shape_.size()) + 1 && f.shape[0] == n;
    for (int d = 1; fits && d < f.ndim; ++d) {
      fits = f.shape[d] == frame_shape_[static_cast<size_t>(d) - 1];
    }
    if (!fits) {
      std::vector<int64_t> expected{n};
      expected.insert(expected.end(), frame_shape_.begin(), frame_shape_.end());
      throw py::value_error("frames must have shape " +
                            to_string(expected.data(), static_cast<int>(expected.size())) +
                            ", not " + to_string(f.shape, f.ndim));
    }
    if (!f.contiguous_from(1)) throw py::value_error("each game's frame must be contiguous");
    const TensorView a = view(actions, "actions"), r = view(rewards, "rewards");
    check_column(a, "actions", n);
    check_column(r, "rewards", n);
    if (a.dtype != DType::kInt64 && a.dtype != DType::kInt32) {
      throw py::type_error(std::string("actions must be int64 or int32, not ") + name_of(a.dtype));
    }
    if (r.dtype != DType::kFloat32 && r.dtype != DType::kFloat64 && r.dtype != DType::kInt32 &&
        r.dtype != DType::kInt64) {
      throw py::type_error(std::string("rewards must be floats or integers, not ") +
                           name_of(r.dtype));
    }
    const uint8_t* ends = booleans(terminations, "terminations", n);
    const uint8_t* starts = booleans(episode_starts, "episode_starts", n);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t action = element<int64_t>(a, i);
      if (action != static_cast<int32_t>(action)) {
        throw py::value_error("action " + std::to_string(action) + " does not fit 32 bits");
      }
      actions_[static_cast<size_t>(i)] = static_cast<int32_t>(action);
      rewards_[static_cast<size_t>(i)] = element<float>(r, i);
    }
    const int64_t stride = f.strides[0] * size_of(f.dtype);
    const std::lock_guard<std::mutex> lock(gate());
    ring_->add(reinterpret_cast<const uint8_t*>(f.data), stride, actions_.data(), rewards_.data(),
               ends, starts);
  }

  // Fills `out` (int64) with drawable rows.
  void draw(const py::object& out, bool stratified) {
    const TensorView v = view_1d(out, "out", DType::kInt64);
    if (!v.writable) throw py::value_error("out must be writable");
    const std::lock_guard<std::mutex> lock(gate());
    draw_locked(v.shape[0], stratified, reinterpret_cast<int64_t*>(v.data));
  }

  // Builds a batch. With `draw_first` the indices are drawn into `indices`, else read from it.
  void gather(const py::tuple& batch, bool draw_first, bool stratified, double beta, double scale,
              bool channels_last) {
    const TensorView rows = view_1d(batch[5], "indices", DType::kInt64);
    const int64_t n = rows.shape[0];
    int64_t* indices = reinterpret_cast<int64_t*>(rows.data);
    FrameOutput format;
    format.scale = static_cast<float>(scale);
    format.channels_last = channels_last;
    BatchMemory memory;
    DType obs_dtype, next_obs_dtype;
    memory.obs = frames_out(batch[0], "obs", n, channels_last, &memory.obs_stride, &obs_dtype);
    memory.next_obs = frames_out(batch[3], "next_obs", n, channels_last, &memory.next_obs_stride,
                                 &next_obs_dtype);
    if (obs_dtype != next_obs_dtype) {
      throw py::type_error("obs and next_obs must have one dtype");
    }
    if (!float_frames_ && obs_dtype == DType::kFloat16) format.output = Output::kFloat16;
    if (!float_frames_ && obs_dtype == DType::kBfloat16) format.output = Output::kBfloat16;
    if (!float_frames_ && obs_dtype == DType::kFloat32) format.output = Output::kFloat32;
    memory.actions = writable_1d<int64_t>(batch[1], "actions", DType::kInt64, n);
    memory.rewards = writable_1d<float>(batch[2], "rewards", DType::kFloat32, n);
    memory.discounts = writable_1d<float>(batch[4], "discounts", DType::kFloat32, n);
    float* weights = writable_1d<float>(batch[6], "is_weights", DType::kFloat32, n);
    if (!(beta >= 0.0 && beta <= 100.0)) throw py::value_error("beta must be from 0 to 100");

    std::mutex& gate = this->gate();
    // In this order: the lock must be free again before this thread waits for the interpreter.
    const py::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(gate);
    if (draw_first) {
      draw_locked(n, stratified, indices);
    } else {
      check_drawable(indices, n);
    }
    if (tree_ != nullptr) {
      tree_->tree.weights(indices, n, beta, weights);
    } else {
      std::fill(weights, weights + n, 1.0f);
    }
    ring_->gather(indices, n, format, memory);
  }

  void drawable(const py::object& indices, const py::object& out) {
    const TensorView v = view_1d(indices, "indices", DType::kInt64);
    const int64_t* rows = reinterpret_cast<const int64_t*>(v.data);
    bool* to = writable_1d<bool>(out, "out", DType::kBool, v.shape[0]);
    check_indices(rows, v.shape[0], size());
    for (int64_t i = 0; i < v.shape[0]; ++i) to[i] = ring_->is_drawable(rows[i]);
  }

  void update(const py::object& indices, const py::object& td_error, double alpha, double epsilon) {
    const TensorView v = view_1d(indices, "indices", DType::kInt64);
    const int64_t n = v.shape[0];
    const int64_t* rows = reinterpret_cast<const int64_t*>(v.data);
    finite_doubles(td_error, "td_error", n, scratch_);
    check_indices(rows, n, size());
    for (double& p : scratch_) p = std::abs(p) + epsilon;
    leaves_.resize(static_cast<size_t>(n));
    quantise_many(scratch_.data(), n, alpha, leaves_.data());
    const std::lock_guard<std::mutex> lock(gate());
    ring_->update(rows, leaves_.data(), n);
  }

  void restore(int64_t stored, int64_t head, uint32_t max_leaf, uint64_t calls) {
    const std::lock_guard<std::mutex> lock(gate());
    ring_->restore(stored, head, max_leaf);
    this->calls() = calls;
  }

  uint64_t& calls() { return tree_ != nullptr ? tree_->calls : calls_; }
  const FrameRing& ring() const { return *ring_; }
  uint64_t seed;

 private:
  int64_t size() const { return ring_->layout().num_envs * ring_->layout().rows; }

  // A lock of this process: the one a child of fork() inherits may be held for ever.
  std::mutex& gate() {
#ifdef __unix__
    if (pid_ != getpid()) {
      (void)gate_.release();
      gate_ = std::make_unique<std::mutex>();
      pid_ = getpid();
    }
#endif
    return *gate_;
  }

  void draw_locked(int64_t n, bool stratified, int64_t* out) {
    if (ring_->n_drawable() == 0) {
      throw py::value_error("the replay holds no whole transition yet: add more rows first");
    }
    if (tree_ != nullptr) {
      tree_->tree.draw(seed, calls(), stratified, n, out);
    } else {
      ring_->draw(seed, calls(), n, out);
    }
    ++calls();
  }

  void check_drawable(const int64_t* indices, int64_t n) const {
    check_indices(indices, n, size());
    for (int64_t i = 0; i < n; ++i) {
      if (!ring_->is_drawable(indices[i])) {
        throw py::value_error("row " + std::to_string(indices[i]) +
                              " is not drawable: it is empty, a final observation, or its stack "
                              "or n-step window is not complete");
      }
    }
  }

  static void check_column(const TensorView& v, const char* name, int64_t n) {
    if (v.ndim != 1 || v.shape[0] != n) {
      throw py::value_error(std::string(name) + " must have shape (" + std::to_string(n) +
                            ",), not " + to_string(v.shape, v.ndim));
    }
  }

  static const uint8_t* booleans(const py::object& object, const char* name, int64_t n) {
    const TensorView v = view_1d(object, name, DType::kBool, n);
    return reinterpret_cast<const uint8_t*>(v.data);
  }

  // Checks a batch of frames to write: shape (n, [stack,] *frame_shape), each sample dense.
  uint8_t* frames_out(const py::handle& object, const char* name, int64_t n, bool channels_last,
                      int64_t* stride, DType* dtype) const {
    const TensorView v = view(object, name);
    const bool known = float_frames_
                           ? v.dtype == DType::kFloat32
                           : v.dtype == DType::kUint8 || v.dtype == DType::kFloat16 ||
                                 v.dtype == DType::kBfloat16 || v.dtype == DType::kFloat32;
    if (!known) throw py::type_error(std::string(name) + " cannot be " + name_of(v.dtype));
    const int stack = ring_->layout().stack;
    std::vector<int64_t> expected{n};
    if (stack_axis_) expected.push_back(stack);
    expected.insert(expected.end(), frame_shape_.begin(), frame_shape_.end());
    bool fits = v.ndim == static_cast<int>(expected.size());
    for (int d = 0; fits && d < v.ndim; ++d) fits = v.shape[d] == expected[static_cast<size_t>(d)];
    if (!fits) {
      throw py::value_error(std::string(name) + " must have shape " +
                            to_string(expected.data(), static_cast<int>(expected.size())) +
                            ", not " + to_string(v.shape, v.ndim));
    }
    int64_t sample = 1;
    for (int d = 1; d < v.ndim; ++d) sample *= v.shape[d];
    bool dense = n == 1 || v.strides[0] >= sample;
    if (channels_last) {
      dense = dense && (stack == 1 || v.strides[1] == 1) &&
              (v.shape[3] == 1 || v.strides[3] == stack) &&
              (v.shape[2] == 1 || v.strides[2] == stack * v.shape[3]);
    } else {
      dense = dense && v.contiguous_from(1);
    }
    if (!dense) {
      throw py::value_error(std::string(name) + " must hold each sample densely, " +
                            (channels_last ? "channels last" : "in C order"));
    }
    *stride = v.strides[0] * size_of(v.dtype);
    *dtype = v.dtype;
    return reinterpret_cast<uint8_t*>(v.data);
  }

  std::unique_ptr<FrameRing> ring_;
  py::tuple memory_;
  py::object tree_object_;
  CheckedSumTree* tree_;
  std::vector<int64_t> frame_shape_;
  bool float_frames_, stack_axis_;
  uint64_t calls_ = 0;
  int64_t pid_ = -1;
  std::unique_ptr<std::mutex> gate_ = std::make_unique<std::mutex>();
  // Scratch, so that no call allocates.
  std::vector<int32_t> actions_;
  std::vector<float> rewards_;
  std::vector<double> scratch_;
  std::vector<uint32_t> leaves_;
};

}  // namespace fastreplay
