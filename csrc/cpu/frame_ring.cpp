#include "cpu/frame_ring.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "core/philox.h"
#include "core/priority.h"
#include "cpu/thread_pool.h"

#ifdef __unix__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace fastreplay {
namespace {

constexpr int64_t kThreadedBytes = 1 << 18;  // batches smaller than this are not worth a wake-up

int64_t process() {
#ifdef __unix__
  return getpid();
#else
  return 0;
#endif
}

}  // namespace

// The threads, and the process that started them.
struct FrameRing::Crew {
  explicit Crew(int threads) : pid(process()), pool(threads) {}
  int64_t pid;
  ThreadPool pool;
};

FrameRing::FrameRing(const RingLayout& layout, const RingMemory& memory, std::vector<float> powers,
                     SumTree* tree, int threads)
    : layout_(layout),
      memory_(memory),
      powers_(std::move(powers)),
      tree_(tree),
      threads_(threads),
      max_leaf_(kUnitLeaf),
      blank_(static_cast<size_t>(layout.frame_bytes)) {
  const size_t most = static_cast<size_t>(layout.num_envs * (layout.n_step + layout.stack + 1));
  changed_.reserve(most);
  changed_leaves_.reserve(most);
}

FrameRing::~FrameRing() {
  if (crew_ != nullptr && crew_->pid != process()) {
    (void)crew_.release();  // its threads live in the parent: nothing here to join
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
  const int64_t slot = head_;
  const bool first = stored_ == 0, full = stored_ == layout_.rows;
  for (int64_t game = 0; game < layout_.num_envs; ++game) {
    const int64_t index = game * layout_.rows + slot;
    if (full && is_drawable(index)) {
      --n_drawable_;
      changed_.push_back(index);
      changed_leaves_.push_back(0);
    }
    std::memcpy(memory_.frames + index * layout_.frame_bytes, frames + game * frame_stride,
                static_cast<size_t>(layout_.frame_bytes));
    memory_.actions[index] = actions[game];
    memory_.rewards[index] = rewards[game];
    // Nothing is known before the first row, so it opens an episode.
    memory_.flags[index] = static_cast<uint8_t>((terminations[game] ? kTerminated : 0) |
                                                (first || episode_starts[game] ? kOpens : 0));
  }
  head_ = slot + 1 == layout_.rows ? 0 : slot + 1;
  if (!full) ++stored_;
  for (int64_t game = 0; game < layout_.num_envs; ++game) {
    const Ring now = ring(game);
    int64_t row = slot;  // rows whose window may have been completed by the new one
    for (int64_t back = 1; back <= layout_.n_step && back < stored_; ++back) {
      row = now.before(row);
      refresh(game, row);
    }
    if (!full) continue;
    row = now.oldest();  // rows whose stack may have lost its first frame
    for (int64_t kept = 0; kept < layout_.stack - 1 && kept < stored_; ++kept) {
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
    if (index < 0) {  // hardly any row is drawable: take the k-th of those that are
      const uint64_t bits = random64(seed, call, sample, kAttempts);
      uint64_t k = mulhi64(bits, static_cast<uint64_t>(n_drawable_));
      for (index = 0; !is_drawable(index) || k-- > 0;) ++index;
    }
    out[i] = index;
  }
}

void FrameRing::write_stack(int64_t game, int64_t slot, int depth, int frames,
                            const uint8_t* follows, const FrameOutput& format, uint8_t* out) const {
  const int64_t bytes = layout_.frame_bytes;
  const uint8_t* ring = memory_.frames + game * layout_.rows * bytes;
  const int blanks = frames - 1 - depth;  // before the opening frame
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
  convert(ring + row * bytes, run * bytes, follows, format.output, format.scale, out);
  if (run < depth + 1) {
    convert(ring, (depth + 1 - run) * bytes, follows, format.output, format.scale,
            out + run * out_bytes);
  }
}

void FrameRing::gather_one(int64_t index, int64_t next, const FrameOutput& format,
                           const BatchMemory& batch, int64_t sample) const {
  __builtin_prefetch(memory_.flags + next);
  __builtin_prefetch(memory_.actions + next);
  __builtin_prefetch(memory_.rewards + next);
  const int64_t oldest = std::max<int64_t>(next - layout_.stack + 1, 0);  // of next's stack, mostly
  const uint8_t* follows = memory_.frames + oldest * layout_.frame_bytes;

  const int64_t game = index / layout_.rows, slot = index % layout_.rows;
  const Ring ring = this->ring(game);
  const Window window = walk_window(ring, slot, layout_.n_step);
  float sum = 0.0f;
  for (int64_t k = 0, row = slot; k < window.steps; ++k, row = ring.after(row)) {
    sum += powers_[static_cast<size_t>(k)] * memory_.rewards[game * layout_.rows + row];
  }
  batch.actions[sample] = memory_.actions[index];
  batch.rewards[sample] = sum;
  batch.discounts[sample] = window.terminated ? 0.0f : powers_[static_cast<size_t>(window.steps)];

  const int depth = stack_depth(ring, slot, layout_.stack);
  uint8_t* obs = batch.obs + sample * batch.obs_stride;
  if (is_shared(batch, format)) {
    write_stack(game, window.end, depth + 1, layout_.stack + 1, follows, format, obs);
    return;
  }
  write_stack(game, slot, depth, layout_.stack, follows, format, obs);
  write_stack(game, window.end, stack_depth(ring, window.end, layout_.stack), layout_.stack,
              follows, format, batch.next_obs + sample * batch.next_obs_stride);
}

bool FrameRing::is_shared(const BatchMemory& batch, const FrameOutput& format) const {
  return layout_.n_step == 1 && !format.channels_last &&
         batch.obs_stride == batch.next_obs_stride &&
         batch.next_obs == batch.obs + layout_.frame_bytes * expansion(format.output);
}

void FrameRing::gather(const int64_t* indices, int64_t n, const FrameOutput& format,
                       const BatchMemory& batch) {
  const int frames = is_shared(batch, format) ? layout_.stack + 1 : 2 * layout_.stack;
  const int64_t bytes = n * frames * layout_.frame_bytes * expansion(format.output);
  const int threads = threads_ > 0 ? threads_ : openmp_threads();
  const bool alone = threads <= 1 || n < 2 || bytes < kThreadedBytes;
  const int64_t step = alone ? 1 : threads;  // to the next call that this thread will likely take
  const auto work = [&](int64_t i) {
    gather_one(indices[i], indices[i + step < n ? i + step : i], format, batch, i);
  };
  if (alone) {
    for (int64_t i = 0; i < n; ++i) work(i);
  } else if (threads_ > 0 || !run_on_openmp(n, work)) {
    if (crew_ == nullptr || crew_->pid != process()) {
      (void)crew_.release();  // null, or the parent's
      crew_ = std::make_unique<Crew>(threads);
    }
    crew_->pool.run(n, work);
  }
}

void FrameRing::update(const int64_t* indices, const uint32_t* leaves, int64_t n) {
  changed_.clear();
  changed_leaves_.clear();
  for (int64_t i = 0; i < n; ++i) {
    max_leaf_ = std::max(max_leaf_, leaves[i]);
    if (!is_drawable(indices[i])) continue;  // overwritten, or cut, since it was drawn
    changed_.push_back(indices[i]);
    changed_leaves_.push_back(leaves[i]);
  }
  tree_->set(changed_.data(), changed_leaves_.data(), static_cast<int64_t>(changed_.size()));
}

void FrameRing::restore(int64_t stored, int64_t head, uint32_t max_leaf) {
  stored_ = stored;
  head_ = head;
  max_leaf_ = max_leaf;
  n_drawable_ = mark_drawable(memory_.flags, layout_.num_envs, layout_.rows, stored, head,
                              layout_.stack, layout_.n_step);
  if (tree_ != nullptr) tree_->rebuild();
}

int64_t mark_drawable(uint8_t* flags, int64_t num_envs, int64_t rows, int64_t stored, int64_t head,
                      int stack, int n_step) {
  int64_t count = 0;
  for (int64_t game = 0; game < num_envs; ++game) {
    const Ring ring{flags + game * rows, rows, stored, head};
    for (int64_t slot = 0; slot < rows; ++slot) {
      uint8_t& flag = flags[game * rows + slot];
      const bool yes = slot < stored && drawable(ring, slot, stack, n_step);
      flag = static_cast<uint8_t>((flag & ~kDrawable) | (yes ? kDrawable : 0));
      count += yes;
    }
  }
  return count;
}

bool use_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / page * page;
  return begin < end && madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE) == 0;
#else
  (void)memory;
  (void)bytes;
  return false;
#endif
}

}  // namespace fastreplay
