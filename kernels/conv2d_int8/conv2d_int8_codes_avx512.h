// The epilogue of conv2d_int8 in vectors of 16 channels: `finish` for every case, and `Codes` for
// those where ConvEpilogue::codes lets integers do the clamping.
#pragma once
#include "common/epilogue_avx512.h"
#include "conv2d_int8/conv2d_int8.h"

namespace narrowcast {
namespace {

__m512 residual16(const ConvEpilogue& e, int64_t at, __mmask16 mask) {
  const __m512i zero = _mm512_set1_epi32(e.residual_zero_point);
  if (e.residual_dtype == DType::kUInt8 || e.residual_dtype == DType::kInt8) {
    const __m128i bytes = _mm_maskz_loadu_epi8(mask, static_cast<const char*>(e.residual) + at);
    const __m512i r = e.residual_dtype == DType::kUInt8 ? _mm512_cvtepu8_epi32(bytes)
                                                        : _mm512_cvtepi8_epi32(bytes);
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(r, zero)),
                         _mm512_set1_ps(e.residual_scale));
  }
  return _mm512_mul_ps(load16(e.residual, at, e.residual_dtype, mask),
                       _mm512_set1_ps(e.residual_scale));
}

// 16 output channels of one pixel.
void finish(const ConvEpilogue& e, __m512i acc, int64_t pixel, int64_t channel) {
  const __mmask16 mask = mask16(e.channels - channel);
  const int64_t at = pixel * e.channels + channel;
  __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(acc), _mm512_loadu_ps(e.scale + channel));
  v = activate16_or_skip(e.activation, _mm512_add_ps(v, _mm512_loadu_ps(e.bias + channel)));
  if (e.residual) v = _mm512_add_ps(v, residual16(e, at, mask));
  v = activate16_or_skip(e.post_activation, v);
  if (e.out_dtype != DType::kUInt8 && e.out_dtype != DType::kInt8)
    return store16(e.out, at, e.out_dtype, mask, v);
  v = _mm512_mul_ps(v, _mm512_set1_ps(e.inverse_out_scale));
  v = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v, v, _CMP_ORD_Q), v);
  v = _mm512_min_ps(_mm512_max_ps(v, _mm512_set1_ps(-1024.0f)), _mm512_set1_ps(1024.0f));
  __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32(v), _mm512_set1_epi32(e.out_zero_point));
  const bool is_signed = e.out_dtype == DType::kInt8;
  q = _mm512_max_epi32(q, _mm512_set1_epi32(is_signed ? -127 : 0));
  q = _mm512_min_epi32(q, _mm512_set1_epi32(is_signed ? 127 : 255));
  _mm_mask_storeu_epi8(static_cast<char*>(e.out) + at, mask, _mm512_cvtepi32_epi8(q));
}

// Four vectors to 64 codes through saturating packs. int8 codes are made 128 higher, as uint8.
struct Codes {
  __m512 inverse, least, most;
  __m512i zero, low, high, flip;

  explicit Codes(const ConvEpilogue& e) {
    const int up = e.out_dtype == DType::kInt8 ? 128 : 0;
    inverse = _mm512_set1_ps(e.inverse_out_scale);
    least = _mm512_set1_ps(e.least), most = _mm512_set1_ps(e.most);
    zero = _mm512_set1_epi16(static_cast<int16_t>(e.out_zero_point + up));
    low = _mm512_set1_epi8(static_cast<char>(e.low + up));
    high = _mm512_set1_epi8(static_cast<char>(e.high + up));
    flip = _mm512_set1_epi8(static_cast<char>(up));
  }
  __m512 value(__m512i acc, const float* scale, const float* bias) const {
    return _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(acc), _mm512_loadu_ps(scale)),
                         _mm512_loadu_ps(bias));
  }
  __m512i round(__m512 v) const { return _mm512_cvtps_epi32(_mm512_mul_ps(v, inverse)); }
  // In every 128-bit lane: 4 codes of a, 4 of b, 4 of c, 4 of d.
  __m512i pack(__m512i a, __m512i b, __m512i c, __m512i d) const {
    const __m512i ab = _mm512_adds_epi16(_mm512_packs_epi32(a, b), zero);
    const __m512i cd = _mm512_adds_epi16(_mm512_packs_epi32(c, d), zero);
    const __m512i q = _mm512_max_epu8(_mm512_packus_epi16(ab, cd), low);
    return _mm512_xor_si512(_mm512_min_epu8(q, high), flip);
  }
};

// Codes of a, of b, of c, of d.
__m512i in_order(__m512i packed) {
  return _mm512_permutexvar_epi32(
      _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), packed);
}

}  // namespace
}  // namespace narrowcast
