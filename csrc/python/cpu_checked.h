// The classes that Python calls: they own nothing but references, check everything that Python can
// get wrong, and pass raw pointers on. The classes below them trust their callers.
//
//   CheckedSumTree     SumTree, with its tensors, its seed and its counter of calls
//   CheckedFrameRing   FrameRing, with its tensors and a lock that lets one call in at a time
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "python/arguments.h"
#include "cpu/frame_ring.h"
#include "core/priority.h"
#include "cpu/sum_tree.h"
#include "python/tensor_view.h"

#ifdef __unix__
#include <unistd.h>
#endif

namespace fastreplay {

namespace py = pybind11;

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
    check_capacity(capacity, kMaxCapacity);
    const TreeLayout layout(capacity);
    return py::make_tuple(layout.leaf_slots, layout.inner_slots);
  }

  void set(const py::object& indices, const py::object& priorities) {
    const TensorView v = view_1d(indices, "indices", DType::kInt64);
    const int64_t n = v.shape[0];
    const int64_t* rows = reinterpret_cast<const int64_t*>(v.data);
    const TensorView p = view(priorities, "priorities");
    check_floats(p, "priorities", n);
    const double* values = finite_doubles(p, "priorities", n, scratch_);
    check_indices(rows, n, tree.capacity());
    bool negative = false;
    for (int64_t i = 0; i < n; ++i) negative |= values[i] < 0.0;
    if (negative) throw_negative();
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
        throw_target_out_of_range(static_cast<int64_t>(from[i]), tree.total());
      }
    }
    if (out.is_none()) out = empty_1d(n, DType::kInt64);
    tree.find(from, n, writable_1d<int64_t>(out, "out", DType::kInt64, n));
    return out;
  }

  py::object sample(int64_t batch_size, bool stratified, py::object out) {
    check_batch_size(batch_size);
    if (tree.total() == 0) throw_nothing_to_draw();
    if (out.is_none()) out = empty_1d(batch_size, DType::kInt64);
    int64_t* to = writable_1d<int64_t>(out, "out", DType::kInt64, batch_size);
    tree.draw(seed, calls++, stratified, batch_size, to);
    return out;
  }

  py::object weights(const py::object& indices, double beta, py::object out) const {
    const TensorView v = view_1d(indices, "indices", DType::kInt64);
    const int64_t n = v.shape[0];
    const int64_t* rows = reinterpret_cast<const int64_t*>(v.data);
    check_beta(beta);
    check_indices(rows, n, tree.capacity());
    for (int64_t i = 0; i < n; ++i) {
      if (tree.leaves()[rows[i]] == 0) throw_no_weight(rows[i]);
    }
    if (out.is_none()) out = empty_1d(n, DType::kFloat32);
    tree.weights(rows, n, beta, writable_1d<float>(out, "out", DType::kFloat32, n));
    return out;
  }

  void check_valid() const {
    if (!tree.is_valid()) throw_damaged();
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
        format_{{}, float_frames, stack, stack_axis} {
    const TensorView frames = view(memory[0], "frames");
    RingLayout layout;
    layout.num_envs = frames.shape[0];
    layout.rows = frames.shape[1];
    for (const py::handle& side : frame_shape) format_.shape.push_back(py::cast<int64_t>(side));
    layout.frame_bytes = format_.bytes();
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
    check_frames(f, format_, n);
    const TensorView a = view(actions, "actions"), r = view(rewards, "rewards");
    check_actions(a, n);
    check_rewards(r, n);
    const TensorView ends = view_1d(terminations, "terminations", DType::kBool, n);
    const TensorView starts = view_1d(episode_starts, "episode_starts", DType::kBool, n);
    read_actions(a, n, actions_.data());
    for (int64_t i = 0; i < n; ++i) rewards_[static_cast<size_t>(i)] = element<float>(r, i);
    const int64_t stride = f.strides[0] * size_of(f.dtype);
    const std::lock_guard<std::mutex> lock(gate());
    ring_->add(reinterpret_cast<const uint8_t*>(f.data), stride, actions_.data(), rewards_.data(),
               reinterpret_cast<const uint8_t*>(ends.data),
               reinterpret_cast<const uint8_t*>(starts.data));
  }

  // Fills `out` (int64) with drawable rows.
  void draw(const py::object& out, bool stratified) {
    const TensorView v = view_1d(out, "out", DType::kInt64);
    if (!v.writable) throw py::value_error("out must be writable");
    const std::lock_guard<std::mutex> lock(gate());
    draw_locked(v.shape[0], stratified, reinterpret_cast<int64_t*>(v.data));
  }

  // Builds a batch. With `draw_first` the indices are drawn into `indices`, else read from it.
  void gather(const py::tuple& batch, bool draw_first, bool stratified, double scale,
              bool channels_last) {
    const TensorView rows = view_1d(batch[5], "indices", DType::kInt64);
    const int64_t n = rows.shape[0];
    int64_t* indices = reinterpret_cast<int64_t*>(rows.data);
    FrameOutput format;
    format.scale = static_cast<float>(scale);
    format.channels_last = channels_last;
    BatchMemory memory;
    const TensorView obs = view(batch[0], "obs"), next_obs = view(batch[3], "next_obs");
    memory.obs_stride = check_frames_out(obs, "obs", n, format_, channels_last);
    memory.next_obs_stride = check_frames_out(next_obs, "next_obs", n, format_, channels_last);
    if (obs.dtype != next_obs.dtype) throw py::type_error("obs and next_obs must have one dtype");
    memory.obs = reinterpret_cast<uint8_t*>(obs.data);
    memory.next_obs = reinterpret_cast<uint8_t*>(next_obs.data);
    format.output = output_of(obs.dtype, format_.floats);
    memory.actions = writable_1d<int64_t>(batch[1], "actions", DType::kInt64, n);
    memory.rewards = writable_1d<float>(batch[2], "rewards", DType::kFloat32, n);
    memory.discounts = writable_1d<float>(batch[4], "discounts", DType::kFloat32, n);
    float* weights = writable_1d<float>(batch[6], "is_weights", DType::kFloat32, n);

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
      tree_->tree.weights(indices, n, beta_, weights);
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
    const TensorView errors = view(td_error, "td_error");
    check_floats(errors, "td_error", n);
    finite_doubles(errors, "td_error", n, scratch_);
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

  double beta() const { return beta_; }
  void set_beta(double beta) {
    check_beta(beta);
    beta_ = beta;
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
    if (ring_->n_drawable() == 0) throw_nothing_drawable();
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
      if (!ring_->is_drawable(indices[i])) throw_not_drawable(indices[i]);
    }
  }

  std::unique_ptr<FrameRing> ring_;
  py::tuple memory_;
  py::object tree_object_;
  CheckedSumTree* tree_;
  FrameFormat format_;
  double beta_ = 0.0;
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
