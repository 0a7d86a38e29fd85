// kv_append: writes rope(k) and v of new tokens into a KV cache.
//
//   k, v     [B, Hkv, S, D], the last dimension adjacent; token s of sequence b goes to
//            start[b] + s.
//   caches   [B, Hkv, C, D] in float32, float16, bfloat16, or int8 with float32 scales [B, Hkv, C],
//            or uint8 [B, Hkv, C, D / 2] of rotated 4-bit codes with grids [B, Hkv, C, D / 16];
//            or pages [P, Hkv, page, D] in the order of block_table [B, pages].
//   rope     as in rope/rope.h, at position start[b] + s: the first 2 * half dimensions of k turn,
//            in pairs half apart or adjacent (interleaved).
//   k_shift  [Hkv, D], 4-bit codes only: subtracted from k behind the rope. A vector that all keys
//            of a head have in common changes no softmax, and takes the grid where keys differ.
//
// Numerics: float32, products and sums not fused, rounded once into the cache. int8: rows as
// quantize/quantize.h does it, one scale per token and head. 4-bit codes: the form of
// common/hadamard.h; of kShrinks ranges about the middle of a group's the one with the least
// squared error, codes by the rounded grid. NaN becomes 0 and is counted, what lies beyond +-1e30
// becomes that.
#pragma once
#include <cstdint>

#include "common/tensor_view.h"

namespace narrowcast {

struct KvAppendArgs {
  const void *k, *v;
  void *k_cache, *v_cache;
  float *k_scale, *v_scale;                        // int8 caches only
  uint32_t *k_pairs, *v_pairs;                     // 4-bit codes only; scale strides in pairs
  const float* k_shift;                            // [Hkv, D] contiguous, or nullptr
  const float *cos, *sin;                          // [table_rows, half] contiguous, or nullptr
  const int32_t* start;                            // [B]
  const int32_t* block_table;                      // [B, table_stride] or nullptr
  int64_t k_strides[3], v_strides[3];              // batch, head, token
  int64_t k_cache_strides[3], v_cache_strides[3];  // batch or page, head, slot
  int64_t k_scale_strides[3], v_scale_strides[3];
  int64_t batch, heads, length, depth, capacity, page_size, pages, table_stride, table_rows, half;
  DType dtype, cache_dtype;
  bool interleaved;
};

// Throws when a slot, page or position lies outside cache or tables; nothing is written then.
void kv_append_run(const KvAppendArgs& args);

}  // namespace narrowcast
