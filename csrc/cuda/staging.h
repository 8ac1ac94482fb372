// How data of the CPU comes to the device without holding up either.
//
//   host     | slot 0 | slot 1 | slot 2 | slot 3 |    pinned: written by the caller of add()
//                 |  copied on a stream of its own
//   device   | slot 0 | slot 1 | slot 2 | slot 3 |    read by a kernel on the caller's stream
//
// The caller's stream waits for the copy, the copy for the kernel that has read the slot before,
// and the host for the copy that has read the slot before: with four slots, practically never.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <cstdint>

#include "cuda/runtime.h"

namespace fastreplay {

// Memory of the host that the device reads and writes too, at the same address.
class PinnedMemory {
 public:
  explicit PinnedMemory(int64_t bytes) : bytes_(bytes) {
    check_cuda(cudaHostAlloc(&data_, static_cast<size_t>(bytes),
                             cudaHostAllocPortable | cudaHostAllocMapped),
               "pinning host memory");
  }
  ~PinnedMemory() {
    const BesideCaptures beside;
    ignore_cuda(cudaFreeHost(data_));
  }
  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;

  uint8_t* data() const { return static_cast<uint8_t*>(data_); }
  int64_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  int64_t bytes_;
};

class Staging {
 public:
  static constexpr int kSlots = 4;

  // `device` has kSlots * slot_bytes, free to be written once `stream` comes here. The current
  // device is that of the replay.
  Staging(uint8_t* device, int64_t slot_bytes, cudaStream_t stream)
      : host_(kSlots * slot_bytes), device_(device), slot_bytes_(slot_bytes) {
    check_cuda(cudaStreamCreateWithFlags(&copies_, cudaStreamNonBlocking), "a stream");
    for (Slot& slot : slots_) slot.read.record(stream);
  }
  ~Staging() {
    const BesideCaptures beside;
    ignore_cuda(cudaStreamDestroy(copies_));
  }
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

  int64_t slot_bytes() const { return slot_bytes_; }

  // When this has happened, the next slot is free to be written.
  Event& room() { return slots_[(slot_ + 1) % kSlots].copied; }
  // Takes the next slot: its host side.
  uint8_t* open() {
    slot_ = (slot_ + 1) % kSlots;
    return host_.data() + slot_ * slot_bytes_;
  }
  // Sends its first bytes. Returns where they will be, for kernels on `stream`.
  uint8_t* send(int64_t bytes, cudaStream_t stream) {
    Slot& slot = slots_[slot_];
    uint8_t* to = device_ + slot_ * slot_bytes_;
    slot.read.hold(copies_);
    check_cuda(cudaMemcpyAsync(to, host_.data() + slot_ * slot_bytes_, static_cast<size_t>(bytes),
                               cudaMemcpyHostToDevice, copies_),
               "a copy to the device");
    slot.copied.record(copies_);
    slot.copied.hold(stream);
    return to;
  }
  // After the kernel that reads it was launched.
  void close(cudaStream_t stream) { slots_[slot_].read.record(stream); }

 private:
  struct Slot {
    Event copied, read;
  };
  PinnedMemory host_;
  uint8_t* device_;
  int64_t slot_bytes_;
  cudaStream_t copies_ = nullptr;
  int slot_ = 0;
  std::array<Slot, kSlots> slots_;
};

}  // namespace fastreplay
