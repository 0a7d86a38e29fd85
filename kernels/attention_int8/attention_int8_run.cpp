// Selection and the parallel loops: raw pointers in, no torch.
#include <algorithm>

#include "attention/attention_items.h"
#include "attention_int8/attention_int8.h"
#include "common/parallel.h"
#include "common/registry.h"
#include "common/scratch.h"

namespace narrowcast {
namespace {

constexpr Variant<const AttentionInt8Kernel*> kVariants[] = {
#define KERNEL(name, isa) {#name, isa, &attention_int8_##name},
#include "attention_int8/attention_int8.inc"
#undef KERNEL
};
NC_VARIANT_LIST(attention_int8, const AttentionInt8Kernel*, kVariants)

int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

int64_t attention_int8_workspace(const AttentionArgs& a) {
  const int64_t rows = a.kv_heads * attention_int8_key_rows(a);
  return padded(rows * attention_int8_depth(a.depth)) + 2 * padded(rows * 4) +
         a.batch * a.kv_heads * a.depth * 4;
}

AttentionInt8Args attention_int8_args(const AttentionArgs& a, void* workspace) {
  const int64_t rows = a.kv_heads * attention_int8_key_rows(a);
  char* at = static_cast<char*>(workspace);
  AttentionInt8Args x = {a, reinterpret_cast<int8_t*>(at), nullptr, nullptr, nullptr};
  x.scales = reinterpret_cast<float*>(at += padded(rows * attention_int8_depth(a.depth)));
  x.sums = reinterpret_cast<int32_t*>(at += padded(rows * 4));
  x.means = reinterpret_cast<float*>(at + padded(rows * 4));
  return x;
}

void attention_int8_run(const AttentionInt8Args& x) {
  const AttentionInt8Kernel* kernel = select_attention_int8();
  const AttentionArgs& a = x.attention;
  const int64_t heads = a.batch * a.kv_heads;
  const int64_t keys = heads ? attention_int8_key_rows(a) / a.batch : 0;
  const int64_t grain = std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, keys * a.depth));
  parallel_for(0, heads, grain, [&](int64_t begin, int64_t end) {
    const ThreadScratch line((a.depth + 16) * 4);
    for (int64_t i = begin; i < end; ++i)
      kernel->keys(x, i / a.kv_heads, i % a.kv_heads, static_cast<float*>(line.data()));
  });
  for_attention_items(
      a, [&](const AttentionItem& item, float* scratch) { kernel->rows(x, item, scratch); });
}

}  // namespace narrowcast
