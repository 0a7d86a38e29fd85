// The CUDA side of attention_decode: the contract of attention_decode.h with pointers into device
// memory, for float16 and bfloat16 queries, caches of their dtype or int8, and head sizes up to
// kAttentionDepthCuda. lengths and block_table are read on the device: a length counts as the
// nearest that the cache can have, a page that does not exist as page 0.
#pragma once
#include "attention/attention_cuda.h"
#include "attention_decode/attention_decode.h"

namespace narrowcast {

// float32 values at `partials`: of a cache filled to the brim.
int64_t attention_decode_sm80_partials(const AttentionDecodeArgs& args);
void attention_decode_sm80(const AttentionDecodeArgs& args, float* partials, Stream stream);

}  // namespace narrowcast
