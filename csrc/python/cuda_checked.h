// The classes that Python calls for a replay on a CUDA device: like those of ../checked.h, they own
// references, check arguments, and pass raw pointers and the caller's stream on.
//
//   Device           which one, and its current stream in torch
//   CudaSumTree      DeviceTree, with its tensors and its counters
//   CudaFrameRing    DeviceRing, with its tensors, and the staging of rows that come from the CPU
//
// Nothing here reads back what the device computes, except where it is said. What only the device
// can see going wrong stays in its counters; check() and every call that waits tell it.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "python/arguments.h"
#include "core/priority.h"
#include "cuda/counters.h"
#include "cuda/device_ring.h"
#include "cuda/device_tree.h"
#include "cuda/runtime.h"
#include "cuda/staging.h"

namespace fastreplay {

// A device of torch. `index` is TensorView's number of it.
struct Device {
  int index;
  py::object torch_device;
  py::object current_stream;  // of the index: the stream's handle

  int number() const { return std::max(index, 0); }
  cudaStream_t stream() const {
    return reinterpret_cast<cudaStream_t>(py::cast<uintptr_t>(current_stream(index)));
  }
  std::string name() const { return py::cast<std::string>(py::str(torch_device)); }
  bool holds(const TensorView& v) const { return v.is_tensor && v.device == index; }
};

// A tensor on the device or anything on the CPU.
inline TensorView view_near(const py::handle& object, const char* name, const Device& device) {
  const TensorView v = view_anywhere(object, name);
  if (!device.holds(v) && v.device != TensorView::kCpu) {
    throw py::value_error(std::string(name) + " must be on " + device.name() +
                          ", like the replay, or on the CPU");
  }
  return v;
}

inline void check_there(const TensorView& v, const char* name, const Device& device) {
  if (device.holds(v)) return;
  throw py::value_error(std::string(name) + " must be on " + device.name() + ", like the replay");
}

// A tensor on the device.
inline TensorView view_there(const py::handle& object, const char* name, const Device& device) {
  const TensorView v = view_anywhere(object, name);
  check_there(v, name, device);
  return v;
}

template <typename T>
T* there_1d(const py::handle& object, const char* name, DType dtype, int64_t n,
            const Device& device) {
  const TensorView v = view_anywhere(object, name);
  check_1d(v, name, dtype, n);
  check_there(v, name, device);
  return reinterpret_cast<T*>(v.data);
}

inline void refuse_capture(const Device& device) {
  const DeviceGuard guard(device.number());
  if (!is_capturing(device.stream())) return;
  throw std::runtime_error(
      "data of the CPU cannot enter a CUDA graph that is being captured: pass tensors on " +
      device.name());
}

// An argument of int64 that a kernel reads. From the CPU it is copied to a tensor that must outlive
// the launch; `check` sees it before.
struct Input {
  py::object keeps;
  const int64_t* data;
  int64_t n;

  template <typename Check>
  Input(const py::object& object, const char* name, const Device& device, Check check)
      : keeps(object) {
    const TensorView v = view_near(object, name, device);
    check_1d(v, name, DType::kInt64);
    data = reinterpret_cast<const int64_t*>(v.data);
    n = v.shape[0];
    if (device.holds(v)) return;
    check(data, n);
    refuse_capture(device);
    const py::object as_tensor = py::module_::import("torch").attr("as_tensor");
    keeps = as_tensor(object, py::arg("device") = device.torch_device);
    data = reinterpret_cast<const int64_t*>(view_there(keeps, name, device).data);
  }
};

// One operation: on the device, on the caller's stream, after what this replay did before.
class Operation {
 public:
  Operation(const Device& device, StreamOrder& order)
      : order_(order),
        guard_(device.number()),
        stream(device.stream()),
        capturing(is_capturing(stream)) {
    order_.begin(stream, capturing);
  }
  ~Operation() {
    try {
      order_.end(stream, capturing);
    } catch (const std::runtime_error&) {  // the next call meets the same error
    }
  }

 private:
  StreamOrder& order_;
  DeviceGuard guard_;

 public:
  const cudaStream_t stream;
  const bool capturing;
};

// What the tree and the ring share: the device, the counters, the staging, the order of calls.
class DeviceState {
 public:
  DeviceState(const Device& device, const py::object& counters)
      : device(device),
        counters(reinterpret_cast<Counters*>(
            there_1d<int64_t>(counters, "counters", DType::kInt64, 8, device))),
        counters_object_(counters) {
    const DeviceGuard guard(device.number());
    order = std::make_unique<StreamOrder>();
  }

  // Before memory goes back to torch, which does not know on which streams it was used.
  void wait() noexcept {
    try {
      const DeviceGuard guard(device.number());
      order->wait();
    } catch (const std::runtime_error&) {  // the process is ending
    }
  }

  bool capturing() const {
    const DeviceGuard guard(device.number());
    return is_capturing(device.stream());
  }

  // Waits for the stream. Tells an error that the device has seen, and forgets it.
  Counters read(int64_t size, const char* values, Word total = 0) {
    Counters now;
    fetch(&now, counters, sizeof now);
    if (now.error == 0) return now;
    write(Counters{}, kErrorField);
    const uint32_t first = now.error & (~now.error + 1);
    if (first == kNothingToDraw && size < 0) throw_nothing_to_draw();
    if (first == kNothingToDraw) throw_nothing_drawable();
    if (first == kIndexOutOfRange) throw_index_out_of_range(now.culprit, std::abs(size));
    if (first == kNotDrawable) throw_not_drawable(now.culprit);
    if (first == kNotFinite) throw_not_finite(values);
    if (first == kNegative) throw_negative();
    if (first == kTargetOutOfRange) throw_target_out_of_range(now.culprit, total);
    if (first == kNoWeight) throw_no_weight(now.culprit);
    if (first == kActionTooLarge) throw_action_too_large(now.culprit);
    throw_damaged();
  }

  void write(const Counters& value, unsigned fields) {
    const Operation operation(device, *order);
    launch_write(counters, value, fields, operation.stream);
  }

  // Copies from the device, and waits for it.
  void fetch(void* to, const void* from, size_t bytes) {
    if (capturing()) {
      throw std::runtime_error("a CUDA graph is being captured: nothing can be read back now");
    }
    const BesideCaptures beside;
    {  // the long wait, in which other threads may use the replay
      const DeviceGuard guard(device.number());
      const cudaStream_t stream = device.stream();
      const py::gil_scoped_release release;
      order->wait();
      check_cuda(cudaStreamSynchronize(stream), "the work before");
    }
    const Operation operation(device, *order);
    check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, operation.stream),
               "a copy from the device");
    check_cuda(cudaStreamSynchronize(operation.stream), "a copy from the device");
  }

  // Waits until the next slot can be opened. Other threads may use the replay, and its scratch,
  // meanwhile.
  static void make_room(Staging& stage) {
    for (Event* room = &stage.room(); !room->has_happened(); room = &stage.room()) {
      const py::gil_scoped_release release;
      room->wait();
    }
  }

  // New priorities, from the device or, in pieces that fit a slot, from the CPU.
  void set(const DeviceTree& tree, const py::object& indices, const py::object& values,
           const char* name, Priorities p, Staging& stage) {
    const TensorView i = view_near(indices, "indices", device);
    check_1d(i, "indices", DType::kInt64);
    const TensorView v = view_near(values, name, device);
    p.n = i.shape[0];
    check_floats(v, name, p.n);
    p.indices = reinterpret_cast<const int64_t*>(i.data);
    p.values = v.data;
    p.doubles = v.dtype == DType::kFloat64;
    if (device.holds(i) && device.holds(v)) {
      const Operation operation(device, *order);
      launch_set(tree, counters, p, operation.stream);
      return;
    }
    if (i.device != TensorView::kCpu || v.device != TensorView::kCpu) {
      throw py::value_error(std::string("indices and ") + name + " must be on one device");
    }
    refuse_capture(device);
    std::vector<double> scratch = std::move(scratch_);
    const double* const all = finite_doubles(v, name, p.n, scratch);
    check_indices(p.indices, p.n, tree.capacity);
    if (!p.errors && std::any_of(all, all + p.n, [](double x) { return x < 0.0; })) {
      throw_negative();
    }
    p.doubles = true;
    const int64_t n = p.n, most = stage.slot_bytes() / 16;
    const int64_t* const rows = p.indices;
    for (int64_t first = 0; first < n; first += p.n) {
      p.n = std::min(most, n - first);
      const size_t bytes = static_cast<size_t>(p.n) * 8;
      make_room(stage);
      const Operation operation(device, *order);
      uint8_t* const slot = stage.open();
      std::memcpy(slot, rows + first, bytes);
      std::memcpy(slot + bytes, all + first, bytes);
      uint8_t* const sent = stage.send(p.n * 16, operation.stream);
      p.indices = reinterpret_cast<const int64_t*>(sent);
      p.values = sent + bytes;
      launch_set(tree, counters, p, operation.stream);
      stage.close(operation.stream);
    }
    scratch_ = std::move(scratch);
  }

  Device device;
  Counters* counters;
  std::unique_ptr<StreamOrder> order;

 private:
  py::object counters_object_;
  std::vector<double> scratch_;  // so that no call allocates
};

// Slots in a tensor of bytes on the device.
inline std::unique_ptr<Staging> staging_in(const py::object& tensor, const Device& device) {
  const TensorView v = view_there(tensor, "staging", device);
  const DeviceGuard guard(device.number());
  return std::make_unique<Staging>(reinterpret_cast<uint8_t*>(v.data),
                                   v.shape[0] / Staging::kSlots / 16 * 16, device.stream());
}

class CudaSumTree {
 public:
  // `memory`: nodes, counters, staging, and one word of scratch.
  CudaSumTree(int64_t capacity, const py::tuple& memory, const Device& device, double alpha,
              uint64_t seed)
      : state(std::make_shared<DeviceState>(device, memory[1])),
        stage(staging_in(memory[2], device)),
        tree(capacity,
             there_1d<Word>(memory[0], "nodes", DType::kInt64, DeviceTree(capacity).slots, device)),
        seed(seed),
        alpha(alpha),
        memory_(memory),
        total_(there_1d<Word>(memory[3], "scratch", DType::kInt64, 1, device)) {
    Counters fresh{};
    fresh.max_leaf = kUnitLeaf;
    state->write(fresh, kAllFields);
  }
  ~CudaSumTree() { state->wait(); }

  static int64_t slots(int64_t capacity) {
    check_capacity(capacity, int64_t{1} << 27);
    return DeviceTree(capacity).slots;
  }

  void set(const py::object& indices, const py::object& priorities) {
    Priorities p{};
    p.alpha = alpha;
    state->set(tree, indices, priorities, "priorities", p, *stage);
  }

  py::object get(const py::object& indices, py::object out) {
    const Input rows = input(indices);
    if (out.is_none()) out = empty(rows.n, DType::kFloat64);
    double* const to = there_1d<double>(out, "out", DType::kFloat64, rows.n, state->device);
    const Operation operation(state->device, *state->order);
    launch_get(tree, state->counters, rows.data, rows.n, to, operation.stream);
    return out;
  }

  Word total() {
    const Word total = fetch_total();
    state->read(-tree.capacity, "priorities", total);
    return total;
  }

  py::object find(const py::object& targets, py::object out) {
    const Input from(targets, "targets", state->device, [](const int64_t*, int64_t) {});
    if (out.is_none()) out = empty(from.n, DType::kInt64);
    int64_t* const to = there_1d<int64_t>(out, "out", DType::kInt64, from.n, state->device);
    const Operation operation(state->device, *state->order);
    launch_find(tree, state->counters, from.data, from.n, to, operation.stream);
    return out;
  }

  py::object sample(int64_t batch_size, bool stratified, py::object out) {
    check_batch_size(batch_size);
    if (out.is_none()) out = empty(batch_size, DType::kInt64);
    int64_t* const to = there_1d<int64_t>(out, "out", DType::kInt64, batch_size, state->device);
    const Operation operation(state->device, *state->order);
    launch_draw(tree, state->counters, seed, stratified, batch_size, to, operation.stream);
    return out;
  }

  py::object weights(const py::object& indices, double beta, py::object out) {
    check_beta(beta);
    const Input rows = input(indices);
    if (out.is_none()) out = empty(rows.n, DType::kFloat32);
    float* const to = there_1d<float>(out, "out", DType::kFloat32, rows.n, state->device);
    const Operation operation(state->device, *state->order);
    launch_weights(tree, state->counters, rows.data, rows.n, beta, to, operation.stream);
    return out;
  }

  void check() { read(); }

  void check_valid() {
    {
      const Operation operation(state->device, *state->order);
      launch_check(tree, state->counters, operation.stream);
    }
    read();
  }

  void rebuild() {
    const Operation operation(state->device, *state->order);
    launch_rebuild(tree, operation.stream);
  }

  uint64_t calls() { return read().calls; }
  void set_calls(uint64_t calls) {
    Counters now{};
    now.calls = calls;
    state->write(now, kCallsField);
  }

  std::shared_ptr<DeviceState> state;  // shared with the ring that draws from this tree
  std::unique_ptr<Staging> stage;
  DeviceTree tree;
  uint64_t seed;
  double alpha;

 private:
  Input input(const py::object& indices) const {
    const int64_t size = tree.capacity;
    return Input(indices, "indices", state->device,
                 [size](const int64_t* rows, int64_t n) { check_indices(rows, n, size); });
  }
  py::object empty(int64_t n, DType dtype) const {
    return empty_1d(n, dtype, state->device.torch_device);
  }
  Word fetch_total() {
    {
      const Operation operation(state->device, *state->order);
      launch_total(tree, total_, operation.stream);
    }
    Word total;
    state->fetch(&total, total_, sizeof total);
    return total;
  }
  Counters read() { return state->read(-tree.capacity, "priorities", fetch_total()); }

  py::tuple memory_;
  Word* total_;
};

class CudaFrameRing {
 public:
  // `memory`: frames, actions, rewards, flags, powers, staging, and counters, which are those of
  // `tree` unless that is None.
  CudaFrameRing(const py::tuple& memory, const py::object& tree, const Device& device,
                const py::tuple& frame_shape, bool float_frames, int stack, bool stack_axis,
                uint64_t seed)
      : seed(seed),
        memory_(py::make_tuple(memory, tree)),
        format_{{}, float_frames, stack, stack_axis},
        owner_(tree.is_none() ? nullptr : &py::cast<CudaSumTree&>(tree)),
        state_(owner_ != nullptr ? owner_->state
                                 : std::make_shared<DeviceState>(device, memory[6])),
        stage_(staging_in(memory[5], device)),
        tree_(owner_ != nullptr ? owner_->tree : DeviceTree(1)) {
    // Frames may be pinned memory of the CPU.
    const TensorView frames = view_anywhere(memory[0], "frames");
    for (const py::handle& side : frame_shape) format_.shape.push_back(py::cast<int64_t>(side));
    RingLayout& layout = ring_.layout;
    layout.num_envs = frames.shape[0];
    layout.rows = frames.shape[1];
    layout.frame_bytes = format_.bytes();
    if (layout.frame_bytes > int64_t{1} << 26) {
      throw py::value_error("frames on CUDA devices hold at most 2^26 bytes");
    }
    const TensorView powers = view_there(memory[4], "powers", device);
    layout.stack = stack;
    layout.n_step = static_cast<int>(powers.shape[0]) - 1;
    ring_.memory.frames = reinterpret_cast<uint8_t*>(frames.data);
    ring_.memory.actions =
        reinterpret_cast<int32_t*>(view_there(memory[1], "actions", device).data);
    ring_.memory.rewards = reinterpret_cast<float*>(view_there(memory[2], "rewards", device).data);
    ring_.memory.flags = reinterpret_cast<uint8_t*>(view_there(memory[3], "flags", device).data);
    ring_.powers = reinterpret_cast<const float*>(powers.data);
    ring_.counters = state_->counters;
    write(Counters{});
  }
  ~CudaFrameRing() { state_->wait(); }

  // Bytes of a staging slot that a row of all games needs.
  static int64_t row_bytes(int64_t num_envs, int64_t frame_bytes) {
    return columns(num_envs) + num_envs * frame_bytes;
  }

  void add(const py::object& frames, const py::object& actions, const py::object& rewards,
           const py::object& terminations, const py::object& episode_starts) {
    const int64_t n = ring_.layout.num_envs, bytes = ring_.layout.frame_bytes;
    const Device& device = state_->device;
    const TensorView f = view_near(frames, "frames", device);
    check_frames(f, format_, n);
    const TensorView a = view_near(actions, "actions", device);
    const TensorView r = view_near(rewards, "rewards", device);
    check_actions(a, n);
    check_rewards(r, n);
    const TensorView ends = view_near(terminations, "terminations", device);
    const TensorView starts = view_near(episode_starts, "episode_starts", device);
    check_1d(ends, "terminations", DType::kBool, n);
    check_1d(starts, "episode_starts", DType::kBool, n);

    const int64_t stride = f.strides[0] * size_of(f.dtype);
    Row row{reinterpret_cast<const uint8_t*>(f.data),
            stride,
            column(a),
            column(r),
            reinterpret_cast<const uint8_t*>(ends.data),
            reinterpret_cast<const uint8_t*>(starts.data)};
    const bool there[] = {device.holds(f), device.holds(a), device.holds(r), device.holds(ends),
                          device.holds(starts)};
    const bool all_there = std::all_of(there, there + 5, [](bool x) { return x; });
    if (!all_there) {
      refuse_capture(device);
      state_->make_room(*stage_);
    }
    if (!there[1]) {
      actions_.resize(static_cast<size_t>(n));
      read_actions(a, n, actions_.data());
    }
    const Operation operation(device, *state_->order);
    if (!all_there) {
      uint8_t* const slot = stage_->open();
      const int64_t at[] = {columns(n), 0, 4 * n, 8 * n, 9 * n};
      if (!there[1]) std::memcpy(slot + at[1], actions_.data(), static_cast<size_t>(4 * n));
      if (!there[2]) {
        float* const to = reinterpret_cast<float*>(slot + at[2]);
        for (int64_t i = 0; i < n; ++i) to[i] = element<float>(r, i);
      }
      if (!there[3]) std::memcpy(slot + at[3], ends.data, static_cast<size_t>(n));
      if (!there[4]) std::memcpy(slot + at[4], starts.data, static_cast<size_t>(n));
      if (!there[0]) {
        for (int64_t game = 0; game < n; ++game) {
          std::memcpy(slot + at[0] + game * bytes, f.data + game * stride,
                      static_cast<size_t>(bytes));
        }
      }
      uint8_t* const sent =
          stage_->send(there[0] ? columns(n) : row_bytes(n, bytes), operation.stream);
      if (!there[0]) {
        row.frames = sent + at[0];
        row.frame_stride = bytes;
      }
      if (!there[1]) row.actions = {sent + at[1], Column::kInt32, 1};
      if (!there[2]) row.rewards = {sent + at[2], Column::kFloat32, 1};
      if (!there[3]) row.terminations = sent + at[3];
      if (!there[4]) row.episode_starts = sent + at[4];
    }
    launch_add(ring_, tree_, row, operation.stream);
    if (!all_there) stage_->close(operation.stream);
    if (operation.capturing) {
      captured_add_ = true;
    } else {
      stored_ = std::min(stored_ + 1, ring_.layout.rows);
    }
  }

  void draw(const py::object& out, bool stratified) {
    const TensorView v = view_there(out, "out", state_->device);
    check_1d(v, "out", DType::kInt64);
    SampleJob job{};
    job.n = v.shape[0];
    job.indices = reinterpret_cast<int64_t*>(v.data);
    job.draw = true;
    job.seed = seed;
    job.stratified = stratified;
    sample(job);
  }

  void gather(const py::tuple& batch, bool draw_first, bool stratified, double scale,
              bool channels_last) {
    const Device& device = state_->device;
    const int64_t size = ring_.layout.num_envs * ring_.layout.rows;
    SampleJob job{};
    py::object keeps;
    if (draw_first) {
      const TensorView rows = view_there(batch[5], "indices", device);
      check_1d(rows, "indices", DType::kInt64);
      job.n = rows.shape[0];
      job.indices = reinterpret_cast<int64_t*>(rows.data);
    } else {
      const Input rows(batch[5], "indices", device, [size](const int64_t* indices, int64_t n) {
        check_indices(indices, n, size);
      });
      job.n = rows.n;
      job.indices = const_cast<int64_t*>(rows.data);  // not written
      keeps = rows.keeps;
    }
    job.draw = draw_first;
    job.seed = seed;
    job.stratified = stratified;
    job.gather = true;
    job.format.scale = static_cast<float>(scale);
    job.format.channels_last = channels_last;
    BatchMemory& memory = job.batch;
    const TensorView obs = view_anywhere(batch[0], "obs");
    const TensorView next_obs = view_anywhere(batch[3], "next_obs");
    memory.obs_stride = check_frames_out(obs, "obs", job.n, format_, channels_last);
    memory.next_obs_stride = check_frames_out(next_obs, "next_obs", job.n, format_, channels_last);
    if (obs.dtype != next_obs.dtype) throw py::type_error("obs and next_obs must have one dtype");
    check_there(obs, "obs", device);
    check_there(next_obs, "next_obs", device);
    memory.obs = reinterpret_cast<uint8_t*>(obs.data);
    memory.next_obs = reinterpret_cast<uint8_t*>(next_obs.data);
    job.format.output = output_of(obs.dtype, format_.floats);
    memory.actions = there_1d<int64_t>(batch[1], "actions", DType::kInt64, job.n, device);
    memory.rewards = there_1d<float>(batch[2], "rewards", DType::kFloat32, job.n, device);
    memory.discounts = there_1d<float>(batch[4], "discounts", DType::kFloat32, job.n, device);
    job.is_weights = there_1d<float>(batch[6], "is_weights", DType::kFloat32, job.n, device);
    sample(job);
  }

  void drawable(const py::object& indices, const py::object& out) {
    const int64_t size = ring_.layout.num_envs * ring_.layout.rows;
    const Input rows(indices, "indices", state_->device,
                     [size](const int64_t* all, int64_t n) { check_indices(all, n, size); });
    bool* const to = there_1d<bool>(out, "out", DType::kBool, rows.n, state_->device);
    const Operation operation(state_->device, *state_->order);
    launch_drawable(ring_, rows.data, rows.n, to, operation.stream);
  }

  void update(const py::object& indices, const py::object& td_error, double alpha, double epsilon) {
    Priorities p{};
    p.alpha = alpha;
    p.errors = true;
    p.epsilon = epsilon;
    p.flags = ring_.memory.flags;
    state_->set(tree_, indices, td_error, "td_error", p, *owner_->stage);
  }

  // Takes over memory that was filled from outside, kDrawable included.
  void restore(int64_t stored, int64_t head, uint32_t max_leaf, uint64_t calls,
               int64_t n_drawable) {
    Counters now{};
    now.stored = stored;
    now.head = head;
    now.max_leaf = max_leaf;
    now.calls = calls;
    now.n_drawable = n_drawable;
    write(now);
    stored_ = stored;
    captured_add_ = false;
    seen_drawable_ = n_drawable > 0;
    if (owner_ != nullptr) owner_->rebuild();
  }

  Counters read() { return state_->read(ring_.layout.num_envs * ring_.layout.rows, "td_error"); }
  // Known without asking, until a captured add() may have been replayed.
  int64_t stored() {
    if (captured_add_ && stored_ < ring_.layout.rows) stored_ = read().stored;
    return stored_;
  }

  double beta() const { return beta_; }
  void set_beta(double beta) {
    check_beta(beta);
    beta_ = beta;
    Counters now{};
    now.beta = beta;
    state_->write(now, kBetaField);
  }

  uint64_t seed;

 private:
  // Actions, rewards, terminations, starts: 10 bytes a game, and the frames begin on 16.
  static int64_t columns(int64_t num_envs) { return (10 * num_envs + 15) / 16 * 16; }

  static Column column(const TensorView& v) {
    const Column::Type type = v.dtype == DType::kInt32     ? Column::kInt32
                              : v.dtype == DType::kInt64   ? Column::kInt64
                              : v.dtype == DType::kFloat32 ? Column::kFloat32
                                                           : Column::kFloat64;
    return {v.data, type, v.strides[0]};
  }

  void sample(const SampleJob& job) {
    if (job.draw && !seen_drawable_) {
      if (stored_ == 0 && !captured_add_) throw_nothing_drawable();
      if (!state_->capturing()) {
        if (read().n_drawable == 0) throw_nothing_drawable();
        seen_drawable_ = true;
      }
    }
    const Operation operation(state_->device, *state_->order);
    launch_sample(ring_, tree_, job, operation.stream);
  }

  void write(Counters value) {
    if (value.max_leaf == 0) value.max_leaf = kUnitLeaf;
    value.beta = beta_;
    state_->write(value, kAllFields);
  }

  py::tuple memory_;
  FrameFormat format_;
  CudaSumTree* owner_;
  std::shared_ptr<DeviceState> state_;
  std::unique_ptr<Staging> stage_;
  DeviceTree tree_;  // without nodes if draws are uniform
  DeviceRing ring_{};
  double beta_ = 0.0;
  int64_t stored_ = 0;
  bool captured_add_ = false, seen_drawable_ = false;
  std::vector<int32_t> actions_;  // scratch, so that no call allocates
};

}  // namespace fastreplay
