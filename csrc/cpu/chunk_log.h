// A queue of byte strings in segments of fixed size: push() at the end, pop() at the front. Strings
// never move and are not split. A segment holds at least kStrings strings, so less than an eighth
// of it is wasted at its end. Only reserve() allocates; a segment is freed with its last string.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>

#include "cpu/huge_pages.h"

namespace fastreplay {

class ChunkLog {
 public:
  explicit ChunkLog(int64_t longest_string)
      : segment_bytes_(std::max(kLeastSegment, kStrings * longest_string)) {
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

  // Makes room for this many strings.
  void reserve(int64_t strings) {
    for (; spares_ * kStrings < strings; ++spares_) {
      auto segment = std::make_unique<Segment>();
      segment->bytes = allocate(segment_bytes_);
      segment->next = std::move(spare_);
      spare_ = std::move(segment);
    }
  }

  const uint8_t* push(const uint8_t* data, int64_t bytes) {
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
    std::memcpy(to, data, static_cast<size_t>(bytes));
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
    front_ = std::move(next);
    --segments_;
  }

  int64_t bytes() const { return segments_ * segment_bytes_; }

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

  int64_t segment_bytes_;
  std::unique_ptr<Segment> front_, spare_;
  Segment* back_ = nullptr;
  int64_t segments_ = 0, spares_ = 0;
};

}  // namespace fastreplay
