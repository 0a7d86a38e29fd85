// The checks that every compiled backend of linear_int8 makes: tensors in, LinearInt8Args out.
#pragma once
#include <cmath>

#include "common/rows.h"
#include "common/stable.h"
#include "linear_int8/linear_int8.h"

namespace narrowcast::linear_int8_checks {

// What all the forms have in common; views of tensors that the caller keeps alive.
struct Operands {
  TensorView x, w, w_scale, bias, residual, out;
  std::string activation, post_activation;
  int64_t group_size = 0;
};

inline std::string rows_shape(const TensorView& x, int64_t last) {
  TensorView expected = x;
  expected.sizes[x.rank - 1] = last;
  return shape(expected);
}

inline bool same_leading(const TensorView& a, const TensorView& b) {
  if (a.rank != b.rank) return false;
  for (int d = 0; d + 1 < a.rank; ++d)
    if (a.sizes[d] != b.sizes[d]) return false;
  return true;
}

// Everything but x's values and scales.
inline LinearInt8Args common_args(const char* op, const Operands& o) {
  NC_CHECK(o.x.rank >= 1, op, "x must be [..., K], got ", shape(o.x));
  NC_CHECK(o.w.dtype == DType::kInt8 && o.w.rank == 2, op, "w_q must be int8 [N, K], got ",
           name(o.w.dtype), " ", shape(o.w));
  LinearInt8Args a;
  const Rows x = rows_of(o.x), w = rows_of(o.w);
  a.rows = x.rows, a.depth = x.columns, a.columns = w.rows, a.group = o.group_size;
  a.ldx = x.ld, a.ldw = w.ld;
  a.w = static_cast<const int8_t*>(o.w.data);
  NC_CHECK(w.columns == a.depth, op, "w_q must be [N, K] with K = ", a.depth, ", got ", shape(o.w));
  NC_CHECK(a.group == 0 || (a.group > 0 && a.group % 32 == 0 && a.depth % a.group == 0), op,
           "group_size must be 0 or a multiple of 32 that divides K = ", a.depth, ", got ",
           a.group);
  if (a.depth == 0) a.group = 0;  // no group has a sum, but every result has a value
  NC_CHECK(o.w_scale.dtype == DType::kFloat32 &&
               (numel(o.w_scale) == 1 || (o.w_scale.rank == 1 && o.w_scale.sizes[0] == a.columns)),
           op, "w_scale must be float32 [N] = [", a.columns, "] or one number, got ",
           name(o.w_scale.dtype), " ", shape(o.w_scale));
  a.w_scale = static_cast<const float*>(o.w_scale.data);
  a.w_scale_stride = numel(o.w_scale) == 1 ? 0 : 1;

  Epilogue& e = a.epilogue;
  e.activation = parse_activation(o.activation.c_str(), op, "activation");
  e.post_activation = parse_activation(o.post_activation.c_str(), op, "post_activation");
  if (defined(o.bias)) {
    NC_CHECK(is_floating(o.bias.dtype) && o.bias.rank == 1 && o.bias.sizes[0] == a.columns, op,
             "bias must be float32, float16 or bfloat16 [N] = [", a.columns, "], got ",
             name(o.bias.dtype), " ", shape(o.bias));
    e.bias = o.bias.data, e.bias_dtype = o.bias.dtype;
  }
  if (defined(o.residual)) {
    NC_CHECK(is_floating(o.residual.dtype) && same_leading(o.residual, o.x) &&
                 size(o.residual, -1) == a.columns,
             op, "residual must be float32, float16 or bfloat16 ", rows_shape(o.x, a.columns),
             ", got ", name(o.residual.dtype), " ", shape(o.residual));
    e.residual = o.residual.data, e.residual_dtype = o.residual.dtype;
    e.ld_residual = rows_of(o.residual).ld;
  }
  e.out = o.out.data, e.out_dtype = o.out.dtype, e.ld_out = a.columns;
  if (o.out.rank >= 0) {
    NC_CHECK(same_leading(o.out, o.x) && size(o.out, -1) == a.columns, op, "out must be ",
             rows_shape(o.x, a.columns), ", got ", shape(o.out));
    NC_CHECK(is_contiguous(o.out), op, "out must be contiguous");
    const bool in_place = defined(o.residual) && o.residual.data == o.out.data &&
                          o.residual.dtype == o.out.dtype &&
                          (a.rows <= 1 || e.ld_residual == a.columns);
    NC_CHECK(!may_overlap(o.out, o.x) && !may_overlap(o.out, o.w) &&
                 !may_overlap(o.out, o.w_scale) && !may_overlap(o.out, o.bias) &&
                 (in_place || !may_overlap(o.out, o.residual)),
             op, "out must not overlap another argument");
  }
  return a;
}

inline LinearInt8Args quantised_args(const char* op, const Operands& o, const TensorView& x_scale,
                                     const TensorView& zero) {
  NC_CHECK(o.x.dtype == DType::kInt8, op, "x_q must be int8, got ", name(o.x.dtype));
  LinearInt8Args a = common_args(op, o);
  a.x = static_cast<const int8_t*>(o.x.data);
  const int64_t groups = o.group_size ? a.depth / o.group_size : 1;
  const std::string per_row = rows_shape(o.x, groups);
  NC_CHECK(x_scale.dtype == DType::kFloat32, op, "x_scale must be float32, got ",
           name(x_scale.dtype));
  if (o.group_size) {
    NC_CHECK(same_leading(x_scale, o.x) && size(x_scale, -1) == groups, op,
             "x_scale must be [..., K / group_size] = ", per_row, ", got ", shape(x_scale));
    a.x_scale_stride = groups;
  } else {
    // Per token the last dimension may be left out, as quantize_int8 does.
    TensorView tokens = o.x;
    tokens.rank -= 1;
    bool matches = x_scale.rank == tokens.rank;
    for (int d = 0; matches && d < tokens.rank; ++d) matches = x_scale.sizes[d] == tokens.sizes[d];
    matches = matches || (same_leading(x_scale, o.x) && size(x_scale, -1) == 1);
    NC_CHECK(matches || numel(x_scale) == 1, op, "x_scale must be ", shape(tokens),
             " (per token) or one number, got ", shape(x_scale));
    a.x_scale_stride = numel(x_scale) == 1 ? 0 : 1;
  }
  a.x_scale = static_cast<const float*>(x_scale.data);
  static const float one = 1.0f;
  if (groups == 0) a.x_scale = &one, a.x_scale_stride = 0;
  if (defined(zero)) {
    NC_CHECK(o.group_size == 0, op, "x_zero_point must be absent when group_size is set");
    NC_CHECK(zero.dtype == DType::kInt32 && numel(zero) == a.rows, op,
             "x_zero_point must be int32 with one value per token, got ", name(zero.dtype), " ",
             shape(zero));
    a.x_zero_point = static_cast<const int32_t*>(zero.data);
  }
  return a;
}

inline void check_out_floating(const char* op, DType dtype) {
  NC_CHECK(is_floating(dtype), op, "out_dtype must be float32, float16 or bfloat16, got ",
           name(dtype));
}

inline void set_requantise(const char* op, LinearInt8Args& a, double out_scale,
                           int64_t out_zero_point) {
  const DType dtype = a.epilogue.out_dtype;
  NC_CHECK(dtype == DType::kInt8 || dtype == DType::kUInt8, op,
           "out_dtype must be int8 or uint8, got ", name(dtype));
  a.epilogue.out_scale = static_cast<float>(out_scale);
  NC_CHECK(std::isfinite(a.epilogue.out_scale) && std::isfinite(1.0f / a.epilogue.out_scale) &&
               a.epilogue.out_scale > 0,
           op, "out_scale must be positive and finite, and so its inverse, got ", out_scale);
  const int64_t low = dtype == DType::kInt8 ? -128 : 0;
  NC_CHECK(out_zero_point >= low && out_zero_point <= low + 255, op,
           "out_zero_point must be within ", low, " and ", low + 255, ", got ", out_zero_point);
  a.epilogue.out_zero_point = static_cast<int32_t>(out_zero_point);
}

// The tensors of one eager call, brought into a form that the kernels read.
struct Call {
  std::vector<Tensor> kept;
  std::vector<TensorView> copied;  // what `kept` was copied from
  Operands o;
  TensorView x_scale, zero;

  TensorView matrix(const Tensor& t, const char* op, const char* argument) {
    const TensorView v = view(t, op, argument);
    if (has_even_rows(v) || v.rank < 1) return v;
    copied.push_back(v);
    kept.push_back(torch::stable::contiguous(t));
    return view(kept.back(), op, argument);
  }
  TensorView packed(const std::optional<Tensor>& t, const char* op, const char* argument) {
    if (!t) return {};
    const TensorView v = view(*t, op, argument);
    if (is_contiguous(v)) return v;
    copied.push_back(v);
    kept.push_back(torch::stable::contiguous(*t));
    return view(kept.back(), op, argument);
  }
  Call(const char* op, const char* x_name, const Tensor& x, const std::optional<Tensor>& w,
       const Tensor& w_scale, const std::optional<Tensor>& bias, const std::string& activation,
       const std::optional<Tensor>& residual, int64_t group_size,
       const std::string& post_activation) {
    o.x = matrix(x, op, x_name);
    if (w) o.w = matrix(*w, op, "w_q");
    o.w_scale = packed(w_scale, op, "w_scale");
    o.bias = packed(bias, op, "bias");
    if (residual) o.residual = matrix(*residual, op, "residual");
    o.activation = activation, o.post_activation = post_activation, o.group_size = group_size;
  }
  // The views that are read were checked already; a copy hides what it came from.
  void check_apart(const char* op) const {
    for (const TensorView& source : copied)
      NC_CHECK(!may_overlap(o.out, source), op, "out must not overlap another argument");
  }
  std::vector<int64_t> out_sizes() const {
    std::vector<int64_t> sizes(o.x.sizes, o.x.sizes + std::max(o.x.rank, 0));
    if (!sizes.empty()) sizes.back() = o.w.sizes[0];
    return sizes;
  }
};

using MaybeTensor = std::optional<Tensor>;

}  // namespace narrowcast::linear_int8_checks
