// Selection: raw pointers in, no torch.
#include "attention/attention_items.h"
#include "common/registry.h"

namespace narrowcast {
namespace {

constexpr Variant<AttentionFn> kVariants[] = {
#define KERNEL(name, isa) {#name, isa, &attention_rows_##name},
#include "attention/attention.inc"
#undef KERNEL
};
NC_VARIANT_LIST(attention, AttentionFn, kVariants)

}  // namespace

int64_t attention_scratch_floats(const AttentionArgs& a) {
  const int64_t columns = (a.v_depth + 15) / 16 * 16, depth = a.depth + a.depth % 2;
  return kAttentionRows * (depth + columns + 2 * kAttentionKeys) +
         kAttentionKeys * (depth + columns) + depth;
}

void attention_run(const AttentionArgs& a) {
  const AttentionFn kernel = select_attention();
  for_attention_items(a,
                      [&](const AttentionItem& item, float* scratch) { kernel(a, item, scratch); });
}

}  // namespace narrowcast
