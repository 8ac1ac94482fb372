#include "cpu/frame_ring.h"

#include <algorithm>
#include <cstring>
#include <functional>

#include "core/philox.h"
#include "core/priority.h"
#include "cpu/convert.h"
#include "cpu/thread_pool.h"

#ifdef __unix__
#include <unistd.h>
#endif

namespace fastreplay {
namespace {

constexpr int64_t kThreadedBytes = 1 << 18;  // smaller batches are copied by the caller alone

int64_t process_id() {
#ifdef __unix__
  return getpid();
#else
  return 0;
#endif
}

}  // namespace

// A pool of threads, and the process that started it.
struct FrameRing::Threads {
  explicit Threads(int threads) : pid(process_id()), pool(threads) {}
  int64_t pid;
  ThreadPool pool;
};

FrameRing::FrameRing(const RingLayout& layout, const RingMemory& memory, const float* powers,
                     SumTree* tree, int threads)
    : layout_(layout),
      memory_(memory),
      tiles_(memory.frames != nullptr
                 ? nullptr
                 : std::make_unique<TileStore>(layout.rows, layout.num_envs,
                                               TileShape(layout.frame_bytes, layout.frame_width))),
      powers_(powers),
      tree_(tree),
      threads_(threads),
      max_leaf_(kUnitLeaf),
      blank_(static_cast<size_t>(layout.frame_bytes)) {
  const size_t capacity = static_cast<size_t>(layout.num_envs * (layout.n_step + layout.stack + 1));
  changed_.reserve(capacity);
  changed_leaves_.reserve(capacity);
}

FrameRing::~FrameRing() {
  if (own_threads_ != nullptr && own_threads_->pid != process_id()) {
    (void)own_threads_.release();  // the threads exist only in the parent: nothing to join here
  }
}

void FrameRing::refresh(int64_t game, int64_t slot) {
  const int64_t index = game * layout_.rows + slot;
  const bool now = drawable(ring(game), slot, layout_.stack, layout_.n_step);
  if (now == is_drawable(index)) return;
  memory_.flags[index] ^= kDrawable;
  n_drawable_ += now ? 1 : -1;
  changed_.push_back(index);
  changed_leaves_.push_back(now ? max_leaf_ : 0);
}

void FrameRing::add(const uint8_t* frames, int64_t frame_stride, const int32_t* actions,
                    const float* rewards, const uint8_t* terminations,
                    const uint8_t* episode_starts) {
  changed_.clear();
  changed_leaves_.clear();
  if (tiles_ != nullptr) tiles_->add(frames, frame_stride);
  const int64_t slot = head_;
  const bool first = stored_ == 0, full = stored_ == layout_.rows;
  for (int64_t game = 0; game < layout_.num_envs; ++game) {
    const int64_t index = game * layout_.rows + slot;
    if (full && is_drawable(index)) {
      --n_drawable_;
      changed_.push_back(index);
      changed_leaves_.push_back(0);
    }
    if (tiles_ == nullptr) {
      std::memcpy(memory_.frames + index * layout_.frame_bytes, frames + game * frame_stride,
                  static_cast<size_t>(layout_.frame_bytes));
    }
    memory_.actions[index] = actions[game];
    memory_.rewards[index] = rewards[game];
    // Nothing precedes the first row, so it always opens an episode.
    memory_.flags[index] = static_cast<uint8_t>((terminations[game] ? kTerminated : 0) |
                                                (first || episode_starts[game] ? kOpens : 0) |
                                                (full && tree_ != nullptr ? kUndrawn : 0) |
                                                (actions[game] < 0 ? kContext : 0));
  }
  head_ = slot + 1 == layout_.rows ? 0 : slot + 1;
  if (!full) ++stored_;
  for (int64_t game = 0; game < layout_.num_envs; ++game) {
    const Ring now = ring(game);
    int64_t row = slot;  // rows whose window the new row may have completed
    for (int64_t back = 1; back <= layout_.n_step && back < stored_; ++back) {
      row = now.before(row);
      refresh(game, row);
    }
    if (!full) continue;
    row = now.oldest();  // rows whose stack may have lost a frame
    for (int64_t i = 0; i < layout_.stack - 1 && i < stored_; ++i) {
      refresh(game, row);
      row = now.after(row);
    }
  }
  if (tree_ != nullptr) {
    tree_->set(changed_.data(), changed_leaves_.data(), static_cast<int64_t>(changed_.size()));
  }
}

void FrameRing::draw(uint64_t seed, uint64_t call, int64_t n, int64_t* out) const {
  const uint64_t all = static_cast<uint64_t>(layout_.num_envs * stored_);
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t sample = static_cast<uint32_t>(i);
    int64_t index = -1;
    for (uint32_t attempt = 0; attempt < kAttempts && index < 0; ++attempt) {
      const uint64_t row = mulhi64(random64(seed, call, sample, attempt), all);
      const int64_t game = static_cast<int64_t>(row) / stored_;
      const int64_t candidate = game * layout_.rows + static_cast<int64_t>(row) % stored_;
      if (is_drawable(candidate)) index = candidate;
    }
    if (index < 0) {  // few rows are drawable: take the k-th of them
      const uint64_t bits = random64(seed, call, sample, kAttempts);
      uint64_t k = mulhi64(bits, static_cast<uint64_t>(n_drawable_));
      for (index = 0; !is_drawable(index) || k-- > 0;) ++index;
    }
    out[i] = index;
  }
}

void FrameRing::write_stack(int64_t game, int64_t slot, int depth, int frames, const uint8_t* next,
                            const FrameOutput& format, uint8_t* out) const {
  if (tiles_ != nullptr) return write_stack_of_tiles(game, slot, depth, frames, format, out);
  const int64_t bytes = layout_.frame_bytes;
  const uint8_t* ring = memory_.frames + game * layout_.rows * bytes;
  const int blanks = frames - 1 - depth;  // frames of zeros before the opening frame
  int64_t row = slot - depth < 0 ? slot - depth + layout_.rows : slot - depth;
  if (format.channels_last) {
    const uint8_t* sources[8];
    for (int s = 0; s < frames; ++s) {
      sources[s] = blank_.data();
      if (s < blanks) continue;
      sources[s] = ring + row * bytes;
      row = row + 1 == layout_.rows ? 0 : row + 1;
    }
    interleave(sources, frames, bytes, format.output, format.scale, out);
    return;
  }
  const int64_t out_bytes = bytes * expansion(format.output);
  for (int s = 0; s < blanks; ++s, out += out_bytes) {
    convert(blank_.data(), bytes, blank_.data(), format.output, format.scale, out);
  }
  const int64_t run = std::min<int64_t>(depth + 1, layout_.rows - row);  // up to the wrap-around
  convert(ring + row * bytes, run * bytes, next, format.output, format.scale, out);
  if (run < depth + 1) {
    convert(ring, (depth + 1 - run) * bytes, next, format.output, format.scale,
            out + run * out_bytes);
  }
}

void FrameRing::write_frames(const uint8_t* from, int depth, int frames, const FrameOutput& format,
                             uint8_t* out) const {
  const int64_t bytes = layout_.frame_bytes;
  const int blanks = frames - 1 - depth;
  if (format.channels_last) {
    const uint8_t* sources[8];
    for (int s = 0; s < frames; ++s) {
      sources[s] = s < blanks ? blank_.data() : from + (s - blanks) * bytes;
    }
    interleave(sources, frames, bytes, format.output, format.scale, out);
    return;
  }
  const int64_t out_bytes = bytes * expansion(format.output);
  for (int s = 0; s < blanks; ++s, out += out_bytes) {
    convert(blank_.data(), bytes, blank_.data(), format.output, format.scale, out);
  }
  convert(from, (depth + 1) * bytes, from, format.output, format.scale, out);
}

const uint8_t* FrameRing::read_tiles(int64_t game, int64_t slot, int n) const {
  static thread_local std::vector<uint8_t> of_thread;
  const size_t bytes = static_cast<size_t>(n * layout_.frame_bytes);
  if (of_thread.size() < bytes) of_thread.resize(bytes);
  tiles_->read(game, slot < 0 ? slot + layout_.rows : slot, n, of_thread.data());
  return of_thread.data();
}

void FrameRing::write_stack_of_tiles(int64_t game, int64_t slot, int depth, int frames,
                                     const FrameOutput& format, uint8_t* out) const {
  if (format.output != Output::kCopy || format.channels_last) {
    return write_frames(read_tiles(game, slot - depth, depth + 1), depth, frames, format, out);
  }
  const int64_t blanks = (frames - 1 - depth) * layout_.frame_bytes, first = slot - depth;
  std::memset(out, 0, static_cast<size_t>(blanks));
  tiles_->read(game, first < 0 ? first + layout_.rows : first, depth + 1, out + blanks);
}

void FrameRing::gather_one(int64_t index, int64_t next, int64_t after_next,
                           const FrameOutput& format, const BatchMemory& batch,
                           int64_t sample) const {
  __builtin_prefetch(memory_.flags + next);
  __builtin_prefetch(memory_.actions + next);
  __builtin_prefetch(memory_.rewards + next);
  // The stack of `next` usually begins at this row.
  const int64_t oldest = std::max<int64_t>(next - layout_.stack + 1, 0);
  const uint8_t* next_frames = memory_.frames + oldest * layout_.frame_bytes;
  if (tiles_ != nullptr) {
    tiles_->prefetch(after_next / layout_.rows, after_next % layout_.rows);
    tiles_->prefetch_rest(next / layout_.rows, next % layout_.rows);
  }

  const int64_t game = index / layout_.rows, slot = index % layout_.rows;
  const Ring ring = this->ring(game);
  const Window window = walk_window(ring, slot, layout_.n_step);
  float sum = 0.0f;
  for (int64_t k = 0, row = slot; k < window.steps; ++k, row = ring.after(row)) {
    sum += powers_[k] * memory_.rewards[game * layout_.rows + row];
  }
  batch.actions[sample] = memory_.actions[index];
  batch.rewards[sample] = sum;
  batch.discounts[sample] = window.terminated ? 0.0f : powers_[window.steps];

  const int depth = stack_depth(ring, slot, layout_.stack);
  uint8_t* obs = batch.obs + sample * batch.obs_stride;
  if (shares_block(layout_, format, batch)) {
    write_stack(game, window.end, depth + 1, layout_.stack + 1, next_frames, format, obs);
    return;
  }
  uint8_t* const next_obs = batch.next_obs + sample * batch.next_obs_stride;
  const int stack = layout_.stack, end_depth = stack_depth(ring, window.end, stack);
  const int64_t apart = window.end - slot + (window.end < slot ? layout_.rows : 0);
  if (tiles_ != nullptr && apart <= stack) {  // the two stacks overlap: their tiles are read once
    const uint8_t* const frames = read_tiles(game, slot - depth, depth + 1 + int(apart));
    write_frames(frames, depth, stack, format, obs);
    const int64_t skipped = depth + apart - end_depth;
    write_frames(frames + skipped * layout_.frame_bytes, end_depth, stack, format, next_obs);
    return;
  }
  write_stack(game, slot, depth, stack, next_frames, format, obs);
  write_stack(game, window.end, end_depth, stack, next_frames, format, next_obs);
}

void FrameRing::gather(const int64_t* indices, int64_t n, const FrameOutput& format,
                       const BatchMemory& batch) {
  const int frames = shares_block(layout_, format, batch) ? layout_.stack + 1 : 2 * layout_.stack;
  const int64_t bytes = n * frames * layout_.frame_bytes * expansion(format.output);
  const int threads = threads_ > 0 ? threads_ : openmp_threads();
  const bool alone = threads <= 1 || n < 2 || bytes < kThreadedBytes;
  const int64_t step = alone ? 1 : threads;  // to the probable next sample of this thread
  const auto index = [&](int64_t i) { return indices[std::min(i, n - 1)]; };
  const auto work = [&](int64_t i) {
    gather_one(indices[i], index(i + step), index(i + 2 * step), format, batch, i);
  };
  if (alone) {
    for (int64_t i = 0; i < n; ++i) work(i);
    return;
  }
  const std::function<void(int64_t)> shared = std::cref(work);  // a reference: no allocation
  if (threads_ > 0 || !run_on_openmp(n, shared)) {
    if (own_threads_ == nullptr || own_threads_->pid != process_id()) {
      (void)own_threads_.release();  // null, or the parent's: cannot be joined
      own_threads_ = std::make_unique<Threads>(threads);
    }
    own_threads_->pool.run(n, shared);
  }
}

void FrameRing::mark_drawn(const int64_t* indices, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint8_t& flags = memory_.flags[indices[i]];
    if (flags & kUndrawn) flags ^= kUndrawn;  // few rows have it: most cache lines stay clean
  }
}

void FrameRing::update(const int64_t* indices, const uint32_t* leaves, int64_t n, bool added) {
  changed_.clear();
  changed_leaves_.clear();
  for (int64_t i = 0; i < n; ++i) {
    max_leaf_ = std::max(max_leaf_, leaves[i]);
    if (!takes_priority(memory_.flags[indices[i]], added)) continue;
    changed_.push_back(indices[i]);
    changed_leaves_.push_back(leaves[i]);
  }
  tree_->set(changed_.data(), changed_leaves_.data(), static_cast<int64_t>(changed_.size()));
}

void FrameRing::restore(int64_t stored, int64_t head, uint32_t max_leaf, int64_t n_drawable) {
  stored_ = stored;
  head_ = head;
  max_leaf_ = max_leaf;
  n_drawable_ = n_drawable;
  if (tree_ != nullptr) tree_->rebuild();
}

int64_t mark_drawable(uint8_t* flags, int64_t num_envs, int64_t rows, int64_t stored, int64_t head,
                      int stack, int n_step) {
  int64_t count = 0;
  for (int64_t game = 0; game < num_envs; ++game) {
    const Ring ring{flags + game * rows, rows, stored, head};
    for (int64_t slot = 0; slot < rows; ++slot) {
      uint8_t& flag = flags[game * rows + slot];
      const bool is_drawable = slot < stored && drawable(ring, slot, stack, n_step);
      flag = static_cast<uint8_t>((flag & ~kDrawable) | (is_drawable ? kDrawable : 0));
      count += is_drawable;
    }
  }
  return count;
}

}  // namespace fastreplay
