// The CUDA side of attention_int8: the contract of attention_int8.h with pointers into device
// memory, for float16 and bfloat16 and head sizes up to kAttentionDepthCuda.
#pragma once
#include "attention/attention_cuda.h"
#include "attention_int8/attention_int8.h"

namespace narrowcast {

// What the kernels leave for one another. Of key row t and K/V head h, as in AttentionInt8Args:
// codes[h][t], `stored` of them with zeros behind the depth; the scale ks, [h][t]. means [b][h][D];
// sums, of the pieces that a mean is added up from.
struct AttentionInt8Workspace {
  int8_t* codes;
  float *scales, *means, *sums;
  int64_t stored, bytes;
};

// The places in a buffer that begins at `memory`, nullptr to learn its size.
AttentionInt8Workspace attention_int8_sm80_workspace(const AttentionArgs& args, void* memory);

// cu_q and cu_k are read on the device: where they leave q or k, they count as its end.
void attention_int8_sm80(const AttentionArgs& args, void* workspace, Stream stream);

}  // namespace narrowcast
