// Where tensors stop: argument checks, the torch ops, the executor's steps.
#include <cmath>

#include "common/rows.h"
#include "common/stable.h"
#include "common/step.h"
#include "quantize/quantize.h"

namespace narrowcast {
namespace {

// Checks x and fills everything but the output pointers.
QuantizeRowsArgs rows_args(const char* op, const TensorView& x, int64_t group_size) {
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

void run_rows(const char* op, const QuantizeRowsArgs& a, bool strict) {
  const bool finite = quantize_rows_run(a);
  NC_CHECK(finite || !strict, op, "x must be finite (strict), got NaN or infinity");
}

Tensor in_rows(const char* op, const Tensor& x) {
  return has_even_rows(view(x, op, "x")) ? x : as_contiguous(x);
}

std::vector<int64_t> scale_sizes(const TensorView& x, int64_t group_size) {
  std::vector<int64_t> sizes(x.sizes, x.sizes + x.rank - 1);
  if (group_size) sizes.push_back(size(x, -1) / group_size);
  return sizes;
}

std::tuple<Tensor, Tensor> quantize_int8(const Tensor& x_in, int64_t group_size, bool strict) {
  constexpr const char* op = "quantize_int8";
  const Tensor x = in_rows(op, x_in);
  const TensorView v = view(x, op, "x");
  QuantizeRowsArgs a = rows_args(op, v, group_size);
  Tensor q = empty(std::vector<int64_t>(v.sizes, v.sizes + v.rank), DType::kInt8);
  Tensor scale = empty(scale_sizes(v, group_size), DType::kFloat32);
  a.q = static_cast<int8_t*>(q.mutable_data_ptr());
  a.scale = static_cast<float*>(scale.mutable_data_ptr());
  run_rows(op, a, strict);
  return {q, scale};
}

std::tuple<Tensor, Tensor, Tensor> quantize_int8_asymmetric(const Tensor& x_in, bool strict) {
  constexpr const char* op = "quantize_int8_asymmetric";
  const Tensor x = in_rows(op, x_in);
  const TensorView v = view(x, op, "x");
  QuantizeRowsArgs a = rows_args(op, v, 0);
  Tensor q = empty(std::vector<int64_t>(v.sizes, v.sizes + v.rank), DType::kInt8);
  Tensor scale = empty(scale_sizes(v, 0), DType::kFloat32);
  Tensor zero_point = empty(scale_sizes(v, 0), DType::kInt32);
  a.q = static_cast<int8_t*>(q.mutable_data_ptr());
  a.scale = static_cast<float*>(scale.mutable_data_ptr());
  a.zero_point = static_cast<int32_t*>(zero_point.mutable_data_ptr());
  run_rows(op, a, strict);
  return {q, scale, zero_point};
}

QuantizeStaticArgs static_args(const TensorView& x, double scale, int64_t zero_point, DType out) {
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

void run_static(const QuantizeStaticArgs& a, bool strict) {
  const bool finite = quantize_static_run(a);
  NC_CHECK(finite || !strict, "quantize_int8_static",
           "x must be finite (strict), got NaN or infinity");
}

// Elements fill their memory without a gap, in whatever order of dimensions (channels-last images).
bool is_dense(const TensorView& t) {
  int64_t span = 1;
  for (int d = 0; d < t.rank; ++d) {
    if (t.strides[d] < 0) return false;
    span += (t.sizes[d] - 1) * t.strides[d];
  }
  if (numel(t) == 0 || span != numel(t)) return numel(t) == 0;
  for (int a = 0; a < t.rank; ++a)  // a stride 0, or two dimensions over the same memory
    for (int b = 0; b < t.rank; ++b)
      if (t.sizes[a] > 1 &&
          (t.strides[a] == 0 || (a != b && t.sizes[b] > 1 && t.strides[a] == t.strides[b])))
        return false;
  return true;
}

Tensor quantize_int8_static(const Tensor& x_in, double scale, int64_t zero_point, ScalarType dtype,
                            bool strict) {
  constexpr const char* op = "quantize_int8_static";
  const Tensor x = is_dense(view(x_in, op, "x")) ? x_in : as_contiguous(x_in);
  const TensorView v = view(x, op, "x");
  QuantizeStaticArgs a = static_args(v, scale, zero_point, dtype_of(dtype));
  Tensor q = empty_strided(std::vector<int64_t>(v.sizes, v.sizes + v.rank),
                           std::vector<int64_t>(v.strides, v.strides + v.rank), dtype_of(dtype));
  a.q = q.mutable_data_ptr();
  run_static(a, strict);
  return q;
}

Step rows_step(const char* op, const StepSpec& s, bool asymmetric) {
  NC_CHECK(has_even_rows(s.inputs[0]), op, "x must have evenly spaced rows");
  QuantizeRowsArgs a = rows_args(op, s.inputs[0], asymmetric ? 0 : s.integer("group_size"));
  a.q = static_cast<int8_t*>(s.outputs[0].data);
  a.scale = static_cast<float*>(s.outputs[1].data);
  if (asymmetric) a.zero_point = static_cast<int32_t*>(s.outputs[2].data);
  const bool strict = s.flag("strict");
  return [op, a, strict] { run_rows(op, a, strict); };
}

const RegisterStep quantize_step("quantize_int8", [](const StepSpec& s, PackCache&) {
  return rows_step("quantize_int8", s, false);
});
const RegisterStep asymmetric_step("quantize_int8_asymmetric", [](const StepSpec& s, PackCache&) {
  return rows_step("quantize_int8_asymmetric", s, true);
});
const RegisterStep static_step("quantize_int8_static", [](const StepSpec& s, PackCache&) -> Step {
  const TensorView &x = s.inputs[0], &q = s.outputs[0];
  bool same_order = is_dense(x);
  for (int d = 0; d < x.rank; ++d)
    same_order &= x.sizes[d] == q.sizes[d] && (x.sizes[d] <= 1 || x.strides[d] == q.strides[d]);
  NC_CHECK(same_order, "quantize_int8_static", "x must be dense and laid out like the output");
  QuantizeStaticArgs a = static_args(x, s.number("scale"), s.integer("zero_point"), q.dtype);
  a.q = q.data;
  const bool strict = s.flag("strict");
  return [a, strict] { run_static(a, strict); };
});

int64_t nan_count_op(bool reset) { return nan_count(reset); }

}  // namespace
}  // namespace narrowcast

STABLE_TORCH_LIBRARY_IMPL(narrowcast, CPU, m) {
  m.impl("quantize_int8", TORCH_BOX(&narrowcast::quantize_int8));
  m.impl("quantize_int8_asymmetric", TORCH_BOX(&narrowcast::quantize_int8_asymmetric));
  m.impl("quantize_int8_static", TORCH_BOX(&narrowcast::quantize_int8_static));
}
STABLE_TORCH_LIBRARY_IMPL(narrowcast, CompositeExplicitAutograd, m) {
  m.impl("nan_count", TORCH_BOX(&narrowcast::nan_count_op));
}
