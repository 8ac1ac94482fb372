// A queue of byte strings in segments of fixed size: push() at the end, pop() at the front. Strings
// never move and are not split. A segment holds at least kStrings strings, so less than an eighth
// of it is wasted at its end. Only reserve() allocates. A segment is freed with its last string, or
// kept for later strings.
//
// `Memory` is a pointer that owns bytes: of the CPU (cpu/huge_pages.h) or of a CUDA device.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>

#include "cpu/huge_pages.h"

namespace fastreplay {

template <typename Memory>
class ChunkLog {
 public:
  explicit ChunkLog(int64_t longest_string, bool keeps_segments = false)
      : segment_bytes_(std::max(kLeastSegment, kStrings * longest_string)),
        keeps_segments_(keeps_segments) {
    if (segment_bytes_ > kHugePage / 2) {
      segment_bytes_ = (segment_bytes_ + kHugePage - 1) / kHugePage * kHugePage;
    }
  }
  ~ChunkLog() {
    free_all(front_);
    free_all(spare_);
  }
  ChunkLog(const ChunkLog&) = delete;
  ChunkLog& operator=(const ChunkLog&) = delete;

  // Makes room for this many strings, in segments from allocate(bytes). Returns whether it needed
  // any.
  template <typename Allocate>
  bool reserve(int64_t strings, const Allocate& allocate) {
    const bool grows = spares_ * kStrings < strings;
    while (spares_ * kStrings < strings) {
      auto segment = std::make_unique<Segment>();
      segment->bytes = allocate(segment_bytes_);
      add_spare(std::move(segment));
    }
    return grows;
  }

  // Where the next string, of this many bytes, is to be written.
  uint8_t* push(int64_t bytes) {
    if (back_ == nullptr || back_->used + bytes > segment_bytes_) {
      std::unique_ptr<Segment> segment = std::move(spare_);
      spare_ = std::move(segment->next);
      --spares_;
      std::unique_ptr<Segment>& end = back_ == nullptr ? front_ : back_->next;
      end = std::move(segment);
      back_ = end.get();
      ++segments_;
    }
    uint8_t* const to = back_->bytes.get() + back_->used;
    back_->used += bytes;
    ++back_->strings;
    return to;
  }

  void pop() {
    if (--front_->strings > 0) return;
    if (front_.get() == back_) {
      back_->used = 0;
      return;
    }
    std::unique_ptr<Segment> next = std::move(front_->next);
    if (keeps_segments_) {
      front_->used = 0;
      add_spare(std::move(front_));
    }
    front_ = std::move(next);
    --segments_;
  }

  // Allocated.
  int64_t bytes() const { return (segments_ + spares_) * segment_bytes_; }

 private:
  static constexpr int64_t kStrings = 8, kLeastSegment = 1 << 16;
  struct Segment {
    Memory bytes;
    int64_t used = 0, strings = 0;
    std::unique_ptr<Segment> next;
  };
  // Not by the destructors, which would call each other for each segment.
  static void free_all(std::unique_ptr<Segment>& first) {
    while (first != nullptr) first = std::unique_ptr<Segment>(std::move(first->next));
  }

  void add_spare(std::unique_ptr<Segment> segment) {
    segment->next = std::move(spare_);
    spare_ = std::move(segment);
    ++spares_;
  }

  int64_t segment_bytes_;
  bool keeps_segments_;
  std::unique_ptr<Segment> front_, spare_;
  Segment* back_ = nullptr;
  int64_t segments_ = 0, spares_ = 0;
};

}  // namespace fastreplay
