// Where tensors stop: argument checks, the torch op, the executor's step.
#include "attention_decode/attention_decode_checks.h"
#include "common/scratch.h"
#include "common/step.h"

namespace narrowcast {
namespace {

using namespace attention_decode_checks;

void run(const DecodeCall& call, void* out) {
  AttentionDecodeArgs args = call.args;
  attention_decode_check(args);
  args.attention.out = out;
  const ThreadScratch partials(attention_decode_partials(args) * 4);
  attention_decode_run(args, static_cast<float*>(partials.data()));
}

Tensor attention_decode(NC_DECODE_PARAMETERS) {
  const DecodeCall call(NC_DECODE_ARGUMENTS);
  Tensor out = call.new_out();
  run(call, out.mutable_data_ptr());
  return out;
}

void attention_decode_out(NC_DECODE_PARAMETERS, Tensor out) {
  const DecodeCall call(NC_DECODE_ARGUMENTS);
  const TensorView to = view(out, kOp, "out"), q = view(call.q, kOp, "q");
  check_out(kOp, to, q, q.sizes[3]);
  for (const Tensor* t : {&q_in, &k_cache_in, &v_cache_in, &lengths_in})
    NC_CHECK(!may_overlap(to, view(*t, kOp, "q")), kOp, "out must not overlap an input");
  for (const auto* t : {&k_scale, &v_scale, &block_table_in, &sinks_in})
    NC_CHECK(!may_overlap(to, view(*t, kOp, "q")), kOp, "out must not overlap an input");
  run(call, to.data);
}

const RegisterStep attention_decode_step(kOp, [](const StepSpec& s, PackCache&) -> Step {
  AttentionDecodeArgs args = decode_args({s.inputs[0], s.inputs[1], s.inputs[2], s.inputs[3],
                                          s.inputs[4], s.inputs[5], s.inputs[6], s.inputs[7]},
                                         s.attributes.count("scale") > 0, s.number("scale"),
                                         s.integer("window"), s.number("softcap"));
  check_out(kOp, s.outputs[0], s.inputs[0], args.attention.v_depth);
  args.attention.out = s.outputs[0].data;
  const std::shared_ptr<void> partials = aligned_buffer(attention_decode_partials(args) * 4);
  return [args, partials] {
    attention_decode_check(args);
    attention_decode_run(args, static_cast<float*>(partials.get()));
  };
});

}  // namespace
}  // namespace narrowcast

STABLE_TORCH_LIBRARY_IMPL(narrowcast, CPU, m) {
  m.impl("attention_decode", TORCH_BOX(&narrowcast::attention_decode));
  m.impl("attention_decode.out", TORCH_BOX(&narrowcast::attention_decode_out));
}
