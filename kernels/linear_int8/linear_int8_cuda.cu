// linear_int8 on CUDA: where tensors stop. The private ops that the dispatcher may choose.
#include "common/stable_cuda.h"
#include "linear_int8/linear_int8_checks.h"
#include "linear_int8/linear_int8_cuda.h"

namespace narrowcast {
namespace {

using namespace linear_int8_checks;

// Both forms; out_scale 0: not requantised.
Tensor run(const char* op, const Tensor& x, const Tensor& x_scale, const Tensor& w,
           const Tensor& w_scale, const MaybeTensor& bias, const std::string& activation,
           const MaybeTensor& residual, DType out_dtype, double out_scale, int64_t out_zero_point,
           const MaybeTensor& zero, int64_t group_size, const std::string& post_activation) {
  const OnDeviceOf here(x, op, "x_q");
  Call c(op, "x_q", x, w, w_scale, bias, activation, residual, group_size, post_activation);
  const TensorView xs = c.packed(x_scale, op, "x_scale"), zp = c.packed(zero, op, "x_zero_point");
  c.o.out.dtype = out_dtype;
  LinearInt8Args a = quantised_args(op, c.o, xs, zp);
  if (out_scale != 0)
    set_requantise(op, a, out_scale, out_zero_point);
  else
    check_out_floating(op, out_dtype);
  Tensor out = empty(c.out_sizes(), out_dtype);
  a.epilogue.out = out.mutable_data_ptr();
  linear_int8_sm80(a, here.stream());
  return out;
}

Tensor linear_int8(const Tensor& x, const Tensor& x_scale, const Tensor& w, const Tensor& w_scale,
                   const MaybeTensor& bias, std::string activation, const MaybeTensor& residual,
                   std::optional<ScalarType> out_dtype, const MaybeTensor& zero, int64_t group_size,
                   std::string post_activation) {
  return run("linear_int8", x, x_scale, w, w_scale, bias, activation, residual,
             out_dtype ? dtype_of(*out_dtype) : DType::kFloat32, 0.0, 0, zero, group_size,
             post_activation);
}

Tensor linear_int8_requantize(const Tensor& x, const Tensor& x_scale, const Tensor& w,
                              const Tensor& w_scale, const MaybeTensor& bias,
                              std::string activation, const MaybeTensor& residual, double out_scale,
                              int64_t out_zero_point, ScalarType out_dtype, const MaybeTensor& zero,
                              int64_t group_size, std::string post_activation) {
  constexpr const char* op = "linear_int8_requantize";
  NC_CHECK(out_scale > 0, op, "out_scale must be positive and finite, got ", out_scale);
  return run(op, x, x_scale, w, w_scale, bias, activation, residual, dtype_of(out_dtype), out_scale,
             out_zero_point, zero, group_size, post_activation);
}

}  // namespace
}  // namespace narrowcast

STABLE_TORCH_LIBRARY_IMPL(narrowcast, CUDA, m) {
  m.impl("_linear_int8_cuda", TORCH_BOX(&narrowcast::linear_int8));
  m.impl("_linear_int8_requantize_cuda", TORCH_BOX(&narrowcast::linear_int8_requantize));
}
