// Streams, events and graphs of the emulation.
//
//   stream    a queue of tasks: grids, copies, event records, waits for events
//   event     a flag that its last record sets when the stream reaches it
//   graph     a list of grids, external event records and external waits, filled while a stream is
//             captured; a launch enqueues them
//
// Enqueuing does not run a task. Tasks run later, either when other work is enqueued (a few at
// random) or when the host waits. Each stream runs its tasks in order; between streams, any order
// that the events allow is possible. So work that nobody waits for may not have run yet.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <tuple>
#include <utility>
#include <vector>

#include "fibers.h"

namespace emulation {

struct Task {
  std::function<bool()> is_ready;
  std::function<void()> run;
};

struct Stream;

struct Graph {
  uint64_t id;                                      // of its capture
  std::vector<std::function<void(Stream&)>> nodes;  // each enqueues itself on a stream
};

struct Stream {
  std::deque<Task> tasks;
  Graph* graph = nullptr;  // not null: the stream is being captured
  bool is_slow = false;    // runs only while the host waits
};

struct Streams {
  std::vector<std::unique_ptr<Stream>> all;
  std::mt19937 random{2};
  int captures = 0;          // in progress
  uint64_t capture_ids = 0;  // used so far
  bool is_relaxed = false;   // the capture mode of this thread
  int64_t waits = 0;         // of the host for work that was not done yet
  int64_t launches = 0;      // of kernels, including captured ones
};
inline Streams streams;

inline Stream& stream_of(Stream* handle) {
  static Stream* const default_stream = new Stream;
  if (streams.all.empty()) streams.all.emplace_back(default_stream);
  return handle == nullptr ? *default_stream : *handle;
}

// Runs the next task of a stream; false if there is none or it is not ready.
inline bool step(Stream& stream) {
  if (stream.tasks.empty() || !stream.tasks.front().is_ready()) return false;
  const Task task = std::move(stream.tasks.front());
  stream.tasks.pop_front();
  task.run();
  return true;
}

// Runs a task of any stream; false if none can run.
inline bool step_any(bool slow_too) {
  const size_t n = streams.all.size(), start = streams.random() % std::max<size_t>(n, 1);
  for (size_t i = 0; i < n; ++i) {
    Stream& stream = *streams.all[(start + i) % n];
    if ((slow_too || !stream.is_slow) && step(stream)) return true;
  }
  return false;
}

// The host waits for a condition.
template <typename Condition>
void wait_until(Condition is_met) {
  if (!is_met()) ++streams.waits;
  while (!is_met()) {
    if (step_any(true)) continue;
    std::fprintf(stderr, "emulated CUDA: the host waits for work that cannot run\n");
    std::abort();
  }
}

inline void drain(Stream& stream) {
  wait_until([&] { return stream.tasks.empty(); });
}

inline void enqueue(
    Stream& stream, std::function<void()> run,
    std::function<bool()> is_ready = [] { return true; }) {
  stream.tasks.push_back({std::move(is_ready), std::move(run)});
  for (unsigned steps = streams.random() % 3; steps > 0 && step_any(false); --steps) {
  }
}

// kernel<<<grid, threads, 0, stream>>>(arguments...)
template <typename... Parameters, typename... Arguments>
void launch_grid(void (*kernel)(Parameters...), dim3 grid, int threads, Stream* handle,
                 const Arguments&... arguments) {
  const std::tuple<Arguments...> values(arguments...);
  const std::function<void()> thread = [kernel, values] { std::apply(kernel, values); };
  const std::function<void()> run = [=] { run_grid(thread, grid, threads); };
  Stream& stream = stream_of(handle);
  ++streams.launches;
  if (stream.graph != nullptr) {
    stream.graph->nodes.push_back([run](Stream& where) { enqueue(where, run); });
  } else {
    enqueue(stream, run);
  }
}

}  // namespace emulation
