// Norms on CUDA: where tensors stop. The private ops that the dispatcher may choose. The int8 forms
// add what they find (NaNs, values not finite) to `findings`, int64 [2] on the device.
#include "common/stable_cuda.h"
#include "norm/norm_checks.h"
#include "norm/norm_cuda.h"
#include "quantize/quantize_checks.h"

namespace narrowcast {
namespace {

using namespace norm_checks;
using quantize_checks::counters;

// The public op's name, for messages; residual nullptr: none is added.
struct Form {
  const char* op;
  const Tensor &x, *residual, *weight, *bias;
  double eps;
  int64_t group_size;
  bool rms;
  Call call() const { return {op, x, residual, weight, bias, eps, group_size, rms}; }
};

Tensor plain(const Form& f) {
  const OnDeviceOf here(f.x, f.op, "x");
  Call c = f.call();
  Tensor y = c.make_y();
  norm_sm80(c.a, nullptr, here.stream());
  return y;
}
std::tuple<Tensor, Tensor> with_sum(const Form& f) {
  const OnDeviceOf here(f.x, f.op, "x");
  Call c = f.call();
  Tensor y = c.make_y(), sum = c.make_sum();
  norm_sm80(c.a, nullptr, here.stream());
  return {y, sum};
}
std::tuple<Tensor, Tensor> quantised(const Form& f, Tensor& findings) {
  const OnDeviceOf here(f.x, f.op, "x");
  Call c = f.call();
  Tensor q = c.make_q(), scale = c.make_scale(f.group_size);
  norm_sm80(c.a, counters(f.op, findings), here.stream());
  return {q, scale};
}
// The third result is the sum after the rms norm, y after the layer norm.
std::tuple<Tensor, Tensor, Tensor> quantised_sum(const Form& f, Tensor& findings) {
  const OnDeviceOf here(f.x, f.op, "x");
  Call c = f.call();
  Tensor q = c.make_q(), scale = c.make_scale(f.group_size);
  Tensor third = f.rms ? c.make_sum() : c.make_y();
  norm_sm80(c.a, counters(f.op, findings), here.stream());
  return {q, scale, third};
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  return plain({"rms_norm", x, nullptr, &weight, nullptr, eps, 0, true});
}
std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual,
                                        const Tensor& weight, double eps) {
  return with_sum({"add_rms_norm", x, &residual, &weight, nullptr, eps, 0, true});
}
std::tuple<Tensor, Tensor> rms_norm_int8(const Tensor& x, const Tensor& weight, double eps,
                                         int64_t group, Tensor findings) {
  return quantised({"rms_norm_int8", x, nullptr, &weight, nullptr, eps, group, true}, findings);
}
std::tuple<Tensor, Tensor, Tensor> add_rms_norm_int8(const Tensor& x, const Tensor& residual,
                                                     const Tensor& weight, double eps,
                                                     int64_t group, Tensor findings) {
  return quantised_sum({"add_rms_norm_int8", x, &residual, &weight, nullptr, eps, group, true},
                       findings);
}
Tensor layer_norm(const Tensor& x, const Maybe& weight, const Maybe& bias, double eps) {
  return plain({"layer_norm", x, nullptr, get(weight), get(bias), eps, 0, false});
}
std::tuple<Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& residual,
                                          const Maybe& weight, const Maybe& bias, double eps) {
  return with_sum({"add_layer_norm", x, &residual, get(weight), get(bias), eps, 0, false});
}
std::tuple<Tensor, Tensor> layer_norm_int8(const Tensor& x, const Maybe& weight, const Maybe& bias,
                                           double eps, int64_t group, Tensor findings) {
  return quantised({"layer_norm_int8", x, nullptr, get(weight), get(bias), eps, group, false},
                   findings);
}
std::tuple<Tensor, Tensor, Tensor> add_layer_norm_int8(const Tensor& x, const Tensor& residual,
                                                       const Maybe& weight, const Maybe& bias,
                                                       double eps, int64_t group, Tensor findings) {
  return quantised_sum(
      {"add_layer_norm_int8", x, &residual, get(weight), get(bias), eps, group, false}, findings);
}

}  // namespace
}  // namespace narrowcast

STABLE_TORCH_LIBRARY_IMPL(narrowcast, CUDA, m) {
  m.impl("_rms_norm_cuda", TORCH_BOX(&narrowcast::rms_norm));
  m.impl("_add_rms_norm_cuda", TORCH_BOX(&narrowcast::add_rms_norm));
  m.impl("_rms_norm_int8_cuda", TORCH_BOX(&narrowcast::rms_norm_int8));
  m.impl("_add_rms_norm_int8_cuda", TORCH_BOX(&narrowcast::add_rms_norm_int8));
  m.impl("_layer_norm_cuda", TORCH_BOX(&narrowcast::layer_norm));
  m.impl("_add_layer_norm_cuda", TORCH_BOX(&narrowcast::add_layer_norm));
  m.impl("_layer_norm_int8_cuda", TORCH_BOX(&narrowcast::layer_norm_int8));
  m.impl("_add_layer_norm_int8_cuda", TORCH_BOX(&narrowcast::add_layer_norm_int8));
}
