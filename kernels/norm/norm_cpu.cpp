// Where tensors stop: argument checks, the torch ops, the executor's steps.
#include "common/step.h"
#include "norm/norm_checks.h"

namespace narrowcast {
namespace {

using namespace norm_checks;

void into(Call c, Tensor& out) {
  const TensorView v = view(out, c.op, "out");
  NC_CHECK(v.dtype == c.a.dtype && same_shape(v, c.o.x), c.op, "out must be ", name(c.a.dtype), " ",
           shape(c.o.x), ", got ", name(v.dtype), " ", shape(v));
  NC_CHECK(is_contiguous(v), c.op, "out must be contiguous");
  bool apart = !may_overlap(v, c.o.x) && !may_overlap(v, c.o.weight) && !may_overlap(v, c.o.bias);
  for (const TensorView& source : c.copied) apart = apart && !may_overlap(v, source);
  NC_CHECK(apart, c.op, "out must not overlap another argument");
  c.a.y = v.data;
  norm_run(c.a);
}

Tensor plain(Call c) {
  Tensor y = c.make_y();
  norm_run(c.a);
  return y;
}
std::tuple<Tensor, Tensor> with_sum(Call c) {
  Tensor y = c.make_y(), sum = c.make_sum();
  norm_run(c.a);
  return {y, sum};
}
std::tuple<Tensor, Tensor> quantised(Call c, int64_t group_size) {
  Tensor q = c.make_q(), scale = c.make_scale(group_size);
  norm_run(c.a);
  return {q, scale};
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  return plain({"rms_norm", x, nullptr, &weight, nullptr, eps, 0, true});
}
void rms_norm_out(const Tensor& x, const Tensor& weight, double eps, Tensor out) {
  into({"rms_norm", x, nullptr, &weight, nullptr, eps, 0, true}, out);
}
std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual,
                                        const Tensor& weight, double eps) {
  return with_sum({"add_rms_norm", x, &residual, &weight, nullptr, eps, 0, true});
}
std::tuple<Tensor, Tensor> rms_norm_int8(const Tensor& x, const Tensor& weight, double eps,
                                         int64_t group_size) {
  return quantised({"rms_norm_int8", x, nullptr, &weight, nullptr, eps, group_size, true},
                   group_size);
}
std::tuple<Tensor, Tensor, Tensor> add_rms_norm_int8(const Tensor& x, const Tensor& residual,
                                                     const Tensor& weight, double eps,
                                                     int64_t group_size) {
  Call c("add_rms_norm_int8", x, &residual, &weight, nullptr, eps, group_size, true);
  Tensor q = c.make_q(), scale = c.make_scale(group_size), sum = c.make_sum();
  norm_run(c.a);
  return {q, scale, sum};
}

Tensor layer_norm(const Tensor& x, const Maybe& weight, const Maybe& bias, double eps) {
  return plain({"layer_norm", x, nullptr, get(weight), get(bias), eps, 0, false});
}
void layer_norm_out(const Tensor& x, const Maybe& weight, const Maybe& bias, double eps,
                    Tensor out) {
  into({"layer_norm", x, nullptr, get(weight), get(bias), eps, 0, false}, out);
}
std::tuple<Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& residual,
                                          const Maybe& weight, const Maybe& bias, double eps) {
  return with_sum({"add_layer_norm", x, &residual, get(weight), get(bias), eps, 0, false});
}
std::tuple<Tensor, Tensor> layer_norm_int8(const Tensor& x, const Maybe& weight, const Maybe& bias,
                                           double eps, int64_t group_size) {
  return quantised({"layer_norm_int8", x, nullptr, get(weight), get(bias), eps, group_size, false},
                   group_size);
}
std::tuple<Tensor, Tensor, Tensor> add_layer_norm_int8(const Tensor& x, const Tensor& residual,
                                                       const Maybe& weight, const Maybe& bias,
                                                       double eps, int64_t group_size) {
  Call c("add_layer_norm_int8", x, &residual, get(weight), get(bias), eps, group_size, false);
  Tensor q = c.make_q(), scale = c.make_scale(group_size), y = c.make_y();
  norm_run(c.a);
  return {q, scale, y};
}

// inputs: x, [residual], weight, [bias]; outputs as the schema returns them.
template <bool kAdd, bool kRms, bool kInt8>
Step norm_step(const StepSpec& s, PackCache&) {
  const char* op = s.op.c_str();
  Operands o;
  size_t next = 0;
  o.x = s.inputs[next++];
  if (kAdd) o.residual = s.inputs[next++];
  o.weight = s.inputs[next++];
  if (!kRms) o.bias = s.inputs[next++];
  NC_CHECK(has_even_rows(o.x) && (!kAdd || has_even_rows(o.residual)), op,
           "x and residual must have adjacent elements and evenly spaced rows in a plan");
  NC_CHECK((!defined(o.weight) || o.weight.rank != 1 || is_contiguous(o.weight)) &&
               (!defined(o.bias) || o.bias.rank != 1 || is_contiguous(o.bias)),
           op, "weight and bias must be contiguous in a plan");
  NormArgs a = norm_args(op, o, s.number("eps"), s.integer("group_size"), kRms);
  if (kInt8) {
    a.q = static_cast<int8_t*>(s.outputs[0].data);
    a.scale = static_cast<float*>(s.outputs[1].data);
    if (kAdd) (kRms ? a.sum : a.y) = s.outputs[2].data;
  } else {
    a.y = s.outputs[0].data;
    if (kAdd) a.sum = s.outputs[1].data;
  }
  return [a] { norm_run(a); };
}

const RegisterStep steps[] = {
    {"rms_norm", norm_step<false, true, false>},
    {"add_rms_norm", norm_step<true, true, false>},
    {"rms_norm_int8", norm_step<false, true, true>},
    {"add_rms_norm_int8", norm_step<true, true, true>},
    {"layer_norm", norm_step<false, false, false>},
    {"add_layer_norm", norm_step<true, false, false>},
    {"layer_norm_int8", norm_step<false, false, true>},
    {"add_layer_norm_int8", norm_step<true, false, true>},
};

}  // namespace
}  // namespace narrowcast

STABLE_TORCH_LIBRARY_IMPL(narrowcast, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&narrowcast::rms_norm));
  m.impl("rms_norm.out", TORCH_BOX(&narrowcast::rms_norm_out));
  m.impl("add_rms_norm", TORCH_BOX(&narrowcast::add_rms_norm));
  m.impl("rms_norm_int8", TORCH_BOX(&narrowcast::rms_norm_int8));
  m.impl("add_rms_norm_int8", TORCH_BOX(&narrowcast::add_rms_norm_int8));
  m.impl("layer_norm", TORCH_BOX(&narrowcast::layer_norm));
  m.impl("layer_norm.out", TORCH_BOX(&narrowcast::layer_norm_out));
  m.impl("add_layer_norm", TORCH_BOX(&narrowcast::add_layer_norm));
  m.impl("layer_norm_int8", TORCH_BOX(&narrowcast::layer_norm_int8));
  m.impl("add_layer_norm_int8", TORCH_BOX(&narrowcast::add_layer_norm_int8));
}
