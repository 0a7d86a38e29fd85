// Argument checks that the attention rooms share. Not for ISA files.
#pragma once
#include <tuple>
#include <utility>

#include <algorithm>

#include "attention/attention.h"
#include "common/check.h"
#include "common/rows.h"
#include "common/tensor.h"

namespace narrowcast {

// Key numbers are int32 in the kernels; a window of this length hides nothing.
constexpr int64_t kMaxLength = int64_t{1} << 30;

inline void check_floating(const char* op, const char* argument, const TensorView& t, int rank,
                           const char* form) {
  NC_CHECK(is_floating(t.dtype) && t.rank == rank, op, argument,
           " must be float32, float16 or bfloat16 ", form, ", got ", name(t.dtype), " ", shape(t));
}

inline void check_vector(const char* op, const char* argument, const TensorView& t, DType dtype,
                         int64_t count) {
  NC_CHECK(
      t.dtype == dtype && t.rank == 1 && (count < 0 || t.sizes[0] == count) && is_contiguous(t), op,
      argument, " must be contiguous ", name(dtype), " [",
      count < 0 ? std::string("B + 1") : std::to_string(count), "], got ", name(t.dtype), " ",
      shape(t));
}

inline void check_out(const char* op, const TensorView& out, const TensorView& q, int64_t v_depth) {
  bool fits = out.rank == q.rank && out.dtype == q.dtype && is_contiguous(out);
  for (int d = 0; fits && d < q.rank; ++d)
    fits = out.sizes[d] == (d == q.rank - 1 ? v_depth : q.sizes[d]);
  NC_CHECK(fits, op, "out must be contiguous ", name(q.dtype),
           " of the shape of q with the last size of v, got ", name(out.dtype), " ", shape(out));
}

inline AttentionStrides strides_of(const TensorView& t) {  // [B, H, S, D]
  return {t.strides[0], t.strides[1], t.strides[2]};
}

inline float checked_scale(const char* op, bool given, double scale, double softcap, int64_t window,
                           int64_t depth) {
  NC_CHECK(softcap == 0 || (softcap >= 1e-30 && softcap <= 1e30), op,
           "softcap must be 0 (none) or within 1e-30 and 1e30, got ", softcap);
  NC_CHECK(window >= 0, op, "window must be 0 (none) or positive, got ", window);
  if (!given)
    return static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(depth ? depth : 1)));
  NC_CHECK(scale == scale && scale < 1e30 && scale > -1e30, op, "scale must be finite, got ",
           scale);
  return static_cast<float>(scale);
}

struct AttentionOperands {
  TensorView q, k, v, bias, cu_q, cu_k, sinks;
};

struct AttentionOptions {
  bool has_scale, causal;
  double scale, softcap;
  int64_t window;
};

inline AttentionArgs attention_args(const char* op, const AttentionOperands& t,
                                    const AttentionOptions& o) {
  const bool packed = defined(t.cu_q) || defined(t.cu_k);
  const int rank = packed ? 3 : 4;
  const char* form = packed ? "[T, H, D] (with cu_seqlens)" : "[B, H, S, D]";
  check_floating(op, "q", t.q, rank, form);
  check_floating(op, "k", t.k, rank, form);
  check_floating(op, "v", t.v, rank, form);
  NC_CHECK(t.k.dtype == t.q.dtype, op, "k must have the dtype of q, ", name(t.q.dtype), ", got ",
           name(t.k.dtype));
  NC_CHECK(t.v.dtype == t.q.dtype, op, "v must have the dtype of q, ", name(t.q.dtype), ", got ",
           name(t.v.dtype));
  const int head = 1, row = packed ? 0 : 2;
  AttentionArgs a = {};
  a.heads = t.q.sizes[head], a.kv_heads = t.k.sizes[head];
  a.sq = t.q.sizes[row], a.sk = t.k.sizes[row];
  a.depth = size(t.q, -1), a.v_depth = size(t.v, -1);
  NC_CHECK(size(t.k, -1) == a.depth && (packed || t.k.sizes[0] == t.q.sizes[0]), op,
           "k must have the batch and head size of q, ", shape(t.q), ", got ", shape(t.k));
  NC_CHECK(a.kv_heads > 0 ? a.heads % a.kv_heads == 0 : a.heads == 0, op,
           "k must have a number of heads that divides that of q, ", a.heads, ", got ", a.kv_heads);
  bool same = true;
  for (int d = 0; d < rank - 1; ++d) same = same && t.v.sizes[d] == t.k.sizes[d];
  NC_CHECK(same, op, "v must have the shape of k but for the last size, ", shape(t.k), ", got ",
           shape(t.v));
  NC_CHECK(a.sq < kMaxLength && a.sk < kMaxLength, op, "q and k must be shorter than 2^30, got ",
           a.sq, " and ", a.sk);
  for (const auto& [x, label] : {std::pair{&t.q, "q"}, {&t.k, "k"}, {&t.v, "v"}})
    NC_CHECK(has_dense_rows(*x), op, label, " must have stride 1 in the last dimension, got ",
             stride(*x, -1));
  if (packed) {
    NC_CHECK(defined(t.cu_q) && defined(t.cu_k), op,
             "cu_seqlens_q and cu_seqlens_k must be given together");
    check_vector(op, "cu_seqlens_q", t.cu_q, DType::kInt32, -1);
    NC_CHECK(t.cu_q.sizes[0] >= 1, op, "cu_seqlens_q must be [B + 1], got [0]");
    check_vector(op, "cu_seqlens_k", t.cu_k, DType::kInt32, t.cu_q.sizes[0]);
    a.batch = t.cu_q.sizes[0] - 1;
    a.cu_q = static_cast<const int32_t*>(t.cu_q.data);
    a.cu_k = static_cast<const int32_t*>(t.cu_k.data);
    a.q_strides = {0, t.q.strides[1], t.q.strides[0]};
    a.k_strides = {0, t.k.strides[1], t.k.strides[0]};
    a.v_strides = {0, t.v.strides[1], t.v.strides[0]};
    a.out_strides = {0, a.v_depth, a.heads * a.v_depth};
    a.lse_strides = {0, 1, a.heads};
    NC_CHECK(!defined(t.bias), op, "bias must be absent with cu_seqlens, got ", shape(t.bias));
  } else {
    a.batch = t.q.sizes[0];
    a.q_strides = strides_of(t.q), a.k_strides = strides_of(t.k), a.v_strides = strides_of(t.v);
    a.out_strides = {a.heads * a.sq * a.v_depth, a.sq * a.v_depth, a.v_depth};
    a.lse_strides = {a.heads * a.sq, a.sq, 1};
  }
  if (defined(t.bias)) {
    const int64_t wanted[4] = {a.batch, a.heads, a.sq, a.sk};
    bool fits = is_floating(t.bias.dtype) && t.bias.rank <= 4;
    for (int d = 0; fits && d < t.bias.rank; ++d) {
      const int64_t n = size(t.bias, -1 - d);
      fits = n == 1 || n == wanted[3 - d];
      a.bias_strides[3 - d] = n == 1 ? 0 : stride(t.bias, -1 - d);
    }
    NC_CHECK(fits, op, "bias must be float32, float16 or bfloat16 and broadcast to [", a.batch,
             ", ", a.heads, ", ", a.sq, ", ", a.sk, "], got ", name(t.bias.dtype), " ",
             shape(t.bias));
    a.bias = t.bias.data, a.bias_dtype = t.bias.dtype;
  }
  if (defined(t.sinks)) {
    check_vector(op, "sinks", t.sinks, DType::kFloat32, a.heads);
    a.sinks = static_cast<const float*>(t.sinks.data);
  }
  a.q = t.q.data, a.k = t.k.data, a.v = t.v.data;
  a.q_dtype = a.kv_dtype = a.out_dtype = t.q.dtype;
  a.scale = checked_scale(op, o.has_scale, o.scale, o.softcap, o.window, a.depth);
  a.softcap = static_cast<float>(o.softcap);
  a.window = std::min(o.window, kMaxLength), a.causal = o.causal;
  return a;
}

// What cu_seqlens hold is only known when they are read.
inline void check_lengths(const char* op, const AttentionArgs& a) {
  if (!a.cu_q) return;
  for (const auto& [cu, total, label] :
       {std::tuple{a.cu_q, a.sq, "cu_seqlens_q"}, {a.cu_k, a.sk, "cu_seqlens_k"}}) {
    NC_CHECK(cu[0] == 0 && cu[a.batch] == total, op, label, " must go from 0 to ", total, ", got ",
             cu[0], " to ", cu[a.batch]);
    for (int64_t b = 0; b < a.batch; ++b)
      NC_CHECK(cu[b] <= cu[b + 1], op, label, " must not decrease, got ", cu[b + 1], " after ",
               cu[b]);
  }
}

}  // namespace narrowcast
