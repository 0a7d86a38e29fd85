// Sixteen floats at a time: conversion on load and store, elementary functions, activations.
// Polynomials after Cephes (S. Moshier, expf, tanhf, erff) and Abramowitz & Stegun 7.1.26.
// Internal linkage throughout: these files are included by ISA files, whose inline code must not be
// shared with the rest of the library.
#pragma once
#include <immintrin.h>

#include "common/activation.h"
#include "common/tensor_view.h"

namespace narrowcast {

// The first `count` lanes; all sixteen from 16 up.
static inline __mmask16 mask16(int64_t count) {
  return count >= 16 ? 0xffff : static_cast<__mmask16>((1u << count) - 1);
}

// p[i .. i + 15] of float32, float16 or bfloat16; lanes outside the mask are 0 and not read.
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

static inline __m512 polynomial16(__m512 x, const float* coefficients, int count) {
  __m512 p = _mm512_set1_ps(coefficients[0]);
  for (int i = 1; i < count; ++i) p = _mm512_fmadd_ps(p, x, _mm512_set1_ps(coefficients[i]));
  return p;
}

// e^x to about one ulp; 0 and inf past the range, NaN stays NaN.
static inline __m512 exp16(__m512 x) {
  static const float kPoly[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  x = _mm512_min_ps(_mm512_set1_ps(150.0f), _mm512_max_ps(_mm512_set1_ps(-150.0f), x));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);  // ln 2 in two parts
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  const __m512 p = polynomial16(r, kPoly, 6);
  const __m512 y = _mm512_fmadd_ps(_mm512_mul_ps(r, r), p, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(y, n);
}

static inline __m512 tanh16(__m512 x) {
  static const float kPoly[] = {-5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f,
                                1.33314422036e-1f, -3.33332819422e-1f};
  const __m512 one = _mm512_set1_ps(1.0f), square = _mm512_mul_ps(x, x);
  const __m512 small = _mm512_fmadd_ps(_mm512_mul_ps(x, square), polynomial16(square, kPoly, 5), x);
  const __m512 e = exp16(_mm512_add_ps(x, x));
  const __m512 large =
      _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(e, one)));
  return _mm512_mask_mov_ps(
      small, _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(0.625f), _CMP_GT_OQ), large);
}

static inline __m512 erf16(__m512 x) {
  static const float kSmall[] = {
      7.853861353153693e-5f, -8.010193625184903e-4f, 5.188327685732524e-3f, -2.685381193529856e-2f,
      1.128358514861418e-1f, -3.761262582423300e-1f, 1.128379165726710f};
  static const float kLarge[] = {1.061405429f,  -1.453152027f, 1.421413741f,
                                 -0.284496736f, 0.254829592f,  0.0f};
  const __m512 one = _mm512_set1_ps(1.0f), a = _mm512_abs_ps(x), square = _mm512_mul_ps(x, x);
  const __m512 small = _mm512_mul_ps(x, polynomial16(square, kSmall, 7));
  const __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(a, _mm512_set1_ps(0.3275911f), one));
  const __m512 tail =
      _mm512_mul_ps(polynomial16(t, kLarge, 6), exp16(_mm512_sub_ps(_mm512_setzero_ps(), square)));
  const __m512 sign = _mm512_and_ps(x, _mm512_set1_ps(-0.0f));
  const __m512 large = _mm512_or_ps(_mm512_sub_ps(one, tail), sign);
  return _mm512_mask_mov_ps(small, _mm512_cmp_ps_mask(a, one, _CMP_GT_OQ), large);
}

static inline __m512 silu16(__m512 x) {
  const __m512 e = exp16(_mm512_sub_ps(_mm512_setzero_ps(), x));
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), e));
}

static inline __m512 gelu16(__m512 x) {
  const __m512 e = erf16(_mm512_mul_ps(x, _mm512_set1_ps(0.70710678118654752f)));
  return _mm512_mul_ps(_mm512_mul_ps(_mm512_set1_ps(0.5f), x),
                       _mm512_add_ps(_mm512_set1_ps(1.0f), e));
}

static inline __m512 gelu_tanh16(__m512 x) {
  const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
  const __m512 inner = _mm512_mul_ps(_mm512_set1_ps(0.79788456080286536f),
                                     _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x));
  return _mm512_mul_ps(_mm512_mul_ps(_mm512_set1_ps(0.5f), x),
                       _mm512_add_ps(_mm512_set1_ps(1.0f), tanh16(inner)));
}

// The formulas of activation.h; none, relu, relu6 and hardswish bit for bit.
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
    case Activation::kSilu:
      return silu16(x);
    case Activation::kGelu:
      return gelu16(x);
    case Activation::kGeluTanh:
      return gelu_tanh16(x);
  }
  return x;
}

}  // namespace narrowcast
