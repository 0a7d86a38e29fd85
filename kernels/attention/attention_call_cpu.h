// attention's arguments in the rooms of the CPU that take them: a step's.
#pragma once
#include "attention/attention_call_checks.h"
#include "common/step.h"

namespace narrowcast {

// The arguments of a step of such an op.
inline AttentionArgs attention_step_args(const char* op, const StepSpec& s) {
  const AttentionOptions options = {s.attributes.count("scale") > 0, s.flag("causal"),
                                    s.number("scale"), s.number("softcap"), s.integer("window")};
  AttentionArgs a = attention_args(
      op,
      {s.inputs[0], s.inputs[1], s.inputs[2], s.inputs[3], s.inputs[4], s.inputs[5], s.inputs[6]},
      options);
  check_out(op, s.outputs[0], s.inputs[0], a.v_depth);
  a.out = s.outputs[0].data;
  return a;
}

}  // namespace narrowcast
