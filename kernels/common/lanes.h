// One vector type for rooms whose loops read the same at every width: sixteen, eight or one float,
// by the flags of the file that includes this. Internal linkage throughout.
#pragma once
#include <math.h>

#include "common/activation.h"
#include "common/tensor_view.h"
#if defined(__AVX512F__)
#include "common/vec_avx512.h"
#elif defined(__AVX2__)
#include "common/vec_avx2.h"
#else
#include "common/half.h"
#endif

namespace narrowcast {
namespace {

#if defined(__AVX512F__)
struct Lanes {
  using T = __m512;
  static constexpr int64_t kWidth = 16;
  static T set(float v) { return _mm512_set1_ps(v); }
  static T load(const void* p, int64_t i, DType t) { return load16(p, i, t, 0xffff); }
  static T load(const void* p, int64_t i, DType t, int64_t n) { return load16(p, i, t, mask16(n)); }
  static void store(void* p, int64_t i, DType t, T v) { store16(p, i, t, 0xffff, v); }
  static void store(void* p, int64_t i, DType t, T v, int64_t n) { store16(p, i, t, mask16(n), v); }
  static T first(T v, int64_t n) { return _mm512_maskz_mov_ps(mask16(n), v); }
  static T add(T a, T b) { return _mm512_add_ps(a, b); }
  static T sub(T a, T b) { return _mm512_sub_ps(a, b); }
  static T mul(T a, T b) { return _mm512_mul_ps(a, b); }
  static T fma(T a, T b, T c) { return _mm512_fmadd_ps(a, b, c); }
  // b when one is NaN.
  static T max(T a, T b) { return _mm512_max_ps(a, b); }
  static T min(T a, T b) { return _mm512_min_ps(a, b); }
  static float sum(T v) { return _mm512_reduce_add_ps(v); }
  static T act(Activation a, T v) { return activate16(a, v); }
};
#elif defined(__AVX2__)
struct Lanes {
  using T = __m256;
  static constexpr int64_t kWidth = 8;
  static T set(float v) { return _mm256_set1_ps(v); }
  static T load(const void* p, int64_t i, DType t) { return load8(p, i, t); }
  static T load(const void* p, int64_t i, DType t, int64_t n) {
    return n >= 8 ? load8(p, i, t) : load8_tail(p, i, t, n);
  }
  static void store(void* p, int64_t i, DType t, T v) { store8(p, i, t, v); }
  static void store(void* p, int64_t i, DType t, T v, int64_t n) {
    n >= 8 ? store8(p, i, t, v) : store8_tail(p, i, t, v, n);
  }
  static T first(T v, int64_t n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i count = _mm256_set1_epi32(static_cast<int>(n < 8 ? n : 8));
    return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpgt_epi32(count, lane)));
  }
  static T add(T a, T b) { return _mm256_add_ps(a, b); }
  static T sub(T a, T b) { return _mm256_sub_ps(a, b); }
  static T mul(T a, T b) { return _mm256_mul_ps(a, b); }
  static T fma(T a, T b, T c) { return _mm256_fmadd_ps(a, b, c); }
  // b when one is NaN.
  static T max(T a, T b) { return _mm256_max_ps(a, b); }
  static T min(T a, T b) { return _mm256_min_ps(a, b); }
  static float sum(T v) { return sum8(v); }
  static T act(Activation a, T v) { return activate8(a, v); }
};
#else
struct Lanes {
  using T = float;
  static constexpr int64_t kWidth = 1;
  static T set(float v) { return v; }
  static T load(const void* p, int64_t i, DType t, int64_t = 1) {
    if (t == DType::kFloat32) return static_cast<const float*>(p)[i];
    const uint16_t h = static_cast<const uint16_t*>(p)[i];
    return t == DType::kFloat16 ? from_float16(h) : from_bfloat16(h);
  }
  static void store(void* p, int64_t i, DType t, T v, int64_t = 1) {
    if (t == DType::kFloat32)
      static_cast<float*>(p)[i] = v;
    else
      static_cast<uint16_t*>(p)[i] = t == DType::kFloat16 ? to_float16(v) : to_bfloat16(v);
  }
  static T first(T v, int64_t) { return v; }
  static T add(T a, T b) { return a + b; }
  static T sub(T a, T b) { return a - b; }
  static T mul(T a, T b) { return a * b; }
  static T fma(T a, T b, T c) { return a * b + c; }
  static T max(T a, T b) { return a > b ? a : b; }
  static T min(T a, T b) { return a < b ? a : b; }
  static float sum(T v) { return v; }
  static T act(Activation a, T v) { return activate(a, v); }
};
#endif

// body(i) for each whole vector of [0, count), body(i, left) for the rest: the loops stay
// branchless.
template <class Body>
[[gnu::always_inline]] inline void over_lanes(int64_t count, Body&& body) {
  int64_t i = 0;
  for (; i + Lanes::kWidth <= count; i += Lanes::kWidth) body(i, Lanes::kWidth);
  if (i < count) body(i, count - i);
}

}  // namespace
}  // namespace narrowcast
