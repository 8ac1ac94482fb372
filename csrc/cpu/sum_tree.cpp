#include "cpu/sum_tree.h"

#include <algorithm>
#include <cstring>

#include "core/philox.h"
#include "core/priority.h"
#include "cpu/instructions.h"

namespace fastreplay {
namespace {

constexpr int kBlock = 64;  // descents that advance together: their nodes fit the L1 cache

struct Kernels {
  void (*find_block)(const TreeLayout&, const uint64_t* inner, const uint32_t* leaves,
                     uint64_t* targets, int n, int64_t* out);
  uint64_t (*set_block)(const TreeLayout&, uint64_t* inner, uint32_t* leaves,
                        const int64_t* indices, const uint32_t* values, int n);
  void (*random_block)(uint64_t seed, uint64_t call, uint32_t first, int n, uint64_t* out);
  void (*quantise_block)(const double* priorities, int n, double alpha, uint32_t* out);
  void (*weight_block)(const uint32_t* values, int n, uint32_t smallest, double beta, float* out);
};

namespace plain {
#define FR_TARGET
#define FR_WIDTH 1
#include "cpu/sum_tree_kernels.inl"
#undef FR_TARGET
#undef FR_WIDTH
}  // namespace plain

#ifdef FR_X86
namespace avx2 {
#define FR_TARGET FR_TARGET_AVX2
#define FR_WIDTH 4
#include "cpu/sum_tree_kernels.inl"
#undef FR_TARGET
#undef FR_WIDTH
}  // namespace avx2

namespace avx512 {
#define FR_TARGET FR_TARGET_AVX512
#define FR_WIDTH 8
#include "cpu/sum_tree_kernels.inl"
#undef FR_TARGET
#undef FR_WIDTH
}  // namespace avx512
#endif

const Kernels& kernels() {
#ifdef FR_X86
  if (instruction_set() == InstructionSet::kAvx512) return avx512::kernels;
  if (instruction_set() == InstructionSet::kAvx2) return avx2::kernels;
#endif
  return plain::kernels;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

TreeLayout::TreeLayout(int64_t capacity) {
  int64_t children = ceil_div(capacity, kFanOut);  // of the level below: leaf nodes at first
  leaf_slots = children * kFanOut;
  inner_slots = 0;
  levels = 0;
  do {
    children = ceil_div(children, kFanOut);
    level_offset[levels] = inner_slots;
    level_nodes[levels] = children;
    inner_slots += children * kFanOut;
    ++levels;
  } while (children > 1);
}

SumTree::SumTree(int64_t capacity, uint32_t* leaves, uint64_t* inner)
    : capacity_(capacity), layout_(capacity), leaves_(leaves), inner_(inner) {}

void SumTree::set(const int64_t* indices, const uint32_t* values, int64_t n) {
  const Kernels& k = kernels();
  for (int64_t first = 0; first < n; first += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, n - first));
    total_ += k.set_block(layout_, inner_, leaves_, indices + first, values + first, count);
  }
}

void SumTree::find(const uint64_t* targets, int64_t n, int64_t* out) const {
  const Kernels& k = kernels();
  uint64_t block[kBlock];
  for (int64_t first = 0; first < n; first += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, n - first));
    std::copy_n(targets + first, count, block);
    k.find_block(layout_, inner_, leaves_, block, count, out + first);
  }
}

void SumTree::draw(uint64_t seed, uint64_t call, bool stratified, int64_t n, int64_t* out) const {
  const Kernels& k = kernels();
  uint64_t block[kBlock];
  for (int64_t first = 0; first < n; first += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, n - first));
    k.random_block(seed, call, static_cast<uint32_t>(first), count, block);
    if (stratified) {
      for (int i = 0; i < count; ++i) {
        block[i] = stratum64(block[i], static_cast<uint32_t>(first + i), static_cast<uint32_t>(n));
      }
    }
    for (int i = 0; i < count; ++i) block[i] = mulhi64(block[i], total_);
    k.find_block(layout_, inner_, leaves_, block, count, out + first);
  }
}

void SumTree::weights(const int64_t* indices, int64_t n, double beta, float* out) const {
  uint32_t smallest = UINT32_MAX;
  for (int64_t i = 0; i < n; ++i) smallest = std::min(smallest, leaves_[indices[i]]);
  uint32_t block[kBlock];
  for (int64_t first = 0; first < n; first += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, n - first));
    for (int i = 0; i < count; ++i) block[i] = leaves_[indices[first + i]];
    kernels().weight_block(block, count, smallest, beta, out + first);
  }
}

void SumTree::rebuild() {
  // The sums of the nodes one level below, which are the children of this level's nodes.
  std::vector<uint64_t> sums(static_cast<size_t>(layout_.leaf_slots / kFanOut));
  for (size_t node = 0; node < sums.size(); ++node) {
    uint64_t sum = 0;
    for (int j = 0; j < kFanOut; ++j) sum += leaves_[node * kFanOut + j];
    sums[node] = sum;
  }
  for (int level = 0; level < layout_.levels; ++level) {
    uint64_t* nodes = inner_ + layout_.level_offset[level];
    const int64_t children = static_cast<int64_t>(sums.size());
    for (int64_t node = 0; node < layout_.level_nodes[level]; ++node) {
      uint64_t sum = 0;
      for (int64_t j = 0; j < kFanOut; ++j) {
        const int64_t child = node * kFanOut + j;
        nodes[child] = sum;
        if (child < children) sum += sums[static_cast<size_t>(child)];
      }
      sums[static_cast<size_t>(node)] = sum;  // in place: node <= child, which has been read
    }
    sums.resize(static_cast<size_t>(layout_.level_nodes[level]));
  }
  total_ = sums[0];
}

bool SumTree::is_valid() const {
  for (int64_t i = capacity_; i < layout_.leaf_slots; ++i) {
    if (leaves_[i] != 0) return false;
  }
  std::vector<uint64_t> inner(static_cast<size_t>(layout_.inner_slots));
  SumTree fresh(capacity_, leaves_, inner.data());
  fresh.rebuild();
  return fresh.total_ == total_ &&
         std::memcmp(inner.data(), inner_, inner.size() * sizeof(uint64_t)) == 0;
}

void quantise_many(const double* priorities, int64_t n, double alpha, uint32_t* out) {
  const Kernels& k = kernels();
  for (int64_t first = 0; first < n; first += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, n - first));
    k.quantise_block(priorities + first, count, alpha, out + first);
  }
}

}  // namespace fastreplay
