// A ring of slots through which data is copied from the CPU to the device, without either waiting
// for the other.
//
//   host     | slot 0 | slot 1 | slot 2 | slot 3 |    pinned: written by the caller
//                 |  copied on a separate stream
//   device   | slot 0 | slot 1 | slot 2 | slot 3 |    read by a kernel on the caller's stream
//
// The kernel waits for the copy, a copy for the kernel that last read its slot, and the host for
// the copy that last read its slot. With four slots, a copy and the host rarely have to wait.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <cstdint>

#include "cuda/runtime.h"

namespace fastreplay {

// Host memory that the device reads and writes at the same address.
class PinnedMemory {
 public:
  explicit PinnedMemory(int64_t bytes) : bytes_(bytes) {
    check_cuda(cudaHostAlloc(&data_, static_cast<size_t>(bytes),
                             cudaHostAllocPortable | cudaHostAllocMapped),
               "cudaHostAlloc");
  }
  ~PinnedMemory() {
    const RelaxedCapture relaxed;
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

  struct Slot {
    uint8_t* host;
    uint8_t* device;
  };

  // `device` has kSlots * slot_bytes bytes. They may be overwritten once the work that is now on
  // `stream` is done. The current device must be that of the replay.
  Staging(uint8_t* device, int64_t slot_bytes, cudaStream_t stream)
      : host_(kSlots * slot_bytes), device_(device), slot_bytes_(slot_bytes) {
    check_cuda(cudaStreamCreateWithFlags(&copies_, cudaStreamNonBlocking),
               "cudaStreamCreateWithFlags");
    for (Event& read : read_) read.record(stream);
  }
  ~Staging() {
    const RelaxedCapture relaxed;
    ignore_cuda(cudaStreamDestroy(copies_));
  }
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

  int64_t slot_bytes() const { return slot_bytes_; }

  // Once this is done, the host side of the next slot may be overwritten.
  Event& next_copied() { return copied_[(current_ + 1) % kSlots]; }

  // Makes the next slot the current one.
  Slot open() {
    current_ = (current_ + 1) % kSlots;
    return {host_.data() + current_ * slot_bytes_, device_ + current_ * slot_bytes_};
  }
  // Copies the first `bytes` bytes of the current slot to the device. Later work on `stream` sees
  // them.
  void send(int64_t bytes, cudaStream_t stream) {
    read_[current_].block(copies_);
    check_cuda(
        cudaMemcpyAsync(device_ + current_ * slot_bytes_, host_.data() + current_ * slot_bytes_,
                        static_cast<size_t>(bytes), cudaMemcpyHostToDevice, copies_),
        "a copy to the device");
    copied_[current_].record(copies_);
    copied_[current_].block(stream);
  }
  // Called after the kernel that reads the current slot was launched on `stream`.
  void close(cudaStream_t stream) { read_[current_].record(stream); }

 private:
  PinnedMemory host_;
  uint8_t* device_;
  int64_t slot_bytes_;
  cudaStream_t copies_ = nullptr;
  int current_ = 0;
  std::array<Event, kSlots> copied_, read_;  // the host side is copied, the device side is read
};

}  // namespace fastreplay
