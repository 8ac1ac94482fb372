// The backends of CheckedTree and CheckedRing on the CPU: a SumTree with its draw counter, and a
// FrameRing with a lock that admits one call at a time.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "core/priority.h"
#include "cpu/frame_ring.h"
#include "cpu/sum_tree.h"
#include "python/checked_ring.h"
#include "python/tile_state.h"

#ifdef __unix__
#include <unistd.h>
#endif

namespace fastreplay {

// A mutex that a child of fork() replaces, because its inherited copy may be locked forever.
class ProcessMutex {
 public:
  // The caller holds the GIL.
  std::mutex& get() {
#ifdef __unix__
    if (pid_ != getpid()) {
      (void)mutex_.release();
      mutex_ = std::make_unique<std::mutex>();
      pid_ = getpid();
    }
#endif
    return *mutex_;
  }

 private:
  int64_t pid_ = -1;
  std::unique_ptr<std::mutex> mutex_ = std::make_unique<std::mutex>();
};

// Locks the mutex. Releases the GIL while it has to wait.
class Lock {
 public:
  explicit Lock(ProcessMutex& mutex) : mutex_(mutex.get()) {
    if (mutex_.try_lock()) return;
    const py::gil_scoped_release release;
    mutex_.lock();
  }
  ~Lock() { mutex_.unlock(); }
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;

 private:
  std::mutex& mutex_;
};

// Has no lock: a separate tree is protected by the GIL, the tree of a ring by the ring's lock.
class CpuTree {
 public:
  // `memory`: leaves (int32) and inner (int64).
  CpuTree(int64_t capacity, const py::tuple& memory, const Device& device)
      : tree(capacity,
             reinterpret_cast<uint32_t*>(
                 device.output<int32_t>(memory[0], "leaves", TreeLayout(capacity).leaf_slots)),
             reinterpret_cast<uint64_t*>(
                 device.output<int64_t>(memory[1], "inner", TreeLayout(capacity).inner_slots))) {}

  static std::pair<int64_t, int64_t> slots(int64_t capacity) {
    const TreeLayout layout(capacity);
    return {layout.leaf_slots, layout.inner_slots};
  }

  int64_t capacity() const { return tree.capacity(); }

  void set(const Pairs& pairs, double alpha) {
    const int64_t n = pairs.indices.n;
    leaves_.resize(static_cast<size_t>(n));
    quantise_many(pairs.cpu_values, n, alpha, leaves_.data());
    tree.set(pairs.indices.data, leaves_.data(), n);
  }

  void get(const Indices& rows, double* out) const {
    for (int64_t i = 0; i < rows.n; ++i) {
      out[i] = tree.leaves()[rows.data[i]] / double{kUnitLeaf};
    }
  }

  void find(const Indices& targets, int64_t* out) const {
    const uint64_t* from = reinterpret_cast<const uint64_t*>(targets.data);
    for (int64_t i = 0; i < targets.n; ++i) {
      if (from[i] >= tree.total()) throw_target_out_of_range(targets.data[i], tree.total());
    }
    tree.find(from, targets.n, out);
  }

  void draw(uint64_t seed, bool stratified, int64_t n, int64_t* out) {
    if (tree.total() == 0) throw_nothing_to_draw();
    tree.draw(seed, calls_++, stratified, n, out);
  }

  void weights(const Indices& rows, double beta, float* out) const {
    for (int64_t i = 0; i < rows.n; ++i) {
      if (tree.leaves()[rows.data[i]] == 0) throw_no_weight(rows.data[i]);
    }
    tree.weights(rows.data, rows.n, beta, out);
  }

  uint64_t total() const { return tree.total(); }
  void rebuild() { tree.rebuild(); }
  void check() const {}  // errors are never deferred
  void check_valid() const {
    if (!tree.is_valid()) throw_damaged();
  }
  uint64_t calls() const { return calls_; }
  void set_calls(uint64_t calls) { calls_ = calls; }

  SumTree tree;

 private:
  uint64_t calls_ = 0;
  std::vector<uint32_t> leaves_;  // of one set()
};

class CpuRing {
 public:
  using Tree = CpuTree;

  // `memory`: frames or None (tiles), actions, rewards, flags, powers.
  CpuRing(const py::tuple& memory, CpuTree* tree, const Device&, const RingLayout& layout,
          int threads)
      : tree_(tree),
        ring_(layout,
              {memory[0].is_none() ? nullptr : view(memory[0], "frames").as<uint8_t>(),
               view(memory[1], "actions").as<int32_t>(), view(memory[2], "rewards").as<float>(),
               view(memory[3], "flags").as<uint8_t>()},
              view(memory[4], "powers").as<const float>(), tree == nullptr ? nullptr : &tree->tree,
              threads),
        actions_(static_cast<size_t>(layout.num_envs)),
        rewards_(static_cast<size_t>(layout.num_envs)) {}

  void add(const RowViews& row) {
    const Lock lock(mutex_);
    const int64_t n = ring_.layout().num_envs;
    read_actions(row.actions, n, actions_.data());
    read_rewards(row.rewards, n, rewards_.data());
    const int64_t stride = row.frames.strides[0] * size_of(row.frames.dtype);
    ring_.add(row.frames.as<const uint8_t>(), stride, actions_.data(), rewards_.data(),
              row.terminations.as<const uint8_t>(), row.episode_starts.as<const uint8_t>());
  }

  void sample(const SampleJob& job, double beta) {
    std::mutex& mutex = mutex_.get();
    // The order matters: the mutex is unlocked before this thread waits for the GIL.
    const py::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(mutex);
    if (job.draw) {
      draw(job);
    } else {
      for (int64_t i = 0; i < job.n; ++i) {
        if (!ring_.is_drawable(job.indices[i])) throw_not_drawable(job.indices[i]);
      }
    }
    if (tree_ != nullptr) ring_.mark_drawn(job.indices, job.n);
    if (!job.gather) return;
    if (tree_ != nullptr) {
      tree_->tree.weights(job.indices, job.n, beta, job.is_weights);
    } else {
      std::fill(job.is_weights, job.is_weights + job.n, 1.0f);
    }
    ring_.gather(job.indices, job.n, job.format, job.batch);
  }

  void make_resident(Indices&) const {}
  void copy_indices(const Indices& rows, int64_t* to, const py::object&) const {
    if (rows.n > 0) std::memmove(to, rows.data, static_cast<size_t>(rows.n) * 8);
  }
  void set_beta(double) const {}  // sample() has it as an argument

  void drawable(const Indices& rows, bool* out) {
    const Lock lock(mutex_);
    for (int64_t i = 0; i < rows.n; ++i) out[i] = ring_.is_drawable(rows.data[i]);
  }

  void update(const Pairs& pairs, double alpha, double epsilon, bool added) {
    const Lock lock(mutex_);
    const int64_t n = pairs.indices.n;
    priorities_.resize(static_cast<size_t>(n));
    leaves_.resize(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) {
      priorities_[static_cast<size_t>(i)] = std::abs(pairs.cpu_values[i]) + epsilon;
    }
    quantise_many(priorities_.data(), n, alpha, leaves_.data());
    ring_.update(pairs.indices.data, leaves_.data(), n, added);
  }

  // Called after the caller has filled the memory, including flag kDrawable.
  void restore(const RingState& state) {
    const Lock lock(mutex_);
    ring_.restore(state.stored, state.head, state.max_leaf, state.n_drawable);
    calls_ = state.calls;
    if (tree_ != nullptr) tree_->set_calls(state.calls);
  }

  // Of a ring that stores tiles.
  py::tuple tile_state() {
    const Lock lock(mutex_);
    return fastreplay::tile_state(*ring_.tiles());
  }

  // Replaces the frames by those of a state. ValueError if it is damaged; nothing changes then.
  void restore_tiles(int64_t added, const py::object& pixels, const py::list& sizes,
                     const py::list& chunks) {
    auto restored = restored_tiles(*ring_.tiles(), added, pixels, sizes, chunks);
    const Lock lock(mutex_);
    ring_.set_tiles(std::move(restored));
  }

  // Of a ring that stores tiles: rows added to each game, tiles, bytes in use.
  py::tuple tile_counts() {
    const Lock lock(mutex_);
    const TileStore& tiles = *ring_.tiles();
    return py::make_tuple(tiles.added(), tiles.dictionary().tiles(), tiles.bytes());
  }

  void check_tiles() {
    const Lock lock(mutex_);
    if (!ring_.tiles()->is_valid()) {
      throw std::runtime_error("the tiles are damaged: a count of references is wrong");
    }
  }

  void check() const {}  // errors are never deferred
  RingState state() {
    const Lock lock(mutex_);
    const uint64_t calls = tree_ != nullptr ? tree_->calls() : calls_;
    return {ring_.stored(), ring_.head(), ring_.n_drawable(), ring_.max_leaf(), calls};
  }
  int64_t stored() { return state().stored; }

 private:
  // Called with the lock held.
  void draw(const SampleJob& job) {
    if (ring_.n_drawable() == 0) throw_nothing_drawable();
    if (tree_ != nullptr) return tree_->draw(job.seed, job.stratified, job.n, job.indices);
    ring_.draw(job.seed, calls_++, job.n, job.indices);
  }

  ProcessMutex mutex_;  // protects everything below
  CpuTree* tree_;       // null: uniform draws
  FrameRing ring_;
  uint64_t calls_ = 0;  // the draws of a prioritized ring are counted by its tree
  // Scratch buffers. They keep their capacity, so that calls rarely allocate.
  std::vector<int32_t> actions_;
  std::vector<float> rewards_;
  std::vector<double> priorities_;
  std::vector<uint32_t> leaves_;
};

}  // namespace fastreplay
