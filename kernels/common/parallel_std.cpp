// parallel.h without torch, for the sanitizer build: torch's OpenMP pool is not instrumented.
#include <algorithm>
#include <thread>
#include <vector>

#include "common/parallel.h"

namespace narrowcast {

int thread_count() { return 4; }

void parallel_ranges(int64_t begin, int64_t end, int64_t grain, RangeFn fn, void* context) {
  const int64_t pieces = std::min<int64_t>(thread_count(), (end - begin + grain - 1) / grain);
  const int64_t length = (end - begin + pieces - 1) / pieces;
  std::vector<std::thread> threads;
  for (int64_t b = begin; b < end; b += length)
    threads.emplace_back(fn, context, b, std::min(end, b + length));
  for (std::thread& t : threads) t.join();
}

}  // namespace narrowcast
