// Memory for the length of one call, kept by the thread for the next one unless it is large.
#pragma once
#include <cstdint>

namespace narrowcast {

class ThreadScratch {
 public:
  explicit ThreadScratch(int64_t bytes);
  ~ThreadScratch();
  ThreadScratch(const ThreadScratch&) = delete;
  ThreadScratch& operator=(const ThreadScratch&) = delete;
  void* data() const { return data_; }  // 64-byte aligned

 private:
  void* data_;
  int64_t bytes_;
};

}  // namespace narrowcast
