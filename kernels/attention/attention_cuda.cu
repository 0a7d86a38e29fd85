// attention on CUDA: where tensors stop. The private ops that the dispatcher may choose, for
// float16 and bfloat16 and head sizes up to 256.
#include "attention/attention_call_cuda.h"
#include "common/stable_cuda.h"

namespace narrowcast {
namespace {

Tensor attention(NC_ATTENTION_PARAMETERS) {
  const OnDeviceOf here(q, "attention", "q");
  const AttentionCall call("attention", NC_ATTENTION_ARGUMENTS);
  AttentionArgs a = cuda_args(call);
  Tensor out = call.new_out(a);
  a.out = out.mutable_data_ptr();
  attention_sm80(a, here.stream());
  return out;
}

std::tuple<Tensor, Tensor> attention_lse(NC_ATTENTION_PARAMETERS) {
  const OnDeviceOf here(q, "attention_lse", "q");
  const AttentionCall call("attention_lse", NC_ATTENTION_ARGUMENTS);
  AttentionArgs a = cuda_args(call);
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
