// The plain kernels: as simple as possible, kept as the reference for the tuned ones.
// Both give the same batches, draws, priorities and errors, bit for bit (tests/test_kernels.py),
// and benchmarks/buffers_cuda.py --kernels times them side by side.
//
// The launch functions of device_ring.h and device_tree.h choose between them at each launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "cuda/device_ring.h"
#include "cuda/device_tree.h"

namespace fastreplay {

// Selects "tuned" or "reference" kernels for all launches of this process from now on, and returns
// the previous selection. A captured CUDA graph keeps the kernels it was captured with. Throws
// std::invalid_argument for another name.
std::string use_kernels(const std::string& name);

bool uses_reference();

namespace reference {

void launch_add(const DeviceRing& ring, const DeviceTree& tree, const Row& row,
                cudaStream_t stream);
void launch_sample(const DeviceRing& ring, const DeviceTree& tree, const SampleJob& job,
                   cudaStream_t stream);
void launch_set(const DeviceTree& tree, Counters* counters, const Priorities& priorities,
                cudaStream_t stream);
void launch_draw(const DeviceTree& tree, Counters* counters, uint64_t seed, bool stratified,
                 int64_t n, int64_t* out, cudaStream_t stream);
void launch_find(const DeviceTree& tree, Counters* counters, const int64_t* targets, int64_t n,
                 int64_t* out, cudaStream_t stream);

}  // namespace reference
}  // namespace fastreplay
