// attention, attention_decode: out = softmax(cap(scale * q k^T) + bias) v, row by row.
//
//   q     [B, Hq, Sq, D], k [B, Hkv, Sk, D], v [B, Hkv, Sk, Dv]; any strides but 1 in the last
//         dimension. Head h of q reads head h / (Hq / Hkv) of k and v.
//   cap   softcap * tanh(s / softcap) when softcap > 0, else s. It comes before the bias.
//   mask  query i stands at position p = i + Sk - Sq (bottom-right). Causal: key j is seen when
//         j <= p. A window w > 0 adds p - w < j, and without causal also j < p + w.
//   sinks one logit per head of q which joins the denominator only.
//   lse   log of the denominator (sink included): -inf where a row sees nothing; its out is 0.
//
// Packed form: cu_q and cu_k hold B + 1 first rows, and the batch strides are 0.
// Cache form (attention_decode): Sk = lengths[b], causal; int8 rows times a scale each, or uint8
// rows of two 4-bit codes a byte (hadamard.h); pages of page_size rows found through block_table,
// page strides in place of batch strides.
//
// Numerics: half and int8 are widened; products, softmax and sums in float32; a key tile at a time
// with a running maximum. The kernel avx512bf16 multiplies bfloat16 inputs as such: products of q
// and k are exact, the weights p are rounded to bfloat16, subnormal numbers count as 0.
#pragma once
#include <cstdint>

#include "common/tensor_view.h"

namespace narrowcast {

struct AttentionStrides {
  int64_t batch, head, row;
};

struct AttentionArgs {
  const void *q, *k, *v;
  void* out;
  float* lse;                                          // nullptr: not wanted
  const void* bias;                                    // nullptr: none
  const float* sinks;                                  // nullptr: none
  const int32_t *cu_q, *cu_k, *lengths, *block_table;  // nullptr: not that form
  const float *k_scale, *v_scale;                      // int8 caches only
  const uint32_t *k_pairs,
      *v_pairs;  // caches of 4-bit codes only (hadamard.h); scale strides in pairs
  AttentionStrides q_strides, k_strides, v_strides, out_strides, lse_strides, k_scale_strides,
      v_scale_strides;
  int64_t bias_strides[4];  // of batch, head, query and key; 0 where broadcast
  int64_t batch, heads, kv_heads, sq, sk, depth, v_depth;
  int64_t page_size, table_stride;
  DType q_dtype, kv_dtype, out_dtype, bias_dtype;
  float scale, softcap;
  int64_t window;
  bool causal;
};

// One piece of work: `rows` rows of one K/V head, from row0. Row r is query r / G of head
// kv_head * G + r % G, G = heads / kv_heads: the heads that share keys sit side by side.
// Keys outside key0 .. key1 are left out; then `partial` takes [maximum, denominator, v_depth
// sums] per row, to be merged, in place of out and lse.
struct AttentionItem {
  int64_t sequence, kv_head, row0, rows, key0, key1;
  float* partial;
};

constexpr int64_t kAttentionRows = 64, kAttentionKeys = 128;

int64_t attention_scratch_floats(const AttentionArgs& args);
void attention_run(const AttentionArgs& args);

using AttentionFn = void (*)(const AttentionArgs& args, const AttentionItem& item, float* scratch);
#define KERNEL(name, isa) \
  void attention_rows_##name(const AttentionArgs& args, const AttentionItem& item, float* scratch);
#include "attention/attention.inc"
#undef KERNEL

}  // namespace narrowcast
