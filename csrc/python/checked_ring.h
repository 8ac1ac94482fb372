// The compiled half of fastreplay.FrameReplay as Python calls it: checks every argument, then
// passes raw pointers to the backend, which trusts its caller.
//
// A backend (CpuRing in cpu_backend.h, CudaRing in cuda_backend.h) is constructed from (memory,
// tree or null, device, layout, threads) and has
//   add(columns)                     each on the CPU or on the device
//   make_resident(indices)           moves them to where sample() and drawable() read them
//   sample(job, beta)                all pointers are on the device
//   copy_indices(indices, to, out)   `to` is the memory of `out`
//   drawable(indices, out)
//   update(pairs, alpha, epsilon, added)   on the CPU or on the device
//   set_beta(beta), restore(state), state(), stored(), check()
// and, if frames are in tiles, tile_state(), restore_tiles(...), tile_counts() and check_tiles().
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <utility>

#include "core/batch.h"
#include "python/arguments.h"
#include "python/checked_tree.h"
#include "python/device.h"

namespace fastreplay {

struct RingState {
  int64_t stored, head, n_drawable;
  uint32_t max_leaf;
  uint64_t calls;
};

// One row of each game.
struct RowViews {
  TensorView frames, actions, rewards, terminations, episode_starts;
};

template <typename Ring>
class CheckedRing {
 public:
  using Tree = CheckedTree<typename Ring::Tree>;

  // `memory`: frames (num_envs, rows, *frame_shape) or None (tiles), actions (num_envs, rows),
  // rewards, flags, powers (gamma^0 .. gamma^n_step), and whatever else the backend needs.
  CheckedRing(const py::tuple& memory, const py::object& tree, const Device& device,
              const py::tuple& frame_shape, const std::string& frame_dtype,
              const std::string& output_dtype, int stack, bool stack_axis, int threads,
              uint64_t seed)
      : seed(seed),
        device_(device),
        memory_(py::make_tuple(memory, tree)),
        format_(make_format(frame_shape, frame_dtype, output_dtype, stack, stack_axis)),
        layout_(make_layout(memory, format_)),
        prioritized_(!tree.is_none()),
        ring_(memory, prioritized_ ? &py::cast<Tree&>(tree).backend() : nullptr, device, layout_,
              threads) {}

  void add(const py::object& frames, const py::object& actions, const py::object& rewards,
           const py::object& terminations, const py::object& episode_starts) {
    const int64_t n = layout_.num_envs;
    const RowViews row{device_.input(frames, "frames"), device_.input(actions, "actions"),
                       device_.input(rewards, "rewards"),
                       device_.input(terminations, "terminations"),
                       device_.input(episode_starts, "episode_starts")};
    format_.check_frames(row.frames, n);
    check_actions(row.actions, n);
    check_rewards(row.rewards, n);
    check_1d(row.terminations, "terminations", DType::kBool, n);
    check_1d(row.episode_starts, "episode_starts", DType::kBool, n);
    ring_.add(row);
  }

  py::object draw(int64_t batch_size, bool stratified) {
    check_batch_size(batch_size);
    py::object out = py::none();
    SampleJob job{};
    job.n = batch_size;
    job.indices = device_.output_or_new<int64_t>(out, batch_size);
    job.draw = true;
    job.seed = seed;
    job.stratified = stratified;
    ring_.sample(job, beta_);
    return out;
  }

  // A batch of n samples. `indices` None: draws into the batch's indices. Otherwise copies
  // `indices` there.
  void gather(const py::object& indices, int64_t n, const py::tuple& batch, bool stratified,
              double scale, bool channels_last) {
    const TensorView obs = view(batch[0], "obs"), next_obs = view(batch[3], "next_obs");
    SampleJob job{};
    job.n = n;
    job.indices = device_.output<int64_t>(batch[5], "indices", n);
    job.draw = indices.is_none();
    job.seed = seed;
    job.stratified = stratified;
    job.gather = true;
    job.format = {format_.conversion(), static_cast<float>(scale), channels_last};
    job.batch.obs_stride = format_.check_observations(obs, "obs", n, channels_last);
    job.batch.next_obs_stride = format_.check_observations(next_obs, "next_obs", n, channels_last);
    device_.check_resident(obs, "obs");
    device_.check_resident(next_obs, "next_obs");
    job.batch.obs = obs.as<uint8_t>();
    job.batch.next_obs = next_obs.as<uint8_t>();
    job.batch.actions = device_.output<int64_t>(batch[1], "actions", n);
    job.batch.rewards = device_.output<float>(batch[2], "rewards", n);
    job.batch.discounts = device_.output<float>(batch[4], "discounts", n);
    job.is_weights = device_.output<float>(batch[6], "is_weights", n);
    if (job.draw) return ring_.sample(job, beta_);

    Indices rows(indices, "indices", device_, size());
    if (rows.n != n) throw_shape("indices", to_string(&n, 1), view(rows.owner, "indices"));
    ring_.make_resident(rows);
    int64_t* const copy = std::exchange(job.indices, const_cast<int64_t*>(rows.data));
    ring_.sample(job, beta_);  // only reads job.indices
    ring_.copy_indices(rows, copy, batch[5]);
  }

  py::object drawable(const py::object& indices) {
    Indices rows(indices, "indices", device_, size());
    ring_.make_resident(rows);
    py::object out = py::none();
    ring_.drawable(rows, device_.output_or_new<bool>(out, rows.n));
    return out;
  }

  void update(const py::object& indices, const py::object& td_error, double alpha, double epsilon,
              bool added) {
    const Pairs pairs(indices, td_error, "td_error", true, size(), device_);
    ring_.update(pairs, alpha, epsilon, added);
  }

  double beta() const { return beta_; }
  void set_beta(double beta) {
    check_beta(beta);
    beta_ = beta;
    ring_.set_beta(beta);
  }

  Ring& backend() { return ring_; }

  uint64_t seed;  // protected by the GIL, like beta_

 private:
  int64_t size() const { return layout_.num_envs * layout_.rows; }

  static FrameFormat make_format(const py::tuple& frame_shape, const std::string& frame_dtype,
                                 const std::string& output_dtype, int stack, bool stack_axis) {
    FrameFormat format{{}, frame_dtype == "float32", stack, stack_axis, dtype_named(output_dtype)};
    for (const py::handle& side : frame_shape) format.shape.push_back(py::cast<int64_t>(side));
    return format;
  }

  static RingLayout make_layout(const py::tuple& memory, const FrameFormat& format) {
    const TensorView actions = view(memory[1], "actions"), powers = view(memory[4], "powers");
    return {actions.shape[1], actions.shape[0], format.bytes(),
            format.width(),   format.stack,     static_cast<int>(powers.shape[0]) - 1};
  }

  const Device device_;
  const py::tuple memory_;  // keeps the tensors and the tree alive
  const FrameFormat format_;
  const RingLayout layout_;
  const bool prioritized_;
  Ring ring_;
  double beta_ = 0.0;
};

}  // namespace fastreplay
