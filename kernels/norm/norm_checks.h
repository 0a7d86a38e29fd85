// The checks that every compiled backend of the norms makes: tensors in, NormArgs out.
#pragma once
#include "common/rows.h"
#include "common/stable.h"
#include "norm/norm.h"

namespace narrowcast::norm_checks {

struct Operands {
  TensorView x, residual, weight, bias;
};

inline bool same_shape(const TensorView& a, const TensorView& b) {
  if (a.rank != b.rank) return false;
  for (int d = 0; d < a.rank; ++d)
    if (a.sizes[d] != b.sizes[d]) return false;
  return true;
}

inline void check_parameter(const char* op, const char* argument, const TensorView& t,
                            int64_t columns) {
  NC_CHECK(!defined(t) || (is_floating(t.dtype) && t.rank == 1 && t.sizes[0] == columns), op,
           argument, " must be float32, float16 or bfloat16 [", columns, "], got ", name(t.dtype),
           " ", shape(t));
}

// Checks the operands and fills everything but the output pointers.
inline NormArgs norm_args(const char* op, const Operands& o, double eps, int64_t group_size,
                          bool rms) {
  NC_CHECK(is_floating(o.x.dtype) && o.x.rank >= 1, op,
           "x must be float32, float16 or bfloat16 [..., K], got ", name(o.x.dtype), " ",
           shape(o.x));
  const Rows rows = rows_of(o.x);
  NC_CHECK(!defined(o.residual) || (o.residual.dtype == o.x.dtype && same_shape(o.residual, o.x)),
           op, "residual must have the dtype and shape of x, ", name(o.x.dtype), " ", shape(o.x),
           ", got ", name(o.residual.dtype), " ", shape(o.residual));
  check_parameter(op, "weight", o.weight, rows.columns);
  check_parameter(op, "bias", o.bias, rows.columns);
  NC_CHECK(!defined(o.weight) || !defined(o.bias) || o.weight.dtype == o.bias.dtype, op,
           "bias must have the dtype of weight, ", name(o.weight.dtype), ", got ",
           name(o.bias.dtype));
  NC_CHECK(eps >= 0, op, "eps must not be negative, got ", eps);
  NC_CHECK(group_size >= 0 && (group_size == 0 || rows.columns % group_size == 0), op,
           "group_size must be 0 (one scale per token) or divide the last dimension ", rows.columns,
           ", got ", group_size);
  NormArgs a{};
  a.x = o.x.data, a.rows = rows.rows, a.columns = rows.columns, a.ld_x = rows.ld;
  if (defined(o.residual)) a.residual = o.residual.data, a.ld_residual = rows_of(o.residual).ld;
  if (defined(o.weight)) a.weight = o.weight.data, a.parameter_dtype = o.weight.dtype;
  if (defined(o.bias)) a.bias = o.bias.data, a.parameter_dtype = o.bias.dtype;
  a.group = group_size ? group_size : rows.columns;
  a.eps = static_cast<float>(eps), a.rms = rms, a.dtype = o.x.dtype;
  return a;
}

// One eager call: its operands made readable, its results made as they are asked for.
struct Call {
  const char* op;
  std::vector<Tensor> kept;
  std::vector<TensorView> copied;  // what `kept` was copied from
  Operands o;
  NormArgs a;
  std::vector<int64_t> sizes;

  TensorView readable(const Tensor& t, const char* argument, bool packed) {
    const TensorView v = view(t, op, argument);
    if (v.rank < 1 || (packed ? is_contiguous(v) : has_even_rows(v))) return v;
    copied.push_back(v);
    kept.push_back(as_contiguous(t));
    return view(kept.back(), op, argument);
  }

  Call(const char* name, const Tensor& x, const Tensor* residual, const Tensor* weight,
       const Tensor* bias, double eps, int64_t group_size, bool rms)
      : op(name) {
    o.x = readable(x, "x", false);
    if (residual) o.residual = readable(*residual, "residual", false);
    if (weight) o.weight = readable(*weight, "weight", true);
    if (bias) o.bias = readable(*bias, "bias", true);
    a = norm_args(op, o, eps, group_size, rms);
    sizes.assign(o.x.sizes, o.x.sizes + o.x.rank);
  }

  Tensor make_y() { return make(a.y, sizes, a.dtype); }
  Tensor make_sum() { return make(a.sum, sizes, a.dtype); }
  Tensor make_q() {
    void* q;
    Tensor t = make(q, sizes, DType::kInt8);
    a.q = static_cast<int8_t*>(q);
    return t;
  }
  Tensor make_scale(int64_t group_size) {
    std::vector<int64_t> shape(sizes.begin(), sizes.end() - 1);
    if (group_size) shape.push_back(sizes.back() / group_size);
    void* scale;
    Tensor t = make(scale, shape, DType::kFloat32);
    a.scale = static_cast<float*>(scale);
    return t;
  }
  Tensor make(void*& data, const std::vector<int64_t>& shape, DType dtype) {
    Tensor t = empty(shape, dtype);
    data = t.mutable_data_ptr();
    return t;
  }
};

using Maybe = std::optional<Tensor>;
inline const Tensor* get(const Maybe& t) { return t ? &*t : nullptr; }

}  // namespace narrowcast::norm_checks
