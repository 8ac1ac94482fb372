// The backends of CheckedTree and CheckedRing on a CUDA device: a DeviceTree and a DeviceRing, the
// staging of data that comes from the CPU, and the order of calls on several streams.
//
// No call reads results back from the device unless its comment says so. Errors that only the
// device can detect are latched in its counters, and raised by check() and every call that waits.
// The GIL protects everything.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/priority.h"
#include "cuda/counters.h"
#include "cuda/device_ring.h"
#include "cuda/device_tree.h"
#include "cuda/runtime.h"
#include "cuda/staging.h"
#include "cuda/tile_mirror.h"
#include "python/checked_ring.h"
#include "python/tile_state.h"

namespace fastreplay {

// The counters of a tree and of the ring that draws from it, and the order of their operations.
class DeviceState {
 public:
  DeviceState(const Device& device, const py::object& counters)
      : device(device),
        counters(reinterpret_cast<Counters*>(device.output<int64_t>(counters, "counters", 8))),
        number_(std::max(device.index, 0)) {
    const DeviceGuard guard(number_);
    order_ = std::make_unique<StreamOrder>();
  }

  // Calls work(stream) with this device as the current one, ordered after all earlier operations.
  // Returns whether it was captured.
  template <typename Work>
  bool run(Work work) {
    return run_on(stream(), work);
  }
  template <typename Work>
  bool run_on(cudaStream_t stream, Work work) {
    const DeviceGuard guard(number_);
    const bool is_captured = order_->begin(stream);
    work(stream);
    order_->end(stream, is_captured);
    return is_captured;
  }

  bool is_capturing() const {
    const DeviceGuard guard(number_);
    return fastreplay::is_capturing(stream());
  }

  void refuse_capture() const {
    if (!is_capturing()) return;
    throw std::runtime_error(
        "data on the CPU cannot be part of a CUDA graph capture: pass tensors on " + device.name());
  }

  // Waits for all operations. Called before memory is returned to torch, which does not know which
  // streams have used it.
  void wait() noexcept {
    try {
      const DeviceGuard guard(number_);
      order_->wait();
    } catch (const std::runtime_error&) {  // the process is ending
    }
  }

  // Copies from the device to the CPU, and waits for it.
  void fetch(void* to, const void* from, size_t bytes) {
    if (is_capturing()) {
      throw std::runtime_error("nothing can be read back during a CUDA graph capture");
    }
    const RelaxedCapture relaxed;
    {  // the long wait, without the GIL: other threads may use the replay
      const DeviceGuard guard(number_);
      const cudaStream_t stream = this->stream();
      const py::gil_scoped_release release;
      order_->wait();
      check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    }
    run([&](cudaStream_t stream) {
      check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream),
                 "a copy from the device");
      check_cuda(cudaStreamSynchronize(stream), "a copy from the device");
    });
  }

  // Waits for the stream. Raises and clears a latched error. `total`: of a tree; null for a ring.
  Counters read(int64_t size, const Word* total) {
    Counters now;
    fetch(&now, counters, sizeof now);
    if (now.error == 0) return now;
    write(Counters{}, kErrorField);
    const uint32_t first = now.error & (~now.error + 1);  // the lowest bit
    if (first == kNothingToDraw && total != nullptr) throw_nothing_to_draw();
    if (first == kNothingToDraw) throw_nothing_drawable();
    if (first == kIndexOutOfRange) throw_index_out_of_range(now.culprit, size);
    if (first == kNotDrawable) throw_not_drawable(now.culprit);
    if (first == kNotFinite) throw_not_finite(total != nullptr ? "priorities" : "td_error");
    if (first == kNegative) throw_negative();
    if (first == kTargetOutOfRange && total != nullptr) {
      throw_target_out_of_range(now.culprit, *total);
    }
    if (first == kNoWeight) throw_no_weight(now.culprit);
    if (first == kActionTooLarge) throw_action_too_large(now.culprit);
    throw_damaged();
  }

  void write(const Counters& value, unsigned fields) {
    run([&](cudaStream_t stream) { launch_write(counters, value, fields, stream); });
  }

  // Staging slots in a uint8 tensor on the device.
  std::unique_ptr<Staging> make_staging(const py::object& tensor) const {
    const TensorView v = view(tensor, "staging");
    const DeviceGuard guard(number_);
    return std::make_unique<Staging>(device.output<uint8_t>(tensor, "staging", v.shape[0]),
                                     v.shape[0] / Staging::kSlots / 16 * 16, stream());
  }

  // Waits, without the GIL, until the next slot may be overwritten.
  static void wait_for_slot(Staging& staging) {
    for (Event* copied = &staging.next_copied(); !copied->is_done();
         copied = &staging.next_copied()) {
      const py::gil_scoped_release release;
      copied->wait();
    }
  }

  // Copies indices that are on the CPU to the device.
  void make_resident(Indices& indices) const {
    if (!indices.on_cpu) return;
    refuse_capture();
    const RelaxedCapture relaxed;  // the copy waits, which another thread's capture would not allow
    const py::object copy = empty_1d(indices.n, DType::kInt64);
    if (indices.n > 0) {
      std::memcpy(view(copy, "indices").data, indices.data, static_cast<size_t>(indices.n) * 8);
    }
    indices.owner = copy.attr("to")(device.torch_device);
    indices.data = view(indices.owner, "indices").as<const int64_t>();
    indices.on_cpu = false;
  }

  // Writes new priorities. Those on the CPU are sent in pieces that fit a staging slot.
  void set(const DeviceTree& tree, const Pairs& pairs, Priorities p, Staging& staging) {
    p.values = pairs.values.data;
    p.doubles = pairs.values.dtype == DType::kFloat64;
    p.n = pairs.indices.n;
    if (pairs.cpu_values == nullptr) {
      Indices rows = pairs.indices;
      make_resident(rows);
      p.indices = rows.data;
      run([&](cudaStream_t stream) { launch_set(tree, counters, p, stream); });
      return;
    }
    refuse_capture();
    p.doubles = true;
    const int64_t n = p.n, piece = staging.slot_bytes() / 16;
    for (int64_t first = 0; first < n; first += p.n) {
      p.n = std::min(piece, n - first);
      const size_t bytes = static_cast<size_t>(p.n) * 8;
      wait_for_slot(staging);
      run([&](cudaStream_t stream) {
        const Staging::Slot slot = staging.open();
        std::memcpy(slot.host, pairs.indices.data + first, bytes);
        std::memcpy(slot.host + bytes, pairs.cpu_values + first, bytes);
        staging.send(p.n * 16, stream);
        p.indices = reinterpret_cast<const int64_t*>(slot.device);
        p.values = slot.device + bytes;
        launch_set(tree, counters, p, stream);
        staging.close(stream);
      });
    }
  }

  // torch's current stream. Calls Python, so another thread may run meanwhile.
  cudaStream_t stream() const {
    return reinterpret_cast<cudaStream_t>(py::cast<uintptr_t>(device.current_stream(device.index)));
  }

  const Device device;
  Counters* const counters;

 private:
  const int number_;
  std::unique_ptr<StreamOrder> order_;
};

class CudaTree {
 public:
  // `memory`: nodes, counters, staging.
  CudaTree(int64_t capacity, const py::tuple& memory, const Device& device)
      : state(std::make_shared<DeviceState>(device, memory[1])),
        staging(state->make_staging(memory[2])),
        tree(capacity,
             reinterpret_cast<Word*>(device.output<int64_t>(memory[0], "nodes", slots(capacity)))) {
    Counters fresh{};
    fresh.max_leaf = kUnitLeaf;
    state->write(fresh, kAllFields);
  }
  ~CudaTree() { state->wait(); }

  static int64_t slots(int64_t capacity) { return DeviceTree(capacity).slots; }

  int64_t capacity() const { return tree.capacity; }

  void set(const Pairs& pairs, double alpha) {
    Priorities p{};
    p.alpha = alpha;
    state->set(tree, pairs, p, *staging);
  }

  void get(const Indices& rows, double* out) { launch(launch_get, rows, out); }
  void find(const Indices& targets, int64_t* out) { launch(launch_find, targets, out); }
  void weights(const Indices& rows, double beta, float* out) {
    launch(launch_weights, rows, beta, out);
  }
  void draw(uint64_t seed, bool stratified, int64_t n, int64_t* out) {
    state->run([&](cudaStream_t stream) {
      launch_draw(tree, state->counters, seed, stratified, n, out, stream);
    });
  }

  void rebuild() {
    state->run([&](cudaStream_t stream) { launch_rebuild(tree, stream); });
  }
  void set_calls(uint64_t calls) {
    Counters now{};
    now.calls = calls;
    state->write(now, kCallsField);
  }

  // These wait for the stream.
  Word total() { return read().first; }
  void check() { (void)read(); }
  void check_valid() {
    state->run([&](cudaStream_t stream) { launch_check(tree, state->counters, stream); });
    (void)read();
  }
  uint64_t calls() { return read().second.calls; }

  const std::shared_ptr<DeviceState> state;  // shared with the ring that draws from this tree
  const std::unique_ptr<Staging> staging;
  const DeviceTree tree;

 private:
  // Launches a kernel that reads n integers.
  template <typename Launch, typename... Arguments>
  void launch(Launch launch_kernel, Indices indices, Arguments... arguments) {
    state->make_resident(indices);
    state->run([&](cudaStream_t stream) {
      launch_kernel(tree, state->counters, indices.data, indices.n, arguments..., stream);
    });
  }

  // The total, and the counters.
  std::pair<Word, Counters> read() {
    Word root[kDeviceFanOut], total = 0;
    state->fetch(root, tree.nodes + tree.offset[tree.levels - 1], sizeof root);
    for (const Word entry : root) total += entry;
    return {total, state->read(tree.capacity, &total)};
  }
};

class CudaRing {
 public:
  using Tree = CudaTree;

  // `memory`: frames (on the device, in pinned memory of the host, or None for tiles), actions,
  // rewards, flags, powers, staging, and counters (unused if there is a tree: both share the
  // tree's).
  CudaRing(const py::tuple& memory, CudaTree* tree, const Device& device, const RingLayout& layout,
           int /* threads */)
      : owner_(tree),
        state_(tree != nullptr ? tree->state : std::make_shared<DeviceState>(device, memory[6])),
        staging_(state_->make_staging(memory[5])),
        tree_(tree != nullptr ? tree->tree : DeviceTree(1)) {
    if (layout.frame_bytes > int64_t{1} << 26) {
      throw py::value_error("a frame on a CUDA device may have at most 2^26 bytes");
    }
    ring_.layout = layout;
    ring_.memory = {memory[0].is_none() ? nullptr : view(memory[0], "frames").as<uint8_t>(),
                    view(memory[1], "actions").as<int32_t>(),
                    view(memory[2], "rewards").as<float>(), view(memory[3], "flags").as<uint8_t>()};
    ring_.powers = view(memory[4], "powers").as<const float>();
    ring_.counters = state_->counters;
    if (ring_.memory.frames == nullptr) {
      store_ = std::make_unique<TileStore>(layout.rows, layout.num_envs,
                                           TileShape(layout.frame_bytes, layout.frame_width));
      tables_ = allocate(TileMirror::table_bytes(*store_));
      mirror_ = make_mirror(*store_);
      ring_.tiles = mirror_->device();
      watch_store();
    }
    write(Counters{});
  }
  ~CudaRing() { state_->wait(); }

  // Bytes of a staging slot for one row of each game. Patches of tiles take several slots if they
  // are many.
  static int64_t row_bytes(int64_t num_envs, int64_t frame_bytes, bool tiles) {
    const int64_t frames = num_envs * frame_bytes;
    return column_bytes(num_envs) + (tiles ? std::max(frames, kLeastPatchBytes) : frames);
  }

  void add(const RowViews& views) {
    const Device& device = state_->device;
    const int64_t n = ring_.layout.num_envs;
    Row row{views.frames.as<const uint8_t>(),
            views.frames.strides[0] * size_of(views.frames.dtype),
            column(views.actions),
            column(views.rewards),
            views.terminations.as<const uint8_t>(),
            views.episode_starts.as<const uint8_t>()};
    const bool staged = !(device.holds(views.frames) && device.holds(views.actions) &&
                          device.holds(views.rewards) && device.holds(views.terminations) &&
                          device.holds(views.episode_starts));
    const bool tiled = store_ != nullptr;
    if (tiled && state_->is_capturing()) {
      throw std::runtime_error("add() of frames in tiles cannot be part of a CUDA graph capture");
    }
    std::vector<uint8_t> fetched;
    if (tiled && device.holds(views.frames)) fetch_frames(row, fetched);
    const cudaStream_t current = state_->stream();  // before anything is changed
    if (staged || tiled) {
      if (staged) state_->refuse_capture();
      make_room();
      if (!device.holds(views.actions)) {  // before any change, because it may raise
        actions_.resize(static_cast<size_t>(n));
        read_actions(views.actions, n, actions_.data());
      }
    }
    if (tiled) {
      new_tiles_.clear();
      patches_.clear();
      store_->add(row.frames, row.frame_stride);
      mirror_->add(new_tiles_, patches_);
    }
    const bool is_captured = state_->run_on(current, [&](cudaStream_t stream) {
      if (staged || tiled) stage(views, row, stream);
      launch_add(ring_, tree_, row, stream);
      if (staged || tiled) staging_->close(stream);
    });
    captured_add_ |= is_captured;
    if (!is_captured) stored_ = std::min(stored_ + 1, ring_.layout.rows);
  }

  // A draw waits for the stream until one draw has found a drawable row.
  void sample(const SampleJob& job, double /* beta: in the counters */) {
    if (job.draw && !seen_drawable_) {
      if (stored_ == 0 && !captured_add_) throw_nothing_drawable();
      if (!state_->is_capturing()) {
        if (read().n_drawable == 0) throw_nothing_drawable();
        seen_drawable_ = true;
      }
    }
    state_->run([&](cudaStream_t stream) { launch_sample(ring_, tree_, job, stream); });
  }

  void make_resident(Indices& rows) const { state_->make_resident(rows); }
  void copy_indices(const Indices& rows, int64_t*, const py::object& out) const {
    out.attr("copy_")(rows.owner);
  }

  void drawable(const Indices& rows, bool* out) {
    state_->run(
        [&](cudaStream_t stream) { launch_drawable(ring_, rows.data, rows.n, out, stream); });
  }

  void update(const Pairs& pairs, double alpha, double epsilon, bool added) {
    Priorities p{};
    p.alpha = alpha;
    p.errors = true;
    p.epsilon = epsilon;
    p.added = added;
    p.flags = ring_.memory.flags;
    state_->set(tree_, pairs, p, *owner_->staging);
  }

  void set_beta(double beta) {
    beta_ = beta;
    Counters now{};
    now.beta = beta;
    state_->write(now, kBetaField);
  }

  // Called after the caller has filled the memory, including flag kDrawable.
  void restore(const RingState& state) {
    Counters now{};
    now.stored = state.stored;
    now.head = state.head;
    now.max_leaf = state.max_leaf;
    now.calls = state.calls;
    now.n_drawable = state.n_drawable;
    write(now);
    stored_ = state.stored;
    captured_add_ = false;
    seen_drawable_ = state.n_drawable > 0;
    if (owner_ != nullptr) owner_->rebuild();
  }

  // Of a ring that stores tiles.
  py::tuple tile_state() const { return fastreplay::tile_state(*store_); }

  // Replaces the frames by those of a state. ValueError if it is damaged; nothing changes then.
  void restore_tiles(int64_t added, const py::object& pixels, const py::list& sizes,
                     const py::list& chunks) {
    auto restored = restored_tiles(*store_, added, pixels, sizes, chunks);
    auto mirror = make_mirror(*restored);
    patches_.clear();
    mirror->copy_all(patches_);
    state_->run([](cudaStream_t) {});  // the new memory is used after what torch has enqueued
    DeviceState::wait_for_slot(*staging_);
    state_->run([&](cudaStream_t stream) {
      const Piece last = send_patches(stream);
      staging_->send(last.bytes, stream);
      launch_patches(last.patches, last.n, stream);
      staging_->close(stream);
    });
    state_->wait();  // for the samples that read the old memory
    store_ = std::move(restored);
    mirror_ = std::move(mirror);
    watch_store();
  }

  // Rows added to each game, tiles, bytes on the device.
  py::tuple tile_counts() const {
    return py::make_tuple(store_->added(), store_->dictionary().tiles(), mirror_->bytes());
  }

  void check_tiles() const {
    if (!store_->is_valid()) {
      throw std::runtime_error("the tiles are damaged: a count of references is wrong");
    }
  }

  // Waits only if a captured add may have been launched.
  int64_t stored() {
    if (captured_add_ && stored_ < ring_.layout.rows) stored_ = read().stored;
    return stored_;
  }
  // These wait for the stream.
  void check() { (void)read(); }
  RingState state() {
    const Counters now = read();
    return {now.stored, now.head, now.n_drawable, now.max_leaf, now.calls};
  }

 private:
  static constexpr int64_t kLeastPatchBytes = 1 << 16;

  // Memory of the device, uninitialised, from torch.
  TileMirror::Memory allocate(int64_t bytes) const {
    const py::object tensor = empty_1d(bytes, DType::kUint8, state_->device.torch_device);
    return {view(tensor, "tiles").as<uint8_t>(), [tensor](uint8_t*) {}};
  }
  std::unique_ptr<TileMirror> make_mirror(const TileStore& store) const {
    return std::make_unique<TileMirror>(store, tables_.get(),
                                        [this](int64_t bytes) { return allocate(bytes); });
  }

  // Room for all that one add() can list.
  void watch_store() {
    const int64_t ids = store_->num_envs() * store_->layout().positions;
    const int64_t pieces = store_->longest_open() / TileMirror::kMaxPatch + 4;
    new_tiles_.reserve(static_cast<size_t>(ids));
    patches_.clear();
    patches_.shrink_to_fit();
    patches_.reserve(static_cast<size_t>(ids + store_->num_envs() * pieces + 8));
    store_->report_new_tiles(&new_tiles_);
  }

  // Waits until the next slot may be overwritten and, with tiles, the device has memory for the
  // next add(). When it returns, no other thread has run since the last check.
  void make_room() {
    DeviceState::wait_for_slot(*staging_);
    while (store_ != nullptr && mirror_->reserve()) {
      state_->run([](cudaStream_t) {});  // the new memory is used after what torch has enqueued
      DeviceState::wait_for_slot(*staging_);
    }
  }

  // Copies frames that are on the device to the CPU, where they are coded. Waits for the stream.
  void fetch_frames(Row& row, std::vector<uint8_t>& to) const {
    const int64_t n = ring_.layout.num_envs, bytes = ring_.layout.frame_bytes;
    to.resize(static_cast<size_t>(n * bytes));
    for (int64_t game = 0; game < n; ++game) {
      state_->fetch(to.data() + game * bytes, row.frames + game * row.frame_stride,
                    static_cast<size_t>(bytes));
    }
    row.frames = to.data();
    row.frame_stride = bytes;
  }

  // Patches in the current slot, after the columns.
  struct Piece {
    Staging::Slot slot;
    int64_t bytes;  // to send
    const DevicePatch* patches;
    int64_t n;
  };

  // Opens a slot and fills it with patches_. If they do not fit, sends and applies those that do,
  // and goes on with the next slot; the last one is returned, and not sent. It does not release the
  // GIL: no other call may see a part of the patches.
  //
  //   slot    | columns | patch | patch | ... | bytes of a patch | bytes of a patch | ... |
  Piece send_patches(cudaStream_t stream) {
    const int64_t first = column_bytes(ring_.layout.num_envs);
    const auto padded = [](int64_t bytes) { return (bytes + 15) / 16 * 16; };
    for (size_t sent = 0;;) {
      const Staging::Slot slot = staging_->open();
      int64_t bytes = 0;
      size_t end = sent;
      for (; end < patches_.size(); ++end) {
        const int64_t more = int64_t{sizeof(DevicePatch)} + padded(patches_[end].bytes);
        if (first + bytes + more > staging_->slot_bytes()) break;
        bytes += more;
      }
      const int64_t n = static_cast<int64_t>(end - sent);
      DevicePatch* const to = reinterpret_cast<DevicePatch*>(slot.host + first);
      int64_t at = n * int64_t{sizeof(DevicePatch)};
      for (int64_t i = 0; i < n; ++i) {
        const Patch& patch = patches_[sent + static_cast<size_t>(i)];
        to[i] = {patch.to, static_cast<uint32_t>(at), static_cast<uint32_t>(patch.bytes)};
        std::memcpy(slot.host + first + at, patch.from, static_cast<size_t>(patch.bytes));
        at += padded(patch.bytes);
      }
      const Piece piece{slot, first + at, reinterpret_cast<DevicePatch*>(slot.device + first), n};
      sent = end;
      if (sent == patches_.size()) return piece;
      staging_->send(piece.bytes, stream);
      launch_patches(piece.patches, n, stream);
      staging_->close(stream);
      staging_->next_copied().wait();
    }
  }

  // Bytes of actions (int32), rewards (float32), terminations and starts; a multiple of 16, so that
  // the frames after them are aligned.
  static int64_t column_bytes(int64_t num_envs) { return (10 * num_envs + 15) / 16 * 16; }

  static Column column(const TensorView& v) {
    const Column::Type type = v.dtype == DType::kInt32     ? Column::kInt32
                              : v.dtype == DType::kInt64   ? Column::kInt64
                              : v.dtype == DType::kFloat32 ? Column::kFloat32
                                                           : Column::kFloat64;
    return {v.data, type, v.strides[0]};
  }

  // Sends the columns that are on the CPU to the device, and points `row` to the copies. Frames in
  // tiles are sent as patches_.
  //
  //   slot    | actions | rewards | terminations | episode_starts | frames, or patches |
  void stage(const RowViews& views, Row& row, cudaStream_t stream) {
    const Device& device = state_->device;
    const int64_t n = ring_.layout.num_envs, bytes = ring_.layout.frame_bytes;
    Piece piece{};
    if (store_ != nullptr) piece = send_patches(stream);
    const Staging::Slot slot = store_ != nullptr ? piece.slot : staging_->open();
    if (!device.holds(views.actions)) {
      std::memcpy(slot.host, actions_.data(), static_cast<size_t>(4 * n));
      row.actions = {slot.device, Column::kInt32, 1};
    }
    if (!device.holds(views.rewards)) {
      read_rewards(views.rewards, n, reinterpret_cast<float*>(slot.host + 4 * n));
      row.rewards = {slot.device + 4 * n, Column::kFloat32, 1};
    }
    if (!device.holds(views.terminations)) {
      std::memcpy(slot.host + 8 * n, row.terminations, static_cast<size_t>(n));
      row.terminations = slot.device + 8 * n;
    }
    if (!device.holds(views.episode_starts)) {
      std::memcpy(slot.host + 9 * n, row.episode_starts, static_cast<size_t>(n));
      row.episode_starts = slot.device + 9 * n;
    }
    const int64_t first = column_bytes(n);
    if (store_ != nullptr) {
      staging_->send(piece.bytes, stream);
      return launch_patches(piece.patches, piece.n, stream);
    }
    if (device.holds(views.frames)) return staging_->send(first, stream);
    for (int64_t game = 0; game < n; ++game) {
      std::memcpy(slot.host + first + game * bytes, row.frames + game * row.frame_stride,
                  static_cast<size_t>(bytes));
    }
    row.frames = slot.device + first;
    row.frame_stride = bytes;
    staging_->send(row_bytes(n, bytes, false), stream);
  }

  Counters read() { return state_->read(ring_.layout.num_envs * ring_.layout.rows, nullptr); }

  void write(Counters value) {
    if (value.max_leaf == 0) value.max_leaf = kUnitLeaf;
    value.beta = beta_;
    state_->write(value, kAllFields);
  }

  CudaTree* const owner_;  // of the tree; null: uniform draws
  const std::shared_ptr<DeviceState> state_;
  const std::unique_ptr<Staging> staging_;
  const DeviceTree tree_;  // without nodes if draws are uniform
  DeviceRing ring_{};
  double beta_ = 0.0;
  int64_t stored_ = 0;          // rows of a game, as far as the host knows
  bool captured_add_ = false;   // whether the device may have stored more
  bool seen_drawable_ = false;  // from then on there is always something to draw
  std::vector<int32_t> actions_;
  // With tiles: the frames on the host, their copy on the device, and what the next stage() sends.
  TileMirror::Memory tables_;
  std::vector<uint32_t> new_tiles_;
  std::vector<Patch> patches_;
  std::unique_ptr<TileStore> store_;
  std::unique_ptr<TileMirror> mirror_;
};

}  // namespace fastreplay
