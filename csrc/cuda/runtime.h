// Calls of the CUDA runtime: errors, the current device, and the order of work on several streams.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace fastreplay {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // told here: the next call must not tell it again
  throw std::runtime_error(std::string("CUDA error in ") + what + ": " + cudaGetErrorString(error));
}

// In a destructor: what goes wrong is forgotten, or the next launch would be blamed for it.
inline void ignore_cuda(cudaError_t error) {
  if (error != cudaSuccess) (void)cudaGetLastError();
}

// Waits, copies and frees while another thread may be capturing a graph, which they would end if
// this thread did not say that they are none of that graph's business.
class BesideCaptures {
 public:
  BesideCaptures() { ignore_cuda(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~BesideCaptures() { ignore_cuda(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  BesideCaptures(const BesideCaptures&) = delete;
  BesideCaptures& operator=(const BesideCaptures&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Makes a device the current one of this thread, for a while.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device_) check_cuda(cudaSetDevice(device_), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (before_ != device_) ignore_cuda(cudaSetDevice(before_));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_, before_ = 0;
};

inline bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

class Event {
 public:
  Event() { check_cuda(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "an event"); }
  ~Event() {
    const BesideCaptures beside;
    ignore_cuda(cudaEventDestroy(event_));
  }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void record(cudaStream_t stream) { check_cuda(cudaEventRecord(event_, stream), "an event"); }
  // An event that was never recorded holds up nobody.
  void hold(cudaStream_t stream) { check_cuda(cudaStreamWaitEvent(stream, event_, 0), "a wait"); }
  void wait() {
    const BesideCaptures beside;
    check_cuda(cudaEventSynchronize(event_), "a wait");
  }
  bool has_happened() {
    const BesideCaptures beside;
    const cudaError_t answer = cudaEventQuery(event_);
    if (answer != cudaErrorNotReady) check_cuda(answer, "an event");
    ignore_cuda(answer);
    return answer == cudaSuccess;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

// The operations of one replay, in the order of the program, whatever their streams: one on another
// stream than the last waits for it. A capture is left alone: what a graph waits for when it is
// launched is known only to who launches it.
class StreamOrder {
 public:
  void begin(cudaStream_t stream, bool capturing) {
    if (!capturing && used_ && stream != last_) done_.hold(stream);
  }
  void end(cudaStream_t stream, bool capturing) {
    if (capturing) return;
    done_.record(stream);
    last_ = stream;
    used_ = true;
  }
  // Until all of it is done. Another thread may begin and end operations meanwhile.
  void wait() { done_.wait(); }

 private:
  Event done_;
  cudaStream_t last_ = nullptr;
  bool used_ = false;
};

}  // namespace fastreplay
