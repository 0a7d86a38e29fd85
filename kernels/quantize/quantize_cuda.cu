// quantize on CUDA: where tensors stop. The private ops that the dispatcher may choose. What they
// find (NaNs, values not finite) is added to `findings`, int64 [2] on the device: no op waits for
// the GPU.
#include "common/stable_cuda.h"
#include "quantize/quantize_checks.h"
#include "quantize/quantize_cuda.h"

namespace narrowcast {
namespace {

using namespace quantize_checks;

std::vector<int64_t> sizes_of(const TensorView& v) { return {v.sizes, v.sizes + v.rank}; }

std::tuple<Tensor, Tensor> quantize_int8(const Tensor& x_in, int64_t group_size, Tensor findings) {
  constexpr const char* op = "quantize_int8";
  const OnDeviceOf here(x_in, op, "x");
  const Tensor x = in_rows(op, x_in);
  const TensorView v = view(x, op, "x");
  QuantizeRowsArgs a = rows_args(op, v, group_size);
  Tensor q = empty(sizes_of(v), DType::kInt8);
  Tensor scale = empty(scale_sizes(v, group_size), DType::kFloat32);
  a.q = static_cast<int8_t*>(q.mutable_data_ptr());
  a.scale = static_cast<float*>(scale.mutable_data_ptr());
  quantize_rows_sm80(a, counters(op, findings), here.stream());
  return {q, scale};
}

std::tuple<Tensor, Tensor, Tensor> quantize_int8_asymmetric(const Tensor& x_in, Tensor findings) {
  constexpr const char* op = "quantize_int8_asymmetric";
  const OnDeviceOf here(x_in, op, "x");
  const Tensor x = in_rows(op, x_in);
  const TensorView v = view(x, op, "x");
  QuantizeRowsArgs a = rows_args(op, v, 0);
  Tensor q = empty(sizes_of(v), DType::kInt8);
  Tensor scale = empty(scale_sizes(v, 0), DType::kFloat32);
  Tensor zero_point = empty(scale_sizes(v, 0), DType::kInt32);
  a.q = static_cast<int8_t*>(q.mutable_data_ptr());
  a.scale = static_cast<float*>(scale.mutable_data_ptr());
  a.zero_point = static_cast<int32_t*>(zero_point.mutable_data_ptr());
  quantize_rows_sm80(a, counters(op, findings), here.stream());
  return {q, scale, zero_point};
}

Tensor quantize_int8_static(const Tensor& x_in, double scale, int64_t zero_point, ScalarType dtype,
                            Tensor findings) {
  constexpr const char* op = "quantize_int8_static";
  const OnDeviceOf here(x_in, op, "x");
  const Tensor x = is_dense(view(x_in, op, "x")) ? x_in : as_contiguous(x_in);
  const TensorView v = view(x, op, "x");
  QuantizeStaticArgs a = static_args(v, scale, zero_point, dtype_of(dtype));
  Tensor q = empty_strided(sizes_of(v), {v.strides, v.strides + v.rank}, dtype_of(dtype));
  a.q = q.mutable_data_ptr();
  quantize_static_sm80(a, counters(op, findings), here.stream());
  return q;
}

}  // namespace
}  // namespace narrowcast

STABLE_TORCH_LIBRARY_IMPL(narrowcast, CUDA, m) {
  m.impl("_quantize_int8_cuda", TORCH_BOX(&narrowcast::quantize_int8));
  m.impl("_quantize_int8_asymmetric_cuda", TORCH_BOX(&narrowcast::quantize_int8_asymmetric));
  m.impl("_quantize_int8_static_cuda", TORCH_BOX(&narrowcast::quantize_int8_static));
}
