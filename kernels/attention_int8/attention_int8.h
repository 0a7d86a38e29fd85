// attention_int8: attention (attention.h) whose scores come from int8 products.
//
//   k^_j  = round((k_j - mean) / ks_j),  mean over all keys of the sequence, ks_j = max |.| / 127
//   q^_i  = round(scale * q_i / qs_i),   qs_i = max |.| / 127
//   s_ij  = qs_i * ks_j * (q^_i . k^_j)  exact in int32, then float32
//
// and from there softmax and the sums over v as in attention, in float32 (with weights in bfloat16
// where the kernel is avx512bf16 and v is bfloat16). Softmax does not see what
// the mean takes away, scale * q_i . mean; with a softcap or sinks, which do, it is added back.
//
// Error of a score: |ds| <= qs_i / 2 |k_j - mean|_1 + ks_j / 2 |scale q_i|_1 + D qs_i ks_j / 4, and
// with the largest of a row, d: |dout| <= (e^2d - 1) sum over j of p_ij |v_j|. Rows of standard
// normal values come out within 0.02 of ||out||.
//
// The mean is the float32 sum of the rows in order (values that are not finite left out; on GPUs a
// sum of sums over pieces of them) over their number; quantisation is the symmetric rule of the
// quantize room. A row of q or k with NaN or infinity has the scale NaN: what sees it is NaN, what
// a mask keeps away from it is not.
#pragma once
#include "attention/attention.h"

namespace narrowcast {

constexpr int64_t kAttentionInt8Depth = 65536;  // 255 * 127 * D stays within int32

struct AttentionInt8Args {
  AttentionArgs attention;
  // Of key row t (b * Sk + j, or the packed row) and K/V head h: codes[h][t], depth rounded up to
  // 4 with zeros; the scale ks and the sum of the codes, [h][t]. means [b][h][D].
  int8_t* codes;
  float* scales;
  int32_t* sums;
  float* means;
};

constexpr int64_t attention_int8_depth(int64_t depth) { return (depth + 3) / 4 * 4; }
inline int64_t attention_int8_key_rows(const AttentionArgs& a) {
  return a.cu_k ? a.sk : a.batch * a.sk;
}

// Bytes behind codes, scales, sums and means, and their places in such a buffer.
int64_t attention_int8_workspace(const AttentionArgs& args);
AttentionInt8Args attention_int8_args(const AttentionArgs& args, void* workspace);
void attention_int8_run(const AttentionInt8Args& args);

struct AttentionInt8Kernel {
  // Quantises the keys of one sequence and head. scratch: D floats.
  void (*keys)(const AttentionInt8Args& args, int64_t sequence, int64_t kv_head, float* scratch);
  void (*rows)(const AttentionInt8Args& args, const AttentionItem& item, float* scratch);
};
#define KERNEL(name, isa) extern const AttentionInt8Kernel attention_int8_##name;
#include "attention_int8/attention_int8.inc"
#undef KERNEL

}  // namespace narrowcast
