// The parallel loop over a call of attention, cut into pieces of work. Not for ISA files.
#pragma once
#include <algorithm>

#include "attention/attention.h"
#include "common/parallel.h"
#include "common/scratch.h"

namespace narrowcast {

// kernel(item, scratch) for blocks of rows that cover the call.
template <class Kernel>
void for_attention_items(const AttentionArgs& a, Kernel kernel) {
  constexpr int64_t kGrain = 1 << 18;  // products: some microseconds
  const int64_t group = a.heads / std::max<int64_t>(a.kv_heads, 1);
  const auto queries = [&](int64_t b) { return a.cu_q ? a.cu_q[b + 1] - a.cu_q[b] : a.sq; };
  const auto keys = [&](int64_t b) { return a.cu_k ? a.cu_k[b + 1] - a.cu_k[b] : a.sk; };
  const auto blocks = [&](int64_t b) {
    return (queries(b) * group + kAttentionRows - 1) / kAttentionRows;
  };
  int64_t items = 0, products = 0;
  for (int64_t b = 0; b < a.batch; ++b) {
    items += a.kv_heads * blocks(b);
    products += a.heads * queries(b) * std::max<int64_t>(keys(b), 1) * (a.depth + a.v_depth + 1);
  }
  if (items == 0) return;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, products / items));
  parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
    const ThreadScratch scratch(attention_scratch_floats(a) * 4);
    int64_t b = 0, first = 0;  // the sequence of item i and its first item
    for (int64_t i = begin; i < end; ++i) {
      while (i >= first + a.kv_heads * blocks(b)) first += a.kv_heads * blocks(b++);
      const int64_t row = (i - first) % blocks(b) * kAttentionRows;
      const AttentionItem item = {b,      (i - first) / blocks(b),
                                  row,    std::min(kAttentionRows, queries(b) * group - row),
                                  0,      keys(b),
                                  nullptr};
      kernel(item, static_cast<float*>(scratch.data()));
    }
  });
}

}  // namespace narrowcast
