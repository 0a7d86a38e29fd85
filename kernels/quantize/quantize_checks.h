// The checks that every compiled backend of quantize makes: tensors in, arguments of the kernels
// out.
#pragma once
#include <cmath>

#include "common/dense.h"
#include "common/rows.h"
#include "common/stable.h"
#include "quantize/quantize.h"

namespace narrowcast::quantize_checks {

// Checks x and fills everything but the output pointers.
inline QuantizeRowsArgs rows_args(const char* op, const TensorView& x, int64_t group_size) {
  NC_CHECK(is_floating(x.dtype), op, "x must be float32, float16 or bfloat16, got ", name(x.dtype));
  NC_CHECK(x.rank >= 1, op, "x must have at least one dimension, got a scalar");
  const Rows rows = rows_of(x);
  NC_CHECK(group_size >= 0 && (group_size == 0 || rows.columns % group_size == 0), op,
           "group_size must be 0 (one scale per token) or divide the last dimension ", rows.columns,
           ", got ", group_size);
  QuantizeRowsArgs a{};
  a.x = x.data, a.rows = rows.rows, a.columns = rows.columns, a.ld_x = rows.ld;
  a.group = group_size ? group_size : rows.columns;
  a.dtype = x.dtype;
  return a;
}

inline Tensor in_rows(const char* op, const Tensor& x) {
  return has_even_rows(view(x, op, "x")) ? x : as_contiguous(x);
}

inline std::vector<int64_t> scale_sizes(const TensorView& x, int64_t group_size) {
  std::vector<int64_t> sizes(x.sizes, x.sizes + x.rank - 1);
  if (group_size) sizes.push_back(size(x, -1) / group_size);
  return sizes;
}

inline QuantizeStaticArgs static_args(const TensorView& x, double scale, int64_t zero_point,
                                      DType out) {
  constexpr const char* op = "quantize_int8_static";
  NC_CHECK(is_floating(x.dtype), op, "x must be float32, float16 or bfloat16, got ", name(x.dtype));
  NC_CHECK(out == DType::kInt8 || out == DType::kUInt8, op, "dtype must be int8 or uint8, got ",
           name(out));
  const float s = static_cast<float>(scale);
  NC_CHECK(std::isfinite(s) && std::isfinite(1.0f / s) && s != 0, op,
           "scale must be finite and not 0, got ", scale);
  const bool is_signed = out == DType::kInt8;
  NC_CHECK(zero_point >= (is_signed ? -128 : 0) && zero_point <= (is_signed ? 127 : 255), op,
           "zero_point must be a value of dtype, got ", zero_point);
  return {x.data, nullptr, numel(x), s, static_cast<int32_t>(zero_point), x.dtype, is_signed};
}

// What a GPU's quantisers found: int64 [2] that they add to.
inline int64_t* counters(const char* op, Tensor& findings) {
  const TensorView v = view(findings, op, "findings");
  NC_CHECK(v.dtype == DType::kInt64 && numel(v) == 2 && is_contiguous(v), op,
           "findings must be int64 [2], contiguous, got ", name(v.dtype), " ", shape(v));
  return static_cast<int64_t*>(findings.mutable_data_ptr());
}

}  // namespace narrowcast::quantize_checks
