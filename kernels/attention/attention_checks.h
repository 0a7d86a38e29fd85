// Argument checks that attention and attention_decode share. Not for ISA files.
#pragma once
#include "attention/attention.h"
#include "common/check.h"
#include "common/rows.h"
#include "common/tensor.h"

namespace narrowcast {

constexpr int64_t kMaxLength = int64_t{1} << 30;  // key numbers are int32 in the kernels

inline bool last_is_dense(const TensorView& t) {
  return numel(t) == 0 || size(t, -1) == 1 || stride(t, -1) == 1;
}

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
  NC_CHECK(softcap >= 0 && softcap < 1e30, op, "softcap must be 0 (none) or positive, got ",
           softcap);
  NC_CHECK(window >= 0, op, "window must be 0 (none) or positive, got ", window);
  if (!given)
    return static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(depth ? depth : 1)));
  NC_CHECK(scale == scale && scale < 1e30 && scale > -1e30, op, "scale must be finite, got ",
           scale);
  return static_cast<float>(scale);
}

}  // namespace narrowcast
