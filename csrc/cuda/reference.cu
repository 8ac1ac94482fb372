// The plain kernels (reference.h): one thread per sample, game, pair or element, no warp
// operations, no shared memory, no vector loads. What the tuned kernels do in one launch takes
// several here.
//
//   add       rows      one thread per game       action, reward, flags, and the rows they change
//             frames    one thread per byte, if frames are plain
//             head      one thread
//   sample    draw      one thread per sample     the row, or -1
//             columns   one thread per sample     action, return, discount
//             frames    one thread per element of obs and next_obs
//             weights   one thread per sample     finds the smallest leaf of the batch itself
//             end       one thread per sample     replaces -1 with 0; the first counts the call
//   set       set       one thread per pair       checks the batch and looks for later duplicates
//   draw      draw      one thread per sample, then `end` as above
//   find      find      one thread per target
//
// Cost: launches, dependent loads, and O(batch) work per thread in `weights` and `set`, which is
// O(batch^2) in total: meant for batches of up to a few thousand.
#include <atomic>
#include <stdexcept>

#include "core/philox.h"
#include "core/priority.h"
#include "core/window.h"
#include "cpu/convert.h"
#include "cuda/column.cuh"
#include "cuda/grid.cuh"
#include "cuda/leaf.cuh"
#include "cuda/reference.h"

namespace fastreplay {
namespace {

std::atomic<bool> g_uses_reference{false};

}  // namespace

bool uses_reference() { return g_uses_reference; }

std::string use_kernels(const std::string& name) {
  if (name != "tuned" && name != "reference") {
    throw std::invalid_argument("kernels must be 'tuned' or 'reference', not '" + name + "'");
  }
  return g_uses_reference.exchange(name == "reference") ? "reference" : "tuned";
}

namespace reference {
namespace {

constexpr int kThreads = 256;

__device__ int64_t thread_index() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }

// ------------------------------------------------------------------------------------------ tree

__device__ Word total_of(const DeviceTree& tree) {
  const Word* const root = tree.nodes + tree.offset[tree.levels - 1];
  Word total = 0;
  for (int child = 0; child < kDeviceFanOut; ++child) total += root[child];
  return total;
}

// The leaf that owns a target below the total; -1 if the tree is damaged.
__device__ int64_t find_row(const DeviceTree& tree, Word target) {
  int64_t node = 0;
  for (int level = tree.levels - 1; level >= 0; --level) {
    const Word* const entries = tree.nodes + tree.offset[level] + node * kDeviceFanOut;
    int child = 0;
    while (child < kDeviceFanOut && target >= entries[child]) target -= entries[child++];
    if (child == kDeviceFanOut) return -1;  // the entries do not add up to their parent
    node = node * kDeviceFanOut + child;
  }
  return node < tree.capacity ? node : -1;
}

// The row that a sample draws from a tree whose total is above 0.
__device__ int64_t draw_by_priority(const DeviceTree& tree, uint64_t seed, uint64_t call,
                                    bool stratified, int64_t sample, int64_t n) {
  uint64_t bits = random64(seed, call, static_cast<uint32_t>(sample), 0);
  if (stratified) bits = stratum64(bits, static_cast<uint32_t>(sample), static_cast<uint32_t>(n));
  return find_row(tree, mulhi64(bits, total_of(tree)));
}

__global__ void draw_tree_kernel(DeviceTree tree, const Counters* counters, uint64_t seed,
                                 bool stratified, int64_t n, int64_t* out) {
  const int64_t i = thread_index();
  if (i >= n) return;
  out[i] = -1;
  if (total_of(tree) > 0) out[i] = draw_by_priority(tree, seed, counters->calls, stratified, i, n);
}

// Ends a draw of n rows. -1 means that no row could be drawn.
__global__ void end_draw_kernel(DeviceTree tree, Counters* counters, int64_t n, int64_t* rows) {
  const int64_t i = thread_index();
  const bool has_rows = tree.nodes != nullptr ? total_of(tree) > 0 : counters->n_drawable > 0;
  if (i < n && rows[i] < 0) {
    if (has_rows) report(counters, kDamaged, i);
    rows[i] = 0;
  }
  if (i > 0) return;
  if (has_rows) {
    ++counters->calls;
  } else {
    report(counters, kNothingToDraw, 0);
  }
}

__global__ void find_kernel(DeviceTree tree, Counters* counters, const int64_t* targets, int64_t n,
                            int64_t* out) {
  const int64_t i = thread_index();
  if (i >= n) return;
  const bool in_range = static_cast<Word>(targets[i]) < total_of(tree);
  const int64_t row = in_range ? find_row(tree, static_cast<Word>(targets[i])) : -1;
  if (row < 0) report(counters, in_range ? kDamaged : kTargetOutOfRange, targets[i]);
  out[i] = row < 0 ? 0 : row;
}

__device__ double value_of(const Priorities& p, int64_t i) {
  return p.doubles ? static_cast<const double*>(p.values)[i]
                   : static_cast<double>(static_cast<const float*>(p.values)[i]);
}

__device__ uint32_t errors_of(const Priorities& p, int64_t capacity, int64_t i) {
  const double value = value_of(p, i);
  uint32_t errors = 0;
  if (p.indices[i] < 0 || p.indices[i] >= capacity) errors |= kIndexOutOfRange;
  if (value - value != 0.0) errors |= kNotFinite;  // NaN for infinity and NaN
  if (!p.errors && value < 0.0) errors |= kNegative;
  return errors;
}

__global__ void set_kernel(DeviceTree tree, Counters* counters, Priorities p) {
  const int64_t i = thread_index();
  if (i >= p.n) return;
  bool is_bad = false;
  for (int64_t j = 0; j < p.n; ++j) {
    const uint32_t errors = errors_of(p, tree.capacity, j);
    if (errors != 0 && i == 0) report(counters, errors, p.indices[j]);
    is_bad |= errors != 0;
  }
  if (is_bad) return;

  double value = value_of(p, i);
  if (p.errors) value = (value < 0.0 ? -value : value) + p.epsilon;
  const uint32_t leaf = quantise(value, p.alpha);
  if (p.errors) atomicMax(&counters->max_leaf, leaf);
  if (p.errors && !takes_priority(p.flags[p.indices[i]], p.added)) return;
  for (int64_t j = i + 1; j < p.n; ++j) {
    if (p.indices[j] == p.indices[i]) return;  // the last pair for a row writes it
  }
  write_leaf(tree, p.indices[i], leaf);
}

// ------------------------------------------------------------------------------------------- add

__global__ void add_frames_kernel(DeviceRing ring, Row row) {
  const int64_t i = thread_index(), bytes = ring.layout.frame_bytes;
  if (i >= ring.layout.num_envs * bytes) return;
  const int64_t game = i / bytes, byte = i % bytes;
  const int64_t index = game * ring.layout.rows + ring.counters->head;
  ring.memory.frames[index * bytes + byte] = row.frames[game * row.frame_stride + byte];
}

// Updates kDrawable, n_drawable and the leaf of a row.
__device__ void refresh_row(const DeviceRing& ring, const DeviceTree& tree, const Ring& now,
                            int64_t game, int64_t slot) {
  const int64_t index = game * ring.layout.rows + slot;
  const bool is_drawable = drawable(now, slot, ring.layout.stack, ring.layout.n_step);
  if (is_drawable == static_cast<bool>(ring.memory.flags[index] & kDrawable)) return;
  ring.memory.flags[index] ^= kDrawable;
  const Word one = is_drawable ? Word{1} : ~Word{0};  // plus or minus 1
  atomicAdd(reinterpret_cast<Word*>(&ring.counters->n_drawable), one);
  if (tree.nodes != nullptr) write_leaf(tree, index, is_drawable ? ring.counters->max_leaf : 0);
}

__global__ void add_rows_kernel(DeviceRing ring, DeviceTree tree, Row row) {
  const int64_t game = thread_index(), rows = ring.layout.rows;
  if (game >= ring.layout.num_envs) return;
  const int64_t slot = ring.counters->head, stored = ring.counters->stored;
  const int64_t index = game * rows + slot;
  const bool full = stored == rows;
  uint8_t* const flags = ring.memory.flags + game * rows;
  if (full && (flags[slot] & kDrawable)) {
    atomicAdd(reinterpret_cast<Word*>(&ring.counters->n_drawable), ~Word{0});  // minus 1
    if (tree.nodes != nullptr) write_leaf(tree, index, 0);
  }
  const int64_t action = element_of<int64_t>(row.actions, game);
  if (action != static_cast<int32_t>(action)) report(ring.counters, kActionTooLarge, action);
  ring.memory.actions[index] = static_cast<int32_t>(action);
  ring.memory.rewards[index] = element_of<float>(row.rewards, game);
  flags[slot] = 0;
  if (row.terminations[game]) flags[slot] |= kTerminated;
  if (row.episode_starts[game] || stored == 0) flags[slot] |= kOpens;
  if (full && tree.nodes != nullptr) flags[slot] |= kUndrawn;
  if (action < 0) flags[slot] |= kContext;

  const Ring now{flags, rows, full ? rows : stored + 1, slot + 1 == rows ? 0 : slot + 1};
  int64_t earlier = slot;  // rows whose window the new row may have completed
  for (int64_t back = 1; back <= ring.layout.n_step && back < now.stored; ++back) {
    earlier = now.before(earlier);
    refresh_row(ring, tree, now, game, earlier);
  }
  if (!full) return;
  int64_t oldest = now.oldest();  // rows whose stack may have lost a frame
  for (int64_t i = 0; i < ring.layout.stack - 1 && i < rows; ++i) {
    refresh_row(ring, tree, now, game, oldest);
    oldest = now.after(oldest);
  }
}

__global__ void move_head_kernel(DeviceRing ring) {
  Counters* const counters = ring.counters;
  counters->head = counters->head + 1 == ring.layout.rows ? 0 : counters->head + 1;
  if (counters->stored < ring.layout.rows) ++counters->stored;
}

// ---------------------------------------------------------------------------------------- sample

__device__ bool is_drawable(const DeviceRing& ring, int64_t index) {
  return index >= 0 && index < ring.layout.num_envs * ring.layout.rows &&
         (ring.memory.flags[index] & kDrawable);
}

__device__ Ring ring_of(const DeviceRing& ring, int64_t index) {
  const int64_t rows = ring.layout.rows;
  return {ring.memory.flags + index / rows * rows, rows, ring.counters->stored,
          ring.counters->head};
}

// The row that a sample draws uniformly from the drawable rows; n_drawable must be above 0. -1 if
// fewer than n_drawable rows are drawable.
__device__ int64_t draw_uniform(const DeviceRing& ring, uint64_t seed, int64_t sample) {
  const uint64_t call = ring.counters->calls;
  const int64_t stored = ring.counters->stored, rows = ring.layout.rows;
  const uint64_t stored_rows = static_cast<uint64_t>(ring.layout.num_envs * stored);
  for (uint32_t attempt = 0; attempt < kAttempts; ++attempt) {
    const uint64_t bits = random64(seed, call, static_cast<uint32_t>(sample), attempt);
    const int64_t row = static_cast<int64_t>(mulhi64(bits, stored_rows));
    const int64_t index = row / stored * rows + row % stored;
    if (is_drawable(ring, index)) return index;
  }
  // Few rows are drawable: choose the k-th of them.
  const uint64_t bits = random64(seed, call, static_cast<uint32_t>(sample), kAttempts);
  uint64_t k = mulhi64(bits, static_cast<uint64_t>(ring.counters->n_drawable));
  for (int64_t index = 0; index < ring.layout.num_envs * rows; ++index) {
    if (is_drawable(ring, index) && k-- == 0) return index;
  }
  return -1;
}

// All of the threads that draw a row write the same byte.
__device__ void mark_drawn(const DeviceRing& ring, int64_t index) {
  uint8_t& flags = ring.memory.flags[index];
  flags = static_cast<uint8_t>(flags & ~kUndrawn);
}

__global__ void draw_kernel(DeviceRing ring, DeviceTree tree, SampleJob job) {
  const int64_t i = thread_index();
  if (i >= job.n) return;
  job.indices[i] = -1;
  if (tree.nodes != nullptr) {
    if (total_of(tree) == 0) return;
    job.indices[i] =
        draw_by_priority(tree, job.seed, ring.counters->calls, job.stratified, i, job.n);
    if (job.indices[i] >= 0) mark_drawn(ring, job.indices[i]);
  } else if (ring.counters->n_drawable > 0) {
    job.indices[i] = draw_uniform(ring, job.seed, i);
  }
}

__global__ void columns_kernel(DeviceRing ring, SampleJob job) {
  const int64_t i = thread_index();
  if (i >= job.n) return;
  const int64_t index = job.indices[i];
  job.batch.actions[i] = 0;
  job.batch.rewards[i] = 0.0f;
  job.batch.discounts[i] = 0.0f;
  if (!is_drawable(ring, index)) {
    if (job.draw) return;  // reported by end_draw_kernel
    const bool in_range = index >= 0 && index < ring.layout.num_envs * ring.layout.rows;
    report(ring.counters, in_range ? kNotDrawable : kIndexOutOfRange, index);
    return;
  }
  mark_drawn(ring, index);
  const Ring now = ring_of(ring, index);
  const int64_t slot = index % now.rows;
  const Window window = walk_window(now, slot, ring.layout.n_step);
  float sum = 0.0f;
  int64_t row = slot;
  for (int k = 0; k < window.steps; ++k) {
    sum += ring.powers[k] * ring.memory.rewards[index - slot + row];
    row = now.after(row);
  }
  job.batch.actions[i] = ring.memory.actions[index];
  job.batch.rewards[i] = sum;
  if (!window.terminated) job.batch.discounts[i] = ring.powers[window.steps];
}

__device__ void write_element(uint8_t byte, const FrameOutput& format, uint8_t* out, int64_t at) {
  const float scaled = static_cast<float>(byte) * format.scale;
  switch (format.output) {
    case Output::kCopy:
      out[at] = byte;
      break;
    case Output::kFloat16:
      reinterpret_cast<uint16_t*>(out)[at] = float16_bits(scaled);
      break;
    case Output::kBfloat16:
      reinterpret_cast<uint16_t*>(out)[at] = bfloat16_bits(scaled);
      break;
    case Output::kFloat32:
      reinterpret_cast<float*>(out)[at] = scaled;
      break;
  }
}

// A byte of a stored row of a game whose frames are in tiles.
__device__ uint8_t byte_of_tiles(const DeviceRing& ring, int64_t game, int64_t slot,
                                 int64_t pixel) {
  const DeviceTiles& tiles = ring.tiles;
  const ChunkLayout& layout = tiles.layout;
  int64_t row = *tiles.added - ring.counters->head + slot;
  if (slot >= ring.counters->head) row -= ring.layout.rows;
  const int64_t place = row + game * kChunkFrames / ring.layout.num_envs;
  const int64_t frame = place % kChunkFrames;
  const DeviceChunk& chunk =
      tiles.chunks[game * tiles.n_chunks + place / kChunkFrames % tiles.n_chunks];
  if (chunk.raw) return chunk.data[(frame - chunk.first) * ring.layout.frame_bytes + pixel];

  const int64_t y = pixel / tiles.width, x = pixel % tiles.width;
  const int64_t tile_y = y / tiles.tile_rows, tile_x = x / tiles.columns;
  const int64_t position = tile_y * tiles.across + tile_x;
  uint32_t id = layout.key_at(chunk.data, position);
  const uint8_t* change = chunk.data + layout.changes;
  for (int f = 0; f <= frame; ++f) {
    for (int64_t i = layout.changed(chunk.data, f); i > 0; --i, change += layout.change_bytes) {
      if (layout.position_at(change) == position) id = ChunkLayout::id_at(change);
    }
  }
  // The last tiles of a row or a column overlap their neighbours.
  int64_t top = tile_y * tiles.tile_rows, left = tile_x * tiles.columns;
  if (top > tiles.height - tiles.tile_rows) top = tiles.height - tiles.tile_rows;
  if (left > tiles.width - tiles.columns) left = tiles.width - tiles.columns;
  return tiles.segments[id >> 16][(id & 0xFFFF) * kTileSlot + (y - top) * tiles.columns + x - left];
}

// One thread per element of obs and of next_obs. Where the two share frames, two threads write the
// same value.
__global__ void frames_kernel(DeviceRing ring, SampleJob job) {
  const int64_t bytes = ring.layout.frame_bytes, stack = ring.layout.stack;
  const int64_t elements = stack * bytes;  // of a sample's obs
  const int64_t sample = thread_index() / (2 * elements);
  if (sample >= job.n) return;
  const int64_t at = thread_index() % elements;
  const bool is_next = thread_index() / elements % 2 == 1;
  const int64_t frame = job.format.channels_last ? at % stack : at / bytes;
  const int64_t pixel = job.format.channels_last ? at / stack : at % bytes;

  uint8_t byte = 0;  // of frames before the episode, and of samples that cannot be built
  const int64_t index = job.indices[sample];
  if (is_drawable(ring, index)) {
    const Ring now = ring_of(ring, index);
    int64_t slot = index % now.rows;
    const int64_t game = index - slot;
    if (is_next) slot = walk_window(now, slot, ring.layout.n_step).end;
    const int64_t back = stack - 1 - frame;  // steps before the newest frame
    if (back <= stack_depth(now, slot, ring.layout.stack)) {
      for (int64_t step = 0; step < back; ++step) slot = now.before(slot);
      byte = ring.memory.frames == nullptr
                 ? byte_of_tiles(ring, game / ring.layout.rows, slot, pixel)
                 : ring.memory.frames[(game + slot) * bytes + pixel];
    }
  }
  if (is_next) {
    write_element(byte, job.format, job.batch.next_obs + sample * job.batch.next_obs_stride, at);
  } else {
    write_element(byte, job.format, job.batch.obs + sample * job.batch.obs_stride, at);
  }
}

// The leaf of a row; 0 if there is no such row.
__device__ uint32_t leaf_of(const DeviceTree& tree, int64_t index) {
  if (index < 0 || index >= tree.capacity) return 0;
  return static_cast<uint32_t>(tree.nodes[index]);
}

__global__ void weights_kernel(DeviceRing ring, DeviceTree tree, SampleJob job) {
  const int64_t i = thread_index();
  if (i >= job.n) return;
  if (tree.nodes == nullptr) {
    job.is_weights[i] = is_drawable(ring, job.indices[i]) ? 1.0f : 0.0f;
    return;
  }
  uint32_t smallest = UINT32_MAX;
  for (int64_t j = 0; j < job.n; ++j) {
    const uint32_t leaf = leaf_of(tree, job.indices[j]);
    if (leaf > 0 && leaf < smallest) smallest = leaf;
  }
  const uint32_t leaf = leaf_of(tree, job.indices[i]);
  job.is_weights[i] = leaf > 0 ? importance_weight(smallest, leaf, ring.counters->beta) : 0.0f;
}

// One thread for each of n items.
template <typename... Parameters, typename... Arguments>
void launch_over(int64_t n, void (*kernel)(Parameters...), cudaStream_t stream,
                 const Arguments&... arguments) {
  launch(kernel, blocks_for(n, kThreads), kThreads, stream, arguments...);
}

}  // namespace

void launch_add(const DeviceRing& ring, const DeviceTree& tree, const Row& row,
                cudaStream_t stream) {
  const RingLayout& layout = ring.layout;
  if (ring.memory.frames != nullptr) {
    launch_over(layout.num_envs * layout.frame_bytes, add_frames_kernel, stream, ring, row);
  }
  launch_over(layout.num_envs, add_rows_kernel, stream, ring, tree, row);
  launch(move_head_kernel, 1, 1, stream, ring);
}

void launch_sample(const DeviceRing& ring, const DeviceTree& tree, const SampleJob& job,
                   cudaStream_t stream) {
  if (job.draw) launch_over(job.n, draw_kernel, stream, ring, tree, job);
  if (job.gather) {
    const int64_t elements = 2 * ring.layout.stack * ring.layout.frame_bytes;
    launch_over(job.n, columns_kernel, stream, ring, job);
    launch_over(job.n * elements, frames_kernel, stream, ring, job);
    launch_over(job.n, weights_kernel, stream, ring, tree, job);
  }
  if (job.draw)
    launch_over(job.n, end_draw_kernel, stream, tree, ring.counters, job.n, job.indices);
}

void launch_set(const DeviceTree& tree, Counters* counters, const Priorities& priorities,
                cudaStream_t stream) {
  launch_over(priorities.n, set_kernel, stream, tree, counters, priorities);
}

void launch_draw(const DeviceTree& tree, Counters* counters, uint64_t seed, bool stratified,
                 int64_t n, int64_t* out, cudaStream_t stream) {
  launch_over(n, draw_tree_kernel, stream, tree, counters, seed, stratified, n, out);
  launch_over(n, end_draw_kernel, stream, tree, counters, n, out);
}

void launch_find(const DeviceTree& tree, Counters* counters, const int64_t* targets, int64_t n,
                 int64_t* out, cudaStream_t stream) {
  launch_over(n, find_kernel, stream, tree, counters, targets, n, out);
}

}  // namespace reference
}  // namespace fastreplay
