// attention_int8 on CUDA: where tensors stop. The private op that the dispatcher may choose, for
// float16 and bfloat16 and head sizes up to 256.
#include "attention/attention_call_cuda.h"
#include "attention_int8/attention_int8_cuda.h"
#include "common/stable_cuda.h"

namespace narrowcast {
namespace {

Tensor attention_int8(NC_ATTENTION_PARAMETERS) {
  const OnDeviceOf here(q, "attention_int8", "q");
  const AttentionCall call("attention_int8", NC_ATTENTION_ARGUMENTS);
  AttentionArgs a = cuda_args(call);
  Tensor out = call.new_out(a);
  a.out = out.mutable_data_ptr();
  Tensor workspace = empty({attention_int8_sm80_workspace(a, nullptr).bytes}, DType::kInt8);
  attention_int8_sm80(a, workspace.mutable_data_ptr(), here.stream());
  return out;
}

}  // namespace
}  // namespace narrowcast

STABLE_TORCH_LIBRARY_IMPL(narrowcast, CUDA, m) {
  m.impl("_attention_int8_cuda", TORCH_BOX(&narrowcast::attention_int8));
}
