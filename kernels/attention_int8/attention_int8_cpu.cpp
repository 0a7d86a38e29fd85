// Where tensors stop: argument checks, the torch op, the executor's step.
#include "attention/attention_call_cpu.h"
#include "attention_int8/attention_int8.h"
#include "common/scratch.h"
#include "common/step.h"

namespace narrowcast {
namespace {

constexpr const char* kOp = "attention_int8";

void check_depth(const AttentionArgs& a) {
  NC_CHECK(a.depth <= kAttentionInt8Depth, kOp, "q must have a head size of at most ",
           kAttentionInt8Depth, ", got ", a.depth);
}

Tensor attention_int8(NC_ATTENTION_PARAMETERS) {
  const AttentionCall call(kOp, NC_ATTENTION_ARGUMENTS);
  AttentionArgs a = call.args();
  check_depth(a);
  Tensor out = call.new_out(a);
  a.out = out.mutable_data_ptr();
  const ThreadScratch workspace(attention_int8_workspace(a));
  attention_int8_run(attention_int8_args(a, workspace.data()));
  return out;
}

const RegisterStep attention_int8_step(kOp, [](const StepSpec& s, PackCache&) -> Step {
  AttentionArgs a = attention_step_args(kOp, s);
  check_depth(a);
  const std::shared_ptr<void> workspace = aligned_buffer(attention_int8_workspace(a));
  const AttentionInt8Args args = attention_int8_args(a, workspace.get());
  return [args, workspace] {
    check_lengths(kOp, args.attention);
    attention_int8_run(args);
  };
});

}  // namespace
}  // namespace narrowcast

STABLE_TORCH_LIBRARY_IMPL(narrowcast, CPU, m) {
  m.impl("attention_int8", TORCH_BOX(&narrowcast::attention_int8));
}
