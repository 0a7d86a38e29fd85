// epilogue.h for 16 columns at once.
#pragma once
#include <immintrin.h>

#include "common/epilogue.h"
#include "common/vec_avx512.h"

namespace narrowcast {

// Out of line: the code of every activation twice in each loop would push the rest out of reach.
[[gnu::noinline]] static __m512 activate16_far(Activation activation, __m512 v) {
  return activate16(activation, v);
}

static inline __m512 activate16_or_skip(Activation activation, __m512 v) {
  if (activation == Activation::kNone) [[likely]]
    return v;
  if (activation > Activation::kRelu6) return activate16_far(activation, v);
  v = _mm512_max_ps(_mm512_setzero_ps(), v);  // as in activate16: NaN stays NaN
  return activation == Activation::kRelu ? v : _mm512_min_ps(_mm512_set1_ps(6.0f), v);
}

static inline void finish16(const Epilogue& e, __m512 v, int64_t m, int64_t n, __mmask16 mask) {
  if (e.bias) v = _mm512_add_ps(v, load16(e.bias, n, e.bias_dtype, mask));
  v = activate16_or_skip(e.activation, v);
  if (e.residual)
    v = _mm512_add_ps(v, load16(e.residual, m * e.ld_residual + n, e.residual_dtype, mask));
  v = activate16_or_skip(e.post_activation, v);
  const int64_t at = m * e.ld_out + n;
  if (e.out_dtype != DType::kInt8 && e.out_dtype != DType::kUInt8)
    return store16(e.out, at, e.out_dtype, mask, v);
  const bool is_signed = e.out_dtype == DType::kInt8;
  v = _mm512_mul_ps(v, _mm512_set1_ps(1.0f / e.out_scale));
  v = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v, v, _CMP_ORD_Q), v);
  v = _mm512_min_ps(_mm512_max_ps(v, _mm512_set1_ps(-1024.0f)), _mm512_set1_ps(1024.0f));
  __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32(v), _mm512_set1_epi32(e.out_zero_point));
  q = _mm512_max_epi32(q, _mm512_set1_epi32(is_signed ? -127 : 0));
  q = _mm512_min_epi32(q, _mm512_set1_epi32(is_signed ? 127 : 255));
  _mm_mask_storeu_epi8(static_cast<int8_t*>(e.out) + at, mask, _mm512_cvtepi32_epi8(q));
}

}  // namespace narrowcast
