// Where tensors stop: argument checks, the torch ops, the executor's steps.
#include "common/rows.h"
#include "common/stable.h"
#include "common/step.h"
#include "gated_act/gated_act.h"

namespace narrowcast {
namespace {

bool same_shape(const TensorView& a, const TensorView& b) {
  if (a.rank != b.rank) return false;
  for (int d = 0; d < a.rank; ++d)
    if (a.sizes[d] != b.sizes[d]) return false;
  return true;
}

Activation gelu_form(const char* op, const std::string& approximate) {
  NC_CHECK(approximate == "none" || approximate == "tanh", op,
           "approximate must be none or tanh, got '", approximate, "'");
  return approximate == "tanh" ? Activation::kGeluTanh : Activation::kGelu;
}

// Checks the operands and fills everything but the output pointers.
GatedActArgs gated_args(const char* op, const TensorView& gate, const TensorView& up,
                        Activation activation, int64_t group_size) {
  NC_CHECK(is_floating(gate.dtype) && gate.rank >= 1, op,
           "gate must be float32, float16 or bfloat16 [..., K], got ", name(gate.dtype), " ",
           shape(gate));
  NC_CHECK(up.dtype == gate.dtype && same_shape(up, gate), op,
           "up must have the dtype and shape of gate, ", name(gate.dtype), " ", shape(gate),
           ", got ", name(up.dtype), " ", shape(up));
  const Rows rows = rows_of(gate);
  NC_CHECK(group_size >= 0 && (group_size == 0 || rows.columns % group_size == 0), op,
           "group_size must be 0 (one scale per token) or divide the last dimension ", rows.columns,
           ", got ", group_size);
  GatedActArgs a{};
  a.gate = gate.data, a.up = up.data, a.rows = rows.rows, a.columns = rows.columns;
  a.ld_gate = rows.ld, a.ld_up = rows_of(up).ld;
  a.group = group_size ? group_size : rows.columns;
  a.activation = activation, a.dtype = gate.dtype;
  return a;
}

// One eager call with its operands made readable.
struct Call {
  const char* op;
  std::vector<Tensor> kept;
  std::vector<TensorView> copied;  // what `kept` was copied from
  TensorView gate, up;
  GatedActArgs a;
  std::vector<int64_t> sizes;

  TensorView readable(const Tensor& t, const char* argument) {
    const TensorView v = view(t, op, argument);
    if (v.rank < 1 || has_even_rows(v)) return v;
    copied.push_back(v);
    kept.push_back(as_contiguous(t));
    return view(kept.back(), op, argument);
  }

  Call(const char* name, const Tensor& gate_in, const Tensor& up_in, Activation activation,
       int64_t group_size)
      : op(name), gate(readable(gate_in, "gate")), up(readable(up_in, "up")) {
    a = gated_args(op, gate, up, activation, group_size);
    sizes.assign(gate.sizes, gate.sizes + gate.rank);
  }

  Tensor plain() {
    Tensor y = empty(sizes, a.dtype);
    a.y = y.mutable_data_ptr();
    gated_act_run(a);
    return y;
  }

  void into(Tensor& out) {
    const TensorView v = view(out, op, "out");
    NC_CHECK(v.dtype == a.dtype && same_shape(v, gate), op, "out must be ", name(a.dtype), " ",
             shape(gate), ", got ", name(v.dtype), " ", shape(v));
    NC_CHECK(is_contiguous(v), op, "out must be contiguous");
    bool apart = !may_overlap(v, gate) && !may_overlap(v, up);
    for (const TensorView& source : copied) apart = apart && !may_overlap(v, source);
    NC_CHECK(apart, op, "out must not overlap another argument");
    a.y = v.data;
    gated_act_run(a);
  }

  std::tuple<Tensor, Tensor> quantised(int64_t group_size) {
    Tensor q = empty(sizes, DType::kInt8);
    std::vector<int64_t> scales(sizes.begin(), sizes.end() - 1);
    if (group_size) scales.push_back(sizes.back() / group_size);
    Tensor scale = empty(scales, DType::kFloat32);
    a.q = static_cast<int8_t*>(q.mutable_data_ptr());
    a.scale = static_cast<float*>(scale.mutable_data_ptr());
    gated_act_run(a);
    return {q, scale};
  }
};

Tensor silu_mul(const Tensor& gate, const Tensor& up) {
  return Call("silu_mul", gate, up, Activation::kSilu, 0).plain();
}
void silu_mul_out(const Tensor& gate, const Tensor& up, Tensor out) {
  Call("silu_mul", gate, up, Activation::kSilu, 0).into(out);
}
std::tuple<Tensor, Tensor> silu_mul_int8(const Tensor& gate, const Tensor& up, int64_t group_size) {
  return Call("silu_mul_int8", gate, up, Activation::kSilu, group_size).quantised(group_size);
}
Tensor gelu_mul(const Tensor& gate, const Tensor& up, std::string approximate) {
  return Call("gelu_mul", gate, up, gelu_form("gelu_mul", approximate), 0).plain();
}
void gelu_mul_out(const Tensor& gate, const Tensor& up, std::string approximate, Tensor out) {
  Call("gelu_mul", gate, up, gelu_form("gelu_mul", approximate), 0).into(out);
}
std::tuple<Tensor, Tensor> gelu_mul_int8(const Tensor& gate, const Tensor& up,
                                         std::string approximate, int64_t group_size) {
  constexpr const char* op = "gelu_mul_int8";
  return Call(op, gate, up, gelu_form(op, approximate), group_size).quantised(group_size);
}

template <bool kSilu, bool kInt8>
Step gated_step(const StepSpec& s, PackCache&) {
  const char* op = s.op.c_str();
  NC_CHECK(has_even_rows(s.inputs[0]) && has_even_rows(s.inputs[1]), op,
           "gate and up must have adjacent elements and evenly spaced rows in a plan");
  const Activation activation =
      kSilu ? Activation::kSilu : gelu_form(op, s.text("approximate", "none"));
  GatedActArgs a =
      gated_args(op, s.inputs[0], s.inputs[1], activation, kInt8 ? s.integer("group_size") : 0);
  if (kInt8) {
    a.q = static_cast<int8_t*>(s.outputs[0].data);
    a.scale = static_cast<float*>(s.outputs[1].data);
  } else {
    a.y = s.outputs[0].data;
  }
  return [a] { gated_act_run(a); };
}

const RegisterStep steps[] = {
    {"silu_mul", gated_step<true, false>},
    {"silu_mul_int8", gated_step<true, true>},
    {"gelu_mul", gated_step<false, false>},
    {"gelu_mul_int8", gated_step<false, true>},
};

}  // namespace
}  // namespace narrowcast

STABLE_TORCH_LIBRARY_IMPL(narrowcast, CPU, m) {
  m.impl("silu_mul", TORCH_BOX(&narrowcast::silu_mul));
  m.impl("silu_mul.out", TORCH_BOX(&narrowcast::silu_mul_out));
  m.impl("silu_mul_int8", TORCH_BOX(&narrowcast::silu_mul_int8));
  m.impl("gelu_mul", TORCH_BOX(&narrowcast::gelu_mul));
  m.impl("gelu_mul.out", TORCH_BOX(&narrowcast::gelu_mul_out));
  m.impl("gelu_mul_int8", TORCH_BOX(&narrowcast::gelu_mul_int8));
}
