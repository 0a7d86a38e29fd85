#include "common/vec_avx2.h"
#include "quantize/quantize.h"

namespace narrowcast {
namespace {

constexpr float kSmallestNormal = 1.17549435e-38f;

__m256 load(const void* x, int64_t i, DType dtype, int64_t count) {
  return count - i >= 8 ? load8(x, i, dtype) : load8_tail(x, i, dtype, count - i);
}

__m256 is_finite(__m256 v) {
  return _mm256_cmp_ps(abs8(v), _mm256_set1_ps(__builtin_inff()), _CMP_LT_OQ);
}

void note(__m256 v, __m256 finite, QuantizeFindings* findings) {
  if (_mm256_movemask_ps(finite) == 0xff) return;
  findings->finite = false;
  findings->nan += __builtin_popcount(_mm256_movemask_ps(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
}

__m256i rounded(__m256 v) {
  v = _mm256_and_ps(v, _mm256_cmp_ps(v, v, _CMP_ORD_Q));
  v = _mm256_min_ps(_mm256_max_ps(v, _mm256_set1_ps(-1024.0f)), _mm256_set1_ps(1024.0f));
  return _mm256_cvtps_epi32(v);
}

void store(void* q, int64_t i, __m256i code, int64_t count) {
  const __m256i low_bytes = _mm256_shuffle_epi8(
      code, _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8,
                             12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
  const __m128i bytes =
      _mm_unpacklo_epi32(_mm256_castsi256_si128(low_bytes), _mm256_extracti128_si256(low_bytes, 1));
  char buffer[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(buffer), bytes);
  memcpy(static_cast<char*>(q) + i, buffer, static_cast<size_t>(count - i < 8 ? count - i : 8));
}

void row(const void* x, DType dtype, int64_t count, bool asymmetric, int8_t* q, float* scale,
         int32_t* zero_point, QuantizeFindings* findings) {
  __m256 low = _mm256_setzero_ps(), high = _mm256_setzero_ps();
  for (int64_t i = 0; i < count; i += 8) {
    const __m256 v = load(x, i, dtype, count), finite = is_finite(v);
    note(v, finite, findings);
    low = _mm256_min_ps(low, _mm256_and_ps(v, finite));
    high = _mm256_max_ps(high, _mm256_and_ps(v, finite));
  }
  const float highest = max8(high), lowest = -max8(_mm256_sub_ps(_mm256_setzero_ps(), low));
  float s = asymmetric ? highest / 255.0f - lowest / 255.0f
                       : (-lowest > highest ? -lowest : highest) / 127.0f;
  if (!(s >= kSmallestNormal)) s = 1.0f;
  const float inverse = 1.0f / s;
  const int32_t zero = asymmetric ? _mm_cvtss_si32(_mm_set_ss(-128.0f - lowest * inverse)) : 0;
  *scale = s;
  if (asymmetric) *zero_point = zero;
  const __m256 inverses = _mm256_set1_ps(inverse);
  const __m256i zeros = _mm256_set1_epi32(zero), top = _mm256_set1_epi32(127);
  const __m256i bottom = _mm256_set1_epi32(asymmetric ? -128 : -127);
  for (int64_t i = 0; i < count; i += 8) {
    const __m256i code = rounded(_mm256_mul_ps(load(x, i, dtype, count), inverses));
    const __m256i shifted = _mm256_add_epi32(code, zeros);
    store(q, i, _mm256_min_epi32(_mm256_max_epi32(shifted, bottom), top), count);
  }
}

void by_scale(const void* x, DType dtype, int64_t count, float inverse_scale, int32_t zero_point,
              bool is_signed, void* q, QuantizeFindings* findings) {
  const __m256 inverses = _mm256_set1_ps(inverse_scale);
  const __m256i zeros = _mm256_set1_epi32(zero_point);
  const __m256i bottom = _mm256_set1_epi32(is_signed ? -127 : 0);
  const __m256i top = _mm256_set1_epi32(is_signed ? 127 : 255);
  for (int64_t i = 0; i < count; i += 8) {
    const __m256 v = load(x, i, dtype, count);
    note(v, is_finite(v), findings);
    const __m256i code = _mm256_add_epi32(rounded(_mm256_mul_ps(v, inverses)), zeros);
    store(q, i, _mm256_min_epi32(_mm256_max_epi32(code, bottom), top), count);
  }
}

}  // namespace

extern const QuantizeKernel quantize_avx2 = {row, by_scale};

}  // namespace narrowcast
