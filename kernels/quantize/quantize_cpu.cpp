// Where tensors stop: argument checks, the torch ops, the executor's steps.
#include "common/step.h"
#include "quantize/quantize_checks.h"

namespace narrowcast {
namespace {

using namespace quantize_checks;

void run_rows(const char* op, const QuantizeRowsArgs& a, bool strict) {
  const bool finite = quantize_rows_run(a);
  NC_CHECK(finite || !strict, op, "x must be finite (strict), got NaN or infinity");
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

void run_static(const QuantizeStaticArgs& a, bool strict) {
  const bool finite = quantize_static_run(a);
  NC_CHECK(finite || !strict, "quantize_int8_static",
           "x must be finite (strict), got NaN or infinity");
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
  NC_CHECK(same_dense_layout(x, q), "quantize_int8_static",
           "x must be dense and laid out like the output");
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
