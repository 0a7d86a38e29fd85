// The CUDA side of attention: the contract of attention.h with pointers into device memory, for
// float16 and bfloat16 and head sizes up to kAttentionDepthCuda.
#pragma once
#include "attention/attention.h"
#include "common/launch.h"

namespace narrowcast {

constexpr int64_t kAttentionDepthCuda = 256;

// cu_q and cu_k are read on the device: where they leave q or k, they count as its end.
void attention_sm80(const AttentionArgs& args, Stream stream);

}  // namespace narrowcast
