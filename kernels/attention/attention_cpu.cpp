// Where tensors stop: argument checks, the torch op, the executor's step.
#include "attention/attention_call_cpu.h"
#include "common/step.h"

namespace narrowcast {
namespace {

Tensor attention(NC_ATTENTION_PARAMETERS) {
  const AttentionCall call("attention", NC_ATTENTION_ARGUMENTS);
  AttentionArgs a = call.args();
  Tensor out = call.new_out(a);
  a.out = out.mutable_data_ptr();
  attention_run(a);
  return out;
}

void attention_out(NC_ATTENTION_PARAMETERS, Tensor out) {
  constexpr const char* op = "attention";
  const AttentionCall call(op, NC_ATTENTION_ARGUMENTS);
  AttentionArgs a = call.args();
  const TensorView to = view(out, op, "out");
  check_out(op, to, view(call.q, op, "q"), a.v_depth);
  for (const Tensor* t : {&q, &k, &v})
    NC_CHECK(!may_overlap(to, view(*t, op, "q")), op, "out must not overlap q, k or v");
  for (const auto* t : {&bias, &cu_q, &cu_k, &sinks})
    NC_CHECK(!may_overlap(to, view(*t, op, "bias")), op, "out must not overlap an input");
  a.out = to.data;
  attention_run(a);
}

std::tuple<Tensor, Tensor> attention_lse(NC_ATTENTION_PARAMETERS) {
  const AttentionCall call("attention_lse", NC_ATTENTION_ARGUMENTS);
  AttentionArgs a = call.args();
  Tensor out = call.new_out(a);
  const auto sizes = call.q.sizes();
  Tensor lse = empty(std::vector<int64_t>(sizes.begin(), sizes.end() - 1), DType::kFloat32);
  a.out = out.mutable_data_ptr();
  a.lse = static_cast<float*>(lse.mutable_data_ptr());
  attention_run(a);
  return {out, lse};
}

Step attention_step(const StepSpec& s, PackCache&) {
  const char* op = s.op == "attention_lse" ? "attention_lse" : "attention";
  AttentionArgs a = attention_step_args(op, s);
  if (s.outputs.size() > 1) a.lse = static_cast<float*>(s.outputs[1].data);
  return [a, op] {
    check_lengths(op, a);
    attention_run(a);
  };
}

const RegisterStep attention_registered("attention", attention_step);
const RegisterStep attention_lse_registered("attention_lse", attention_step);

}  // namespace
}  // namespace narrowcast

STABLE_TORCH_LIBRARY_IMPL(narrowcast, CPU, m) {
  m.impl("attention", TORCH_BOX(&narrowcast::attention));
  m.impl("attention.out", TORCH_BOX(&narrowcast::attention_out));
  m.impl("attention_lse", TORCH_BOX(&narrowcast::attention_lse));
}
