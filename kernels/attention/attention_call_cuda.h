// What the CUDA kernels of the rooms that take attention's arguments demand beyond the contract.
#pragma once
#include "attention/attention_call_checks.h"
#include "attention/attention_cuda.h"

namespace narrowcast {

inline AttentionArgs cuda_args(const AttentionCall& call) {
  const AttentionArgs a = call.device_args();
  NC_CHECK(a.q_dtype != DType::kFloat32, call.op, "q must be float16 or bfloat16, got float32");
  NC_CHECK(a.depth <= kAttentionDepthCuda && a.v_depth <= kAttentionDepthCuda, call.op,
           "q and v must have head sizes up to ", kAttentionDepthCuda, ", got ", a.depth, " and ",
           a.v_depth);
  return a;
}

}  // namespace narrowcast
