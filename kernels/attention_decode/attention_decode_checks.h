// The checks that every compiled backend of attention_decode makes: tensors in, its arguments out.
#pragma once
#include "attention/attention_call_checks.h"
#include "attention_decode/attention_decode.h"
#include "common/hadamard.h"

namespace narrowcast::attention_decode_checks {

constexpr const char* kOp = "attention_decode";

struct Operands {
  TensorView q, k_cache, v_cache, lengths, k_scale, v_scale, block_table, sinks;
};

inline AttentionStrides scale_strides(const char* argument, const TensorView& scale,
                                      const TensorView& cache) {
  bool fits = scale.dtype == DType::kFloat32 && scale.rank == 3;
  for (int d = 0; fits && d < 3; ++d) fits = scale.sizes[d] == cache.sizes[d];
  NC_CHECK(fits, kOp, argument, " must be float32 of the shape of its int8 cache without D, ",
           shape(cache), ", got ", name(scale.dtype), " ", shape(scale));
  return strides_of(scale);
}

// Where the grids of 4-bit codes lie, strides in pairs of bfloat16.
inline const uint32_t* grids(const char* argument, const TensorView& t, const TensorView& cache,
                             AttentionStrides* strides) {
  bool fits = t.dtype == DType::kBFloat16 && t.rank == 4 && has_dense_rows(t) &&
              t.sizes[3] == cache.sizes[3] / 8 && reinterpret_cast<uintptr_t>(t.data) % 4 == 0;
  for (int d = 0; fits && d < 3; ++d)
    fits = t.sizes[d] == cache.sizes[d] && (t.strides[d] % 2 == 0 || t.sizes[d] <= 1);
  NC_CHECK(fits, kOp, argument,
           " must be bfloat16 [.., D / 16], steps and minima of the groups of ", "its uint8 cache ",
           shape(cache), ", got ", name(t.dtype), " ", shape(t));
  *strides = {t.strides[0] / 2, t.strides[1] / 2, t.strides[2] / 2};
  return static_cast<const uint32_t*>(t.data);
}

inline AttentionDecodeArgs decode_args(const Operands& t, bool has_scale, double scale,
                                       int64_t window, double softcap) {
  check_floating(kOp, "q", t.q, 4, "[B, Hq, Sq, D]");
  const bool paged = defined(t.block_table);
  const char* form = paged ? "[P, Hkv, page, D]" : "[B, Hkv, C, D]";
  const bool nibbles = t.k_cache.dtype == DType::kUInt8;
  NC_CHECK((is_floating(t.k_cache.dtype) || t.k_cache.dtype == DType::kInt8 || nibbles) &&
               t.k_cache.rank == 4,
           kOp, "k_cache must be float32, float16, bfloat16, int8 or uint8 ", form, ", got ",
           name(t.k_cache.dtype), " ", shape(t.k_cache));
  bool same = t.v_cache.dtype == t.k_cache.dtype && t.v_cache.rank == 4;
  for (int d = 0; same && d < 4; ++d) same = t.v_cache.sizes[d] == t.k_cache.sizes[d];
  NC_CHECK(same, kOp, "v_cache must have the dtype and shape of k_cache, ", name(t.k_cache.dtype),
           " ", shape(t.k_cache), ", got ", name(t.v_cache.dtype), " ", shape(t.v_cache));
  AttentionDecodeArgs args = {};
  AttentionArgs& a = args.attention;
  a.batch = t.q.sizes[0], a.heads = t.q.sizes[1], a.sq = t.q.sizes[2];
  a.kv_heads = t.k_cache.sizes[1], a.depth = a.v_depth = t.q.sizes[3];
  NC_CHECK(!nibbles || has_nibble_rows(a.depth), kOp,
           "k_cache must have a head size of 32, 64, 128 or 256 for 4-bit codes (uint8), got ",
           a.depth);
  NC_CHECK(
      t.k_cache.sizes[3] * (nibbles ? 2 : 1) == a.depth && (paged || t.k_cache.sizes[0] == a.batch),
      kOp, "k_cache must have the batch and head size of q, ", shape(t.q), ", got ",
      shape(t.k_cache));
  NC_CHECK(a.kv_heads > 0 ? a.heads % a.kv_heads == 0 : a.heads == 0, kOp,
           "k_cache must have a number of heads that divides that of q, ", a.heads, ", got ",
           a.kv_heads);
  NC_CHECK(has_dense_rows(t.q), kOp, "q must have stride 1 in the last dimension, got ",
           stride(t.q, -1));
  NC_CHECK(has_dense_rows(t.k_cache) && has_dense_rows(t.v_cache), kOp,
           "k_cache and v_cache must have stride 1 in the last dimension");
  check_vector(kOp, "lengths", t.lengths, DType::kInt32, a.batch);
  args.capacity = t.k_cache.sizes[2];
  if (paged) {
    NC_CHECK(t.block_table.dtype == DType::kInt32 && t.block_table.rank == 2 &&
                 t.block_table.sizes[0] == a.batch && is_contiguous(t.block_table),
             kOp, "block_table must be contiguous int32 [B, pages], got ",
             name(t.block_table.dtype), " ", shape(t.block_table));
    a.page_size = t.k_cache.sizes[2], a.table_stride = t.block_table.sizes[1];
    a.block_table = static_cast<const int32_t*>(t.block_table.data);
    args.pages = t.k_cache.sizes[0];
    NC_CHECK(a.table_stride < kMaxLength && a.page_size < kMaxLength, kOp,
             "block_table must describe fewer than 2^30 keys");
    args.capacity = a.page_size * a.table_stride;
    static const int32_t none = 0;  // an empty table is a table
    if (!a.block_table) a.block_table = &none;
  }
  NC_CHECK(args.capacity < kMaxLength && a.sq < kMaxLength, kOp,
           "k_cache must be shorter than 2^30, got ", args.capacity);
  if (t.k_cache.dtype == DType::kInt8) {
    NC_CHECK(defined(t.k_scale) && defined(t.v_scale), kOp,
             "k_scale and v_scale must be given for int8 caches");
    a.k_scale_strides = scale_strides("k_scale", t.k_scale, t.k_cache);
    a.v_scale_strides = scale_strides("v_scale", t.v_scale, t.v_cache);
    a.k_scale = static_cast<const float*>(t.k_scale.data);
    a.v_scale = static_cast<const float*>(t.v_scale.data);
  } else if (nibbles) {
    NC_CHECK(defined(t.k_scale) && defined(t.v_scale), kOp,
             "k_scale and v_scale must be given for uint8 caches");
    a.k_pairs = grids("k_scale", t.k_scale, t.k_cache, &a.k_scale_strides);
    a.v_pairs = grids("v_scale", t.v_scale, t.v_cache, &a.v_scale_strides);
  } else {
    NC_CHECK(!defined(t.k_scale) && !defined(t.v_scale), kOp,
             "k_scale and v_scale must be absent for ", name(t.k_cache.dtype), " caches");
  }
  if (defined(t.sinks)) {
    check_vector(kOp, "sinks", t.sinks, DType::kFloat32, a.heads);
    a.sinks = static_cast<const float*>(t.sinks.data);
  }
  a.scale = checked_scale(kOp, has_scale, scale, softcap, window, a.depth);
  a.softcap = static_cast<float>(softcap);
  a.window = std::min(window, kMaxLength), a.causal = true;
  a.q = t.q.data, a.k = t.k_cache.data, a.v = t.v_cache.data;
  a.lengths = static_cast<const int32_t*>(t.lengths.data);
  a.q_dtype = a.out_dtype = t.q.dtype, a.kv_dtype = t.k_cache.dtype;
  a.q_strides = strides_of(t.q);
  a.k_strides = strides_of(t.k_cache), a.v_strides = strides_of(t.v_cache);
  a.out_strides = {a.heads * a.sq * a.depth, a.sq * a.depth, a.depth};
  return args;
}

#define NC_DECODE_PARAMETERS                                                            \
  const Tensor &q_in, const Tensor &k_cache_in, const Tensor &v_cache_in,               \
      const Tensor &lengths_in, const std::optional<Tensor>&k_scale,                    \
      const std::optional<Tensor>&v_scale, std::optional<double> scale, int64_t window, \
      double softcap, const std::optional<Tensor>&block_table_in,                       \
      const std::optional<Tensor>&sinks_in

#define NC_DECODE_ARGUMENTS                                                           \
  q_in, k_cache_in, v_cache_in, lengths_in, k_scale, v_scale, scale, window, softcap, \
      block_table_in, sinks_in

// The tensors of one eager call, brought into a form that the kernels read.
struct DecodeCall {
  Tensor q, k_cache, v_cache, lengths;
  std::optional<Tensor> block_table, sinks;
  AttentionDecodeArgs args;

  DecodeCall(NC_DECODE_PARAMETERS)
      : q((view(q_in, kOp, "q"), dense_rows(q_in))),
        k_cache((view(k_cache_in, kOp, "k_cache"), dense_rows(k_cache_in))),
        v_cache((view(v_cache_in, kOp, "v_cache"), dense_rows(v_cache_in))),
        lengths((view(lengths_in, kOp, "lengths"), as_contiguous(lengths_in))),
        block_table((view(block_table_in, kOp, "block_table"), contiguous_if(block_table_in))),
        sinks((view(sinks_in, kOp, "sinks"), contiguous_if(sinks_in))),
        args(decode_args({view(q, kOp, "q"), view(k_cache, kOp, "k_cache"),
                          view(v_cache, kOp, "v_cache"), view(lengths, kOp, "lengths"),
                          view(k_scale, kOp, "k_scale"), view(v_scale, kOp, "v_scale"),
                          view(block_table, kOp, "block_table"), view(sinks, kOp, "sinks")},
                         scale.has_value(), scale.value_or(0.0), window, softcap)) {}

  Tensor new_out() const {
    const TensorView v = view(q, kOp, "q");
    return empty(std::vector<int64_t>(v.sizes, v.sizes + v.rank), v.dtype);
  }
};

}  // namespace narrowcast::attention_decode_checks
