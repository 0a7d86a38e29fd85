#include "common/scratch.h"

#include <algorithm>
#include <cstdlib>
#include <new>

namespace narrowcast {
namespace {

constexpr int64_t kKeep = 16 << 20;  // bytes

// Two, since an op that holds one may take another inside its parallel loop.
struct Kept {
  struct Slot {
    void* data = nullptr;
    int64_t bytes = 0;
  } slots[2];
  ~Kept() {
    for (Slot& slot : slots) std::free(slot.data);
  }
};
thread_local Kept t_kept;

}  // namespace

ThreadScratch::ThreadScratch(int64_t bytes) {
  Kept::Slot* fits = nullptr;
  for (Kept::Slot& slot : t_kept.slots)
    if (slot.bytes >= bytes && (!fits || slot.bytes < fits->bytes)) fits = &slot;
  if (fits && fits->data) {
    data_ = fits->data, bytes_ = fits->bytes;
    *fits = {};
    return;
  }
  bytes_ = std::max<int64_t>(bytes + 63, 64) / 64 * 64;
  data_ = std::aligned_alloc(64, bytes_);
  if (!data_) throw std::bad_alloc();
}

ThreadScratch::~ThreadScratch() {
  Kept::Slot* smallest = &t_kept.slots[0];
  if (t_kept.slots[1].bytes < smallest->bytes) smallest = &t_kept.slots[1];
  if (bytes_ > kKeep || bytes_ <= smallest->bytes) {
    std::free(data_);
    return;
  }
  std::free(smallest->data);
  *smallest = {data_, bytes_};
}

}  // namespace narrowcast
