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

// Relaxed capture mode for this thread: waits, copies and frees are allowed while another thread
// captures a graph. In the default mode they would invalidate that capture.
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
    check_cuda(cudaEventRecord(event_, stream), "cudaEventRecord");
  }
  // Later work on the stream waits for the last record. Without a record, there is no wait.
  void block(cudaStream_t stream) {
    check_cuda(cudaStreamWaitEvent(stream, event_, 0), "cudaStreamWaitEvent");
  }
  // The same while the stream is captured: adds nodes to the graph, which record and wait at each
  // launch.
  void record_external(cudaStream_t stream) {
    check_cuda(cudaEventRecordWithFlags(event_, stream, cudaEventRecordExternal),
               "cudaEventRecordWithFlags");
  }
  void block_external(cudaStream_t stream) {
    check_cuda(cudaStreamWaitEvent(stream, event_, cudaEventWaitExternal), "cudaStreamWaitEvent");
  }
  // The host waits for the last record.
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

// Runs the operations of one replay in program order, whatever their streams. Each operation
// records an event; an operation on another stream than the last one waits for it. A captured
// operation records and waits at each launch of its graph, so that launches are ordered with other
// operations. Two operations in one graph are ordered only by their stream, so they must be on the
// same one.
class StreamOrder {
 public:
  // Returns whether the stream is captured.
  bool begin(cudaStream_t stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long capture = 0;  // unique number of the capture
    check_cuda(cudaStreamGetCaptureInfo(stream, &status, &capture), "cudaStreamGetCaptureInfo");
    if (status == cudaStreamCaptureStatusNone) {
      // cudaStreamPerThread is another stream in each thread.
      const bool is_last = stream == last_ && stream != cudaStreamPerThread;
      if (capture_ != 0 || (is_used_ && !is_last)) done_.block(stream);
      return false;
    }
    if (capture == capture_ && stream != captured_) {
      throw std::runtime_error(
          "the calls of one replay in one CUDA graph must be captured on one stream");
    }
    if (capture != capture_) done_.block_external(stream);
    capture_ = capture;
    captured_ = stream;
    return true;
  }
  void end(cudaStream_t stream, bool is_captured) {
    if (is_captured) return done_.record_external(stream);
    done_.record(stream);
    last_ = stream;
    is_used_ = true;
  }
  // Waits until all operations are done. Meanwhile, other threads may begin and end operations.
  void wait() { done_.wait(); }

 private:
  Event done_;  // recorded by every operation
  cudaStream_t last_ = nullptr;
  bool is_used_ = false;
  unsigned long long capture_ = 0;  // the last one; if not 0, launches may be on any stream
  cudaStream_t captured_ = nullptr;
};

}  // namespace fastreplay
