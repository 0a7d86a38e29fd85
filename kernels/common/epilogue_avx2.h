// epilogue.h for up to 8 columns at once.
#pragma once
#include "common/epilogue.h"
#include "common/vec_avx2.h"

namespace narrowcast {

static inline __m256 load_up_to8(const void* p, int64_t i, DType dtype, int64_t count) {
  return count >= 8 ? load8(p, i, dtype) : load8_tail(p, i, dtype, count);
}

// Out of line: the code of every activation twice in each loop would push the rest out of reach.
[[gnu::noinline]] static __m256 activate8_far(Activation activation, __m256 v) {
  return activate8(activation, v);
}

static inline __m256 activate8_or_skip(Activation activation, __m256 v) {
  if (activation == Activation::kNone) return v;
  if (activation > Activation::kRelu6) return activate8_far(activation, v);
  v = _mm256_max_ps(_mm256_setzero_ps(), v);  // as in activate8: NaN stays NaN
  return activation == Activation::kRelu ? v : _mm256_min_ps(_mm256_set1_ps(6.0f), v);
}

static inline void finish8(const Epilogue& e, __m256 v, int64_t m, int64_t n, int64_t count) {
  if (e.bias) v = _mm256_add_ps(v, load_up_to8(e.bias, n, e.bias_dtype, count));
  v = activate8_or_skip(e.activation, v);
  if (e.residual)
    v = _mm256_add_ps(v, load_up_to8(e.residual, m * e.ld_residual + n, e.residual_dtype, count));
  v = activate8_or_skip(e.post_activation, v);
  const int64_t at = m * e.ld_out + n;
  if (e.out_dtype != DType::kInt8 && e.out_dtype != DType::kUInt8)
    return count >= 8 ? store8(e.out, at, e.out_dtype, v)
                      : store8_tail(e.out, at, e.out_dtype, v, count);
  const bool is_signed = e.out_dtype == DType::kInt8;
  v = _mm256_mul_ps(v, _mm256_set1_ps(1.0f / e.out_scale));
  v = _mm256_and_ps(v, _mm256_cmp_ps(v, v, _CMP_ORD_Q));
  v = _mm256_min_ps(_mm256_max_ps(v, _mm256_set1_ps(-1024.0f)), _mm256_set1_ps(1024.0f));
  __m256i q = _mm256_add_epi32(_mm256_cvtps_epi32(v), _mm256_set1_epi32(e.out_zero_point));
  q = _mm256_max_epi32(q, _mm256_set1_epi32(is_signed ? -127 : 0));
  q = _mm256_min_epi32(q, _mm256_set1_epi32(is_signed ? 127 : 255));
  alignas(32) int32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), q);
  int8_t* out = static_cast<int8_t*>(e.out) + at;
  for (int64_t i = 0; i < (count < 8 ? count : 8); ++i) out[i] = static_cast<int8_t>(lanes[i]);
}

}  // namespace narrowcast
