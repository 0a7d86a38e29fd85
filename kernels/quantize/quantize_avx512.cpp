#include "common/vec_avx512.h"
#include "quantize/quantize.h"

namespace narrowcast {
namespace {

constexpr float kSmallestNormal = 1.17549435e-38f;

// Lanes that are inf or NaN.
__mmask16 not_finite(__m512 v) { return _mm512_fpclass_ps_mask(v, 0x99); }

void note(__m512 v, __mmask16 odd, QuantizeFindings* findings) {
  findings->finite = false;
  findings->nan += __builtin_popcount(_mm512_mask_cmp_ps_mask(odd, v, v, _CMP_UNORD_Q));
}

__m512i rounded(__m512 v) {
  v = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v, v, _CMP_ORD_Q), v);
  v = _mm512_min_ps(_mm512_max_ps(v, _mm512_set1_ps(-1024.0f)), _mm512_set1_ps(1024.0f));
  return _mm512_cvtps_epi32(v);
}

void row(const void* x, DType dtype, int64_t count, bool asymmetric, int8_t* q, float* scale,
         int32_t* zero_point, QuantizeFindings* findings) {
  __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += 16) {
    __m512 v = load16(x, i, dtype, mask16(count - i));
    const __mmask16 odd = not_finite(v);
    if (odd) [[unlikely]] {
      note(v, odd, findings);
      v = _mm512_maskz_mov_ps(static_cast<__mmask16>(~odd), v);
    }
    low = _mm512_min_ps(low, v);
    high = _mm512_max_ps(high, v);
  }
  const float lowest = _mm512_reduce_min_ps(low), highest = _mm512_reduce_max_ps(high);
  float s = asymmetric ? highest / 255.0f - lowest / 255.0f
                       : (-lowest > highest ? -lowest : highest) / 127.0f;
  if (!(s >= kSmallestNormal)) s = 1.0f;
  const float inverse = 1.0f / s;
  const int32_t zero = asymmetric ? _mm_cvtss_si32(_mm_set_ss(-128.0f - lowest * inverse)) : 0;
  *scale = s;
  if (asymmetric) *zero_point = zero;
  const __m512 inverses = _mm512_set1_ps(inverse);
  const __m512i zeros = _mm512_set1_epi32(zero), top = _mm512_set1_epi32(127);
  const __m512i bottom = _mm512_set1_epi32(asymmetric ? -128 : -127);
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = mask16(count - i);
    const __m512i code = rounded(_mm512_mul_ps(load16(x, i, dtype, mask), inverses));
    const __m512i shifted = _mm512_add_epi32(code, zeros);
    const __m512i c = _mm512_min_epi32(_mm512_max_epi32(shifted, bottom), top);
    _mm_mask_storeu_epi8(q + i, mask, _mm512_cvtepi32_epi8(c));
  }
}

// Groups of kSize float32 values, sixteen at a time: their divisions share one vector, and no step
// of a group waits for another's.
template <int kSize>
void groups_of(const float* x, int64_t groups, int8_t* q, float* scale,
               QuantizeFindings* findings) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  alignas(64) uint32_t top[16];
  alignas(64) float inverse[16];
  for (int64_t g0 = 0; g0 < groups; g0 += 16) {
    const int count = groups - g0 < 16 ? static_cast<int>(groups - g0) : 16;
    for (int g = 0; g < count; ++g) {
      const float* from = x + (g0 + g) * kSize;
      __m512i most = _mm512_setzero_si512();
      for (int i = 0; i < kSize; i += 16)
        most = _mm512_max_epu32(most, _mm512_and_si512(magnitude, _mm512_loadu_si512(from + i)));
      top[g] = _mm512_reduce_max_epu32(most);
    }
    const __mmask16 mask = mask16(count);
    const __m512i tops = _mm512_maskz_load_epi32(mask, top);
    __m512 s = _mm512_div_ps(_mm512_castsi512_ps(tops), _mm512_set1_ps(127.0f));
    s = _mm512_mask_mov_ps(s, _mm512_cmp_ps_mask(s, _mm512_set1_ps(kSmallestNormal), _CMP_NGE_UQ),
                           _mm512_set1_ps(1.0f));
    _mm512_mask_storeu_ps(scale + g0, mask, s);
    _mm512_store_ps(inverse, _mm512_div_ps(_mm512_set1_ps(1.0f), s));
    for (int g = 0; g < count; ++g) {
      const float* from = x + (g0 + g) * kSize;
      int8_t* to = q + (g0 + g) * kSize;
      if (top[g] >= 0x7f800000u) [[unlikely]] {
        row(from, DType::kFloat32, kSize, false, to, scale + g0 + g, nullptr, findings);
        continue;
      }
      // No product is beyond 127.5: nothing to saturate.
      const __m512 inverses = _mm512_set1_ps(inverse[g]);
      for (int i = 0; i < kSize; i += 16) {
        const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(from + i), inverses));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm512_cvtepi32_epi8(code));
      }
    }
  }
}

void small_groups(const float* x, int64_t size, int64_t groups, int8_t* q, float* scale,
                  QuantizeFindings* findings) {
  (size == 32 ? groups_of<32> : groups_of<64>)(x, groups, q, scale, findings);
}

void by_scale(const void* x, DType dtype, int64_t count, float inverse_scale, int32_t zero_point,
              bool is_signed, void* q, QuantizeFindings* findings) {
  const __m512 inverses = _mm512_set1_ps(inverse_scale);
  const __m512i zeros = _mm512_set1_epi32(zero_point);
  const __m512i bottom = _mm512_set1_epi32(is_signed ? -127 : 0);
  const __m512i top = _mm512_set1_epi32(is_signed ? 127 : 255);
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = mask16(count - i);
    const __m512 v = load16(x, i, dtype, mask);
    const __mmask16 odd = not_finite(v);
    if (odd) [[unlikely]]
      note(v, odd, findings);
    const __m512i code = _mm512_add_epi32(rounded(_mm512_mul_ps(v, inverses)), zeros);
    const __m512i c = _mm512_min_epi32(_mm512_max_epi32(code, bottom), top);
    _mm_mask_storeu_epi8(static_cast<int8_t*>(q) + i, mask, _mm512_cvtepi32_epi8(c));
  }
}

}  // namespace

extern const QuantizeKernel quantize_avx512 = {row, by_scale, small_groups};

}  // namespace narrowcast
