// Stores one row for each game, in one launch of one block per game.
//
//   all threads     copy the frame to the slot at the write head, if frames are plain
//   warp 0          writes action, reward and flags of the row, then refreshes the rows whose
//                   window or stack may have changed (below)
//   last block      moves the write head (grid.cuh)
//
//   slots     | oldest ... | newest - n_step ... | newest |      a full ring, from oldest to newest
//               ^ stack - 1 rows                   ^ the new row
//                 their stack may  ^ n_step rows     never drawable yet
//                 have lost a        their window may
//                 frame              now be complete
//
// Maintains the invariants of frame_ring.h for kDrawable, n_drawable and the leaves.
//
// Cost: one copy of the frame, and one lane per refreshed row, each with O(n_step + stack) reads of
// flags.
#include "core/window.h"
#include "cuda/column.cuh"
#include "cuda/copy.cuh"
#include "cuda/device_ring.h"
#include "cuda/grid.cuh"
#include "cuda/leaf.cuh"
#include "cuda/reference.h"

namespace fastreplay {
namespace {

constexpr int kThreads = 256;

// The slot `steps` steps before `slot`.
__device__ int64_t earlier(int64_t slot, int64_t steps, int64_t rows) {
  return slot >= steps ? slot - steps : slot - steps + rows;
}

// Updates kDrawable, n_drawable and the leaf of the rows that a new row may have changed. `now` is
// the ring with the new row. Called by a whole warp, one lane per row.
__device__ void refresh(const DeviceRing& ring, const DeviceTree& tree, const Ring& now,
                        int64_t game, bool full, int lane) {
  const int64_t rows = ring.layout.rows, newest = now.newest(), before = now.stored - 1;
  const int n_step = ring.layout.n_step, stack = ring.layout.stack;
  const int completed = static_cast<int>(before < n_step ? before : n_step);
  const int cut = !full ? 0 : static_cast<int>(now.stored < stack - 1 ? now.stored : stack - 1);
  uint8_t* const flags = ring.memory.flags + game * rows;
  for (int first = 0; first < completed + cut; first += 32) {
    const int i = first + lane;
    // Steps from this lane's row to the newest.
    const int64_t back = i < completed ? i + 1 : before - (i - completed);
    bool has_changed = false, is_drawable = false;
    int64_t row = 0;
    // In a short ring the two groups overlap. Each row is refreshed once, the newest never.
    if (i < completed + cut && (i < completed || back > completed)) {
      row = earlier(newest, back, rows);
      is_drawable = drawable(now, row, stack, n_step);
      has_changed = is_drawable != static_cast<bool>(flags[row] & kDrawable);
    }
    __syncwarp();  // every lane has read the flags
    if (has_changed) {
      flags[row] ^= kDrawable;
      atomicAdd(reinterpret_cast<Word*>(&ring.counters->n_drawable),
                is_drawable ? Word{1} : ~Word{0});  // plus or minus 1
      if (tree.nodes != nullptr) {
        write_leaf(tree, game * rows + row, is_drawable ? ring.counters->max_leaf : 0);
      }
    }
    __syncwarp();
  }
}

// Copies n units of T. Called by a whole block. The memory does not overlap, so that a load need
// not wait for the stores before it.
template <typename T>
__device__ void copy_units(const uint8_t* from, uint8_t* to, int64_t n) {
  const T* __restrict__ const source = reinterpret_cast<const T*>(from);
  T* __restrict__ const target = reinterpret_cast<T*>(to);
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) target[i] = source[i];
}

__global__ void add_kernel(const __grid_constant__ DeviceRing ring,
                           const __grid_constant__ DeviceTree tree,
                           const __grid_constant__ Row row) {
  const int64_t game = blockIdx.x, rows = ring.layout.rows, bytes = ring.layout.frame_bytes;
  const int64_t slot = ring.counters->head, stored = ring.counters->stored;
  const bool full = stored == rows;
  const int64_t index = game * rows + slot;
  const int64_t new_head = slot + 1 == rows ? 0 : slot + 1, new_stored = full ? rows : stored + 1;
  const uint8_t* const from = row.frames + game * row.frame_stride;
  uint8_t* const to = ring.memory.frames + index * bytes;
  if (ring.memory.frames == nullptr) {
    // Patches have stored the frame.
  } else if (is_aligned(row.frames, row.frame_stride, 16) && bytes % 16 == 0) {
    copy_units<uint4>(from, to, bytes / 16);
  } else {
    copy_units<uint8_t>(from, to, bytes);
  }
  if (threadIdx.x < 32) {
    const int lane = static_cast<int>(threadIdx.x);
    if (lane == 0) {
      if (full && ring.memory.flags[index] & kDrawable) {
        atomicAdd(reinterpret_cast<Word*>(&ring.counters->n_drawable), ~Word{0});  // minus 1
        if (tree.nodes != nullptr) write_leaf(tree, index, 0);
      }
      const int64_t action = element_of<int64_t>(row.actions, game);
      if (action != static_cast<int32_t>(action)) report(ring.counters, kActionTooLarge, action);
      ring.memory.actions[index] = static_cast<int32_t>(action);
      ring.memory.rewards[index] = element_of<float>(row.rewards, game);
      // Nothing precedes the first row, so it always opens an episode.
      ring.memory.flags[index] =
          static_cast<uint8_t>((row.terminations[game] ? kTerminated : 0) |
                               (stored == 0 || row.episode_starts[game] ? kOpens : 0) |
                               (full && tree.nodes != nullptr ? kUndrawn : 0) |
                               (action < 0 ? kContext : 0));
    }
    __syncwarp();
    const Ring now{ring.memory.flags + game * rows, rows, new_stored, new_head};
    refresh(ring, tree, now, game, full, lane);
  }
  if (is_last_block(ring.counters) && threadIdx.x == 0) {
    ring.counters->head = new_head;
    ring.counters->stored = new_stored;
  }
}

}  // namespace

void launch_add(const DeviceRing& ring, const DeviceTree& tree, const Row& row,
                cudaStream_t stream) {
  if (uses_reference()) return reference::launch_add(ring, tree, row, stream);
  const int64_t copies = ring.memory.frames == nullptr ? 0 : ring.layout.frame_bytes / 16;
  const int threads = threads_for(copies, kThreads);
  launch(add_kernel, blocks_for(ring.layout.num_envs, 1), threads, stream, ring, tree, row);
}

}  // namespace fastreplay
