// Where tensors stop: argument checks, the torch ops, the executor's steps.
#include "common/rows.h"
#include "common/stable.h"
#include "common/step.h"
#include "norm/norm.h"

namespace narrowcast {
namespace {

struct Operands {
  TensorView x, residual, weight, bias;
};

bool same_shape(const TensorView& a, const TensorView& b) {
  if (a.rank != b.rank) return false;
  for (int d = 0; d < a.rank; ++d)
    if (a.sizes[d] != b.sizes[d]) return false;
  return true;
}

void check_parameter(const char* op, const char* argument, const TensorView& t, int64_t columns) {
  NC_CHECK(!defined(t) || (is_floating(t.dtype) && t.rank == 1 && t.sizes[0] == columns), op,
           argument, " must be float32, float16 or bfloat16 [", columns, "], got ", name(t.dtype),
           " ", shape(t));
}

// Checks the operands and fills everything but the output pointers.
NormArgs norm_args(const char* op, const Operands& o, double eps, int64_t group_size, bool rms) {
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
  void into(Tensor& out) {
    const TensorView v = view(out, op, "out");
    NC_CHECK(v.dtype == a.dtype && same_shape(v, o.x), op, "out must be ", name(a.dtype), " ",
             shape(o.x), ", got ", name(v.dtype), " ", shape(v));
    NC_CHECK(is_contiguous(v), op, "out must be contiguous");
    bool apart = !may_overlap(v, o.x) && !may_overlap(v, o.weight) && !may_overlap(v, o.bias);
    for (const TensorView& source : copied) apart = apart && !may_overlap(v, source);
    NC_CHECK(apart, op, "out must not overlap another argument");
    a.y = v.data;
    norm_run(a);
  }
};

using Maybe = std::optional<Tensor>;
const Tensor* get(const Maybe& t) { return t ? &*t : nullptr; }

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
  Call("rms_norm", x, nullptr, &weight, nullptr, eps, 0, true).into(out);
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
  Call("layer_norm", x, nullptr, get(weight), get(bias), eps, 0, false).into(out);
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
