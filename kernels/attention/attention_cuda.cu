// attention on CUDA: where tensors stop. The private ops that the dispatcher may choose, for
// float16 and bfloat16 and head sizes up to 256.
#include "attention/attention_call_checks.h"
#include "attention/attention_cuda.h"
#include "common/stable_cuda.h"

namespace narrowcast {
namespace {

AttentionArgs checked(const AttentionCall& call) {
  const AttentionArgs a = call.device_args();
  NC_CHECK(a.q_dtype != DType::kFloat32, call.op, "q must be float16 or bfloat16, got float32");
  NC_CHECK(a.depth <= kAttentionDepthCuda && a.v_depth <= kAttentionDepthCuda, call.op,
           "q and v must have head sizes up to ", kAttentionDepthCuda, ", got ", a.depth, " and ",
           a.v_depth);
  return a;
}

Tensor attention(NC_ATTENTION_PARAMETERS) {
  const OnDeviceOf here(q, "attention", "q");
  const AttentionCall call("attention", NC_ATTENTION_ARGUMENTS);
  AttentionArgs a = checked(call);
  Tensor out = call.new_out(a);
  a.out = out.mutable_data_ptr();
  attention_sm80(a, here.stream());
  return out;
}

std::tuple<Tensor, Tensor> attention_lse(NC_ATTENTION_PARAMETERS) {
  const OnDeviceOf here(q, "attention_lse", "q");
  const AttentionCall call("attention_lse", NC_ATTENTION_ARGUMENTS);
  AttentionArgs a = checked(call);
  Tensor out = call.new_out(a);
  const auto sizes = call.q.sizes();
  Tensor lse = empty(std::vector<int64_t>(sizes.begin(), sizes.end() - 1), DType::kFloat32);
  a.out = out.mutable_data_ptr();
  a.lse = static_cast<float*>(lse.mutable_data_ptr());
  attention_sm80(a, here.stream());
  return {out, lse};
}

}  // namespace
}  // namespace narrowcast

STABLE_TORCH_LIBRARY_IMPL(narrowcast, CUDA, m) {
  m.impl("_attention_cuda", TORCH_BOX(&narrowcast::attention));
  m.impl("_attention_lse_cuda", TORCH_BOX(&narrowcast::attention_lse));
}
