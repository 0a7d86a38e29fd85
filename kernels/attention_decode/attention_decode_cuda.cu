// attention_decode on CUDA: where tensors stop. The private op that the dispatcher may choose, for
// float16 and bfloat16 queries over a cache of their dtype or int8, head sizes up to 256. What
// lengths and block_table hold is not checked: no op waits for the GPU.
#include "attention_decode/attention_decode_checks.h"
#include "attention_decode/attention_decode_cuda.h"
#include "common/stable_cuda.h"

namespace narrowcast {
namespace {

using namespace attention_decode_checks;

Tensor attention_decode(NC_DECODE_PARAMETERS) {
  const OnDeviceOf here(q_in, kOp, "q");
  const DecodeCall call(NC_DECODE_ARGUMENTS);
  AttentionDecodeArgs args = call.args;
  AttentionArgs& a = args.attention;
  NC_CHECK(a.q_dtype != DType::kFloat32, kOp, "q must be float16 or bfloat16, got float32");
  NC_CHECK(a.kv_dtype == a.q_dtype || a.kv_dtype == DType::kInt8, kOp,
           "k_cache must be int8 or have the dtype of q, ", name(a.q_dtype), ", got ",
           name(a.kv_dtype));
  NC_CHECK(a.depth <= kAttentionDepthCuda, kOp, "q must have a head size up to ",
           kAttentionDepthCuda, ", got ", a.depth);
  Tensor out = call.new_out();
  a.out = out.mutable_data_ptr();
  Tensor partials = empty({attention_decode_sm80_partials(args)}, DType::kFloat32);
  attention_decode_sm80(args, static_cast<float*>(partials.mutable_data_ptr()), here.stream());
  return out;
}

}  // namespace
}  // namespace narrowcast

STABLE_TORCH_LIBRARY_IMPL(narrowcast, CUDA, m) {
  m.impl("_attention_decode_cuda", TORCH_BOX(&narrowcast::attention_decode));
}
