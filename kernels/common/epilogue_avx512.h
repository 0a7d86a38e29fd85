// epilogue.h for 16 columns at once.
#pragma once
#include <immintrin.h>

#include "common/epilogue.h"

namespace narrowcast {

static inline __m512 load16(const void* p, int64_t i, DType dtype, __mmask16 mask) {
  if (dtype == DType::kFloat32)
    return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(p) + i);
  const __m256i h = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(p) + i);
  if (dtype == DType::kFloat16) return _mm512_cvtph_ps(h);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

static inline __m256i to_bfloat16x16(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v), top = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(top, _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(
      _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, nan, top, _mm512_set1_epi32(0x40)));
}

static inline void store16(void* p, int64_t i, DType dtype, __mmask16 mask, __m512 v) {
  if (dtype == DType::kFloat32) return _mm512_mask_storeu_ps(static_cast<float*>(p) + i, mask, v);
  const __m256i h = dtype == DType::kFloat16
                        ? _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
                        : to_bfloat16x16(v);
  _mm256_mask_storeu_epi16(static_cast<uint16_t*>(p) + i, mask, h);
}

static inline __m512 activate16(Activation activation, __m512 x) {
  const __m512 zero = _mm512_setzero_ps(), six = _mm512_set1_ps(6.0f);
  switch (activation) {
    case Activation::kNone:
      return x;
    // The second operand of max / min is the result when one is NaN.
    case Activation::kRelu:
      return _mm512_max_ps(zero, x);
    case Activation::kRelu6:
      return _mm512_min_ps(six, _mm512_max_ps(zero, x));
    case Activation::kHardswish: {
      const __m512 shifted = _mm512_add_ps(x, _mm512_set1_ps(3.0f));
      const __m512 gate = _mm512_min_ps(six, _mm512_max_ps(zero, shifted));
      return _mm512_mul_ps(_mm512_mul_ps(x, gate), _mm512_set1_ps(1.0f / 6.0f));
    }
    default: {
      alignas(64) float lanes[16];
      _mm512_store_ps(lanes, x);
      for (float& lane : lanes) lane = activate(activation, lane);
      return _mm512_load_ps(lanes);
    }
  }
}

static inline void finish16(const Epilogue& e, __m512 v, int64_t m, int64_t n, __mmask16 mask) {
  if (e.bias) v = _mm512_add_ps(v, load16(e.bias, n, e.bias_dtype, mask));
  v = activate16(e.activation, v);
  if (e.residual)
    v = _mm512_add_ps(v, load16(e.residual, m * e.ld_residual + n, e.residual_dtype, mask));
  v = activate16(e.post_activation, v);
  const int64_t at = m * e.ld_out + n;
  if (e.out_dtype != DType::kInt8 && e.out_dtype != DType::kUInt8)
    return store16(e.out, at, e.out_dtype, mask, v);
  const bool is_signed = e.out_dtype == DType::kInt8;
  v = _mm512_div_ps(v, _mm512_set1_ps(e.out_scale));
  v = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v, v, _CMP_ORD_Q), v);
  v = _mm512_min_ps(_mm512_max_ps(v, _mm512_set1_ps(-1024.0f)), _mm512_set1_ps(1024.0f));
  __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32(v), _mm512_set1_epi32(e.out_zero_point));
  q = _mm512_max_epi32(q, _mm512_set1_epi32(is_signed ? -127 : 0));
  q = _mm512_min_epi32(q, _mm512_set1_epi32(is_signed ? 127 : 255));
  _mm_mask_storeu_epi8(static_cast<int8_t*>(e.out) + at, mask, _mm512_cvtepi32_epi8(q));
}

}  // namespace narrowcast
