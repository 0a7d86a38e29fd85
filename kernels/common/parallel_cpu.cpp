#include <torch/csrc/stable/ops.h>

#include "common/parallel.h"

namespace narrowcast {

void parallel_ranges(int64_t begin, int64_t end, int64_t grain, RangeFn fn, void* context) {
  torch::stable::parallel_for(begin, end, grain,
                              [fn, context](int64_t b, int64_t e) { fn(context, b, e); });
}

int thread_count() { return static_cast<int>(torch::stable::get_num_threads()); }

}  // namespace narrowcast
