// The CUDA runtime: errors, the current device, events, and the order of work on several streams.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace fastreplay {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // clears it: the next call must not report it again
  throw std::runtime_error(std::string("CUDA error in ") + what + ": " + cudaGetErrorString(error));
}

// In a destructor: clears the error, so that the next launch does not report it.
inline void ignore_cuda(cudaError_t error) {
  if (error != cudaSuccess) (void)cudaGetLastError();
}

// Relaxed capture mode for this thread: waits, copies and frees are allowed although another thread
// captures a graph, which they would otherwise invalidate.
class RelaxedCapture {
 public:
  RelaxedCapture() { ignore_cuda(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~RelaxedCapture() { ignore_cuda(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Makes a device the current one of this thread, for the lifetime of the guard.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ != device_) check_cuda(cudaSetDevice(device_), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (previous_ != device_) ignore_cuda(cudaSetDevice(previous_));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_, previous_ = 0;
};

inline bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

class Event {
 public:
  Event() {
    check_cuda(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming),
               "cudaEventCreateWithFlags");
  }
  ~Event() {
    const RelaxedCapture relaxed;
    ignore_cuda(cudaEventDestroy(event_));
  }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void record(cudaStream_t stream) {
    check_cuda(cudaEventRecord(event_, stream), "an event record");
  }
  // Later work on the stream waits for the last record. Without a record, there is no wait.
  void block(cudaStream_t stream) {
    check_cuda(cudaStreamWaitEvent(stream, event_, 0), "cudaStreamWaitEvent");
  }
  // The host waits.
  void wait() {
    const RelaxedCapture relaxed;
    check_cuda(cudaEventSynchronize(event_), "cudaEventSynchronize");
  }
  bool is_done() {
    const RelaxedCapture relaxed;
    const cudaError_t status = cudaEventQuery(event_);
    if (status != cudaErrorNotReady) check_cuda(status, "cudaEventQuery");
    ignore_cuda(status);
    return status == cudaSuccess;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

// Runs the operations of one replay in program order, on whichever streams they are: an operation
// on another stream than the last one waits for it. An operation that is captured is not ordered.
class StreamOrder {
 public:
  void begin(cudaStream_t stream) {
    if (is_capturing(stream)) return;
    if (used_ && stream != last_) done_.block(stream);
  }
  void end(cudaStream_t stream) {
    if (is_capturing(stream)) return;
    done_.record(stream);
    last_ = stream;
    used_ = true;
  }
  // Until all operations are done. Another thread may begin and end operations meanwhile.
  void wait() { done_.wait(); }

 private:
  Event done_;
  cudaStream_t last_ = nullptr;
  bool used_ = false;
};

}  // namespace fastreplay
