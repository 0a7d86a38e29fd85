// attention_decode: attention (attention.h) of new queries over a KV cache that holds their keys.
//
//   q        [B, Hq, Sq, D]; query s of sequence b sees keys 0 .. lengths[b] - Sq + s, at most
//            `window` of them, itself included, when window > 0.
//   caches   [B, Hkv, C, D] in float32, float16, bfloat16, or int8 with float32 scales [B, Hkv, C];
//            or uint8 [B, Hkv, C, D / 2] of rotated 4-bit codes with grids [B, Hkv, C, D / 16] as
//            common/hadamard.h has them: q is rotated, and so is the sum over the values;
//            or pages [P, Hkv, page, ..] (scales [P, Hkv, page, ..]) in the order of block_table
//            [B, pages].
//
// Up to kDecodeRows rows per K/V head, a sequence is cut into chunks of kDecodeChunk keys whose
// partial results are merged in order. The cut depends on the sequence's own length only: its
// result has the same bits whatever the batch and the number of threads.
#pragma once
#include "attention/attention.h"

namespace narrowcast {

constexpr int64_t kDecodeRows = 16, kDecodeChunk = 256;

struct AttentionDecodeArgs {
  AttentionArgs attention;
  int64_t capacity, pages;  // pages that exist; 0 without block_table
};

// Throws when a length or a page lies outside the cache. Nothing has been read then.
void attention_decode_check(const AttentionDecodeArgs& args);
// Floats of the partial results of a cache filled to the brim.
int64_t attention_decode_partials(const AttentionDecodeArgs& args);
void attention_decode_run(const AttentionDecodeArgs& args, float* partials);

#define KERNEL(name, isa)                                                                 \
  void attention_decode_rows_##name(const AttentionArgs& args, const AttentionItem& item, \
                                    float* scratch);
#include "attention_decode/attention_decode.inc"
#undef KERNEL

}  // namespace narrowcast
