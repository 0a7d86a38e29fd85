// The vector type that attention_tile.h asks for, for files compiled for avx512.
#pragma once
#include "attention/attention_tile.h"
#include "common/vec_avx512.h"

namespace narrowcast {
namespace {

struct Wide {
  using T = __m512;
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
  static void load_row(const char* p, DType dtype, float scale, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += 16) {
      const __mmask16 mask = mask16(count - i);
      const __m512 x =
          dtype == DType::kInt8
              ? _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, p + i)))
              : load16(p, i, dtype, mask);
      _mm512_mask_storeu_ps(to + i, mask, _mm512_mul_ps(x, set(scale)));
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
