// The vector type that attention_tile.h asks for, for files compiled for avx512.
#pragma once
#include "attention/attention_tile.h"
#include "common/vec_avx512.h"

namespace narrowcast {
namespace {

struct Wide {
  using T = __m512;
  static constexpr bool kPairs = false;  // v as float32, not as pairs of bfloat16
  static constexpr int64_t kWidth = 16, kColumns = 4;
  static T set(float x) { return _mm512_set1_ps(x); }
  static T load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, T x) { _mm512_storeu_ps(p, x); }
  static T fma(T a, T b, T c) { return _mm512_fmadd_ps(a, b, c); }
  static T mul(T a, T b) { return _mm512_mul_ps(a, b); }
  static T add(T a, T b) { return _mm512_add_ps(a, b); }
  static T sub(T a, T b) { return _mm512_sub_ps(a, b); }
  static T max(T a, T b) { return _mm512_max_ps(a, b); }
  static T exp(T x) { return exp16(x); }
  static T tanh(T x) { return tanh16(x); }
  static T finite_or_zero(T x) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, set(-__builtin_inff()), _CMP_NEQ_UQ), x);
  }
  static T outside(int32_t key, const int32_t* first, const int32_t* last, T x, float none) {
    const __m512i j = _mm512_set1_epi32(key);
    const __mmask16 seen = _mm512_cmple_epi32_mask(_mm512_load_si512(first), j) &
                           _mm512_cmplt_epi32_mask(j, _mm512_load_si512(last));
    return _mm512_mask_mov_ps(set(none), seen, x);
  }
  [[gnu::always_inline]] static T widen(const char* p, int64_t i, DType dtype) {
    if (dtype == DType::kFloat32) return load(reinterpret_cast<const float*>(p) + i);
    if (dtype == DType::kInt8)
      return _mm512_cvtepi32_ps(
          _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i))));
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 2 * i));
    if (dtype == DType::kFloat16) return _mm512_cvtph_ps(h);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }
  static T widen_tail(const char* p, int64_t i, DType dtype, int64_t count) {
    const __mmask16 mask = mask16(count);
    if (dtype != DType::kInt8) return load16(p, i, dtype, mask);
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, p + i)));
  }
  // Elements of 4 bits: byte i at p, shifted.
  [[gnu::always_inline]] static T nibbles(const char* p, int shift) {
    const __m512i bytes =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m512i code = _mm512_srl_epi32(bytes, _mm_cvtsi32_si128(shift));
    return _mm512_cvtepi32_ps(_mm512_and_si512(code, _mm512_set1_epi32(15)));
  }
  // Lane i of the result: the sum of the 16 floats at p + 16 i.
  [[gnu::always_inline]] static T reduce(const float* p) {
    T x[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) x[i] = _mm512_load_ps(p + 16 * i);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2)
      x[i / 2] = add(_mm512_unpacklo_ps(x[i], x[i + 1]), _mm512_unpackhi_ps(x[i], x[i + 1]));
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      const __m512d a = _mm512_castps_pd(x[i]), b = _mm512_castps_pd(x[i + 1]);
      x[i / 2] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                     _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    const auto halves = [](T a, T b) {
      return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    return halves(halves(x[0], x[1]), halves(x[2], x[3]));
  }
  static void load_row(const char* p, DType dtype, float scale, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += 16) {
      const __mmask16 mask = mask16(count - i);
      _mm512_mask_storeu_ps(to + i, mask, mul(widen_tail(p, i, dtype, count - i), set(scale)));
    }
  }
  static void store_row(const float* x, float factor, int64_t count, char* to, DType dtype) {
    for (int64_t i = 0; i < count; i += 16) {
      const __mmask16 mask = mask16(count - i);
      store16(to, i, dtype, mask, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), set(factor)));
    }
  }
};

}  // namespace
}  // namespace narrowcast
