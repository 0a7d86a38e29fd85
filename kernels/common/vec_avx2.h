// Eight floats at a time: conversion on load and store, elementary functions, activations.
// The formulas of vec_avx512.h.
// Internal linkage throughout: these files are included by ISA files, whose inline code must not be
// shared with the rest of the library.
#pragma once
#include <immintrin.h>
#include <string.h>

#include "common/activation.h"
#include "common/tensor_view.h"

namespace narrowcast {

static inline __m256 float_of_bfloat16x8(__m128i h) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

// p[i .. i + 7] of float32, float16 or bfloat16.
static inline __m256 load8(const void* p, int64_t i, DType dtype) {
  if (dtype == DType::kFloat32) return _mm256_loadu_ps(static_cast<const float*>(p) + i);
  const __m128i h =
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(p) + i));
  return dtype == DType::kFloat16 ? _mm256_cvtph_ps(h) : float_of_bfloat16x8(h);
}

static inline __m128i to_bfloat16x8(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v), top = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(top, _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(
      _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i h = _mm256_blendv_epi8(rounded, _mm256_or_si256(top, _mm256_set1_epi32(0x40)), nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(h, h), 0x08);
  return _mm256_castsi256_si128(packed);
}

static inline void store8(void* p, int64_t i, DType dtype, __m256 v) {
  if (dtype == DType::kFloat32) return _mm256_storeu_ps(static_cast<float*>(p) + i, v);
  const __m128i h = dtype == DType::kFloat16
                        ? _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
                        : to_bfloat16x8(v);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(p) + i), h);
}

// The same for count < 8 elements; the missing lanes are 0, and no byte past the last is touched.
static inline __m256 load8_tail(const void* p, int64_t i, DType dtype, int64_t count) {
  alignas(32) char buffer[32] = {};
  const int64_t size = dtype == DType::kFloat32 ? 4 : 2;
  memcpy(buffer, static_cast<const char*>(p) + i * size, static_cast<size_t>(count * size));
  return load8(buffer, 0, dtype);
}

static inline void store8_tail(void* p, int64_t i, DType dtype, __m256 v, int64_t count) {
  alignas(32) char buffer[32];
  const int64_t size = dtype == DType::kFloat32 ? 4 : 2;
  store8(buffer, 0, dtype, v);
  memcpy(static_cast<char*>(p) + i * size, buffer, static_cast<size_t>(count * size));
}

static inline float sum8(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

static inline float max8(__m256 v) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}

static inline __m256 abs8(__m256 v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }

static inline __m256 polynomial8(__m256 x, const float* coefficients, int count) {
  __m256 p = _mm256_set1_ps(coefficients[0]);
  for (int i = 1; i < count; ++i) p = _mm256_fmadd_ps(p, x, _mm256_set1_ps(coefficients[i]));
  return p;
}

// e^x to about one ulp; 0 and inf past the range, NaN stays NaN.
static inline __m256 exp8(__m256 x) {
  static const float kPoly[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  x = _mm256_min_ps(_mm256_set1_ps(150.0f), _mm256_max_ps(_mm256_set1_ps(-150.0f), x));
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504088896341f)),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);  // ln 2 in two parts
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  const __m256 p = polynomial8(r, kPoly, 6);
  const __m256 y = _mm256_fmadd_ps(_mm256_mul_ps(r, r), p, _mm256_add_ps(r, _mm256_set1_ps(1.0f)));
  // 2^n in two factors: n reaches -216 .. 216, an exponent field holds -126 .. 127.
  const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i other = _mm256_sub_epi32(whole, half);
  const __m256 a = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 b = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(other, bias), 23));
  const __m256 result = _mm256_mul_ps(_mm256_mul_ps(y, a), b);
  return _mm256_blendv_ps(result, x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}

static inline __m256 tanh8(__m256 x) {
  static const float kPoly[] = {-5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f,
                                1.33314422036e-1f, -3.33332819422e-1f};
  const __m256 one = _mm256_set1_ps(1.0f), square = _mm256_mul_ps(x, x);
  const __m256 small = _mm256_fmadd_ps(_mm256_mul_ps(x, square), polynomial8(square, kPoly, 5), x);
  const __m256 e = exp8(_mm256_add_ps(x, x));
  const __m256 large =
      _mm256_sub_ps(one, _mm256_div_ps(_mm256_set1_ps(2.0f), _mm256_add_ps(e, one)));
  return _mm256_blendv_ps(small, large, _mm256_cmp_ps(abs8(x), _mm256_set1_ps(0.625f), _CMP_GT_OQ));
}

static inline __m256 erf8(__m256 x) {
  static const float kSmall[] = {
      7.853861353153693e-5f, -8.010193625184903e-4f, 5.188327685732524e-3f, -2.685381193529856e-2f,
      1.128358514861418e-1f, -3.761262582423300e-1f, 1.128379165726710f};
  static const float kLarge[] = {1.061405429f,  -1.453152027f, 1.421413741f,
                                 -0.284496736f, 0.254829592f,  0.0f};
  const __m256 one = _mm256_set1_ps(1.0f), a = abs8(x), square = _mm256_mul_ps(x, x);
  const __m256 small = _mm256_mul_ps(x, polynomial8(square, kSmall, 7));
  const __m256 t = _mm256_div_ps(one, _mm256_fmadd_ps(a, _mm256_set1_ps(0.3275911f), one));
  const __m256 tail =
      _mm256_mul_ps(polynomial8(t, kLarge, 6), exp8(_mm256_sub_ps(_mm256_setzero_ps(), square)));
  const __m256 sign = _mm256_and_ps(x, _mm256_set1_ps(-0.0f));
  const __m256 large = _mm256_or_ps(_mm256_sub_ps(one, tail), sign);
  return _mm256_blendv_ps(small, large, _mm256_cmp_ps(a, one, _CMP_GT_OQ));
}

static inline __m256 silu8(__m256 x) {
  const __m256 e = exp8(_mm256_sub_ps(_mm256_setzero_ps(), x));
  return _mm256_div_ps(x, _mm256_add_ps(_mm256_set1_ps(1.0f), e));
}

static inline __m256 gelu8(__m256 x) {
  const __m256 e = erf8(_mm256_mul_ps(x, _mm256_set1_ps(0.70710678118654752f)));
  return _mm256_mul_ps(_mm256_mul_ps(_mm256_set1_ps(0.5f), x),
                       _mm256_add_ps(_mm256_set1_ps(1.0f), e));
}

static inline __m256 gelu_tanh8(__m256 x) {
  const __m256 cube = _mm256_mul_ps(_mm256_mul_ps(x, x), x);
  const __m256 inner = _mm256_mul_ps(_mm256_set1_ps(0.79788456080286536f),
                                     _mm256_fmadd_ps(cube, _mm256_set1_ps(0.044715f), x));
  return _mm256_mul_ps(_mm256_mul_ps(_mm256_set1_ps(0.5f), x),
                       _mm256_add_ps(_mm256_set1_ps(1.0f), tanh8(inner)));
}

// The formulas of activation.h; none, relu, relu6 and hardswish bit for bit.
static inline __m256 activate8(Activation activation, __m256 x) {
  const __m256 zero = _mm256_setzero_ps(), six = _mm256_set1_ps(6.0f);
  switch (activation) {
    case Activation::kNone:
      return x;
    // The second operand of max / min is the result when one is NaN.
    case Activation::kRelu:
      return _mm256_max_ps(zero, x);
    case Activation::kRelu6:
      return _mm256_min_ps(six, _mm256_max_ps(zero, x));
    case Activation::kHardswish: {
      const __m256 shifted = _mm256_add_ps(x, _mm256_set1_ps(3.0f));
      const __m256 gate = _mm256_min_ps(six, _mm256_max_ps(zero, shifted));
      return _mm256_mul_ps(_mm256_mul_ps(x, gate), _mm256_set1_ps(1.0f / 6.0f));
    }
    case Activation::kSilu:
      return silu8(x);
    case Activation::kGelu:
      return gelu8(x);
    case Activation::kGeluTanh:
      return gelu_tanh8(x);
  }
  return x;
}

}  // namespace narrowcast
