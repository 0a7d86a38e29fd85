// epilogue.h for 16 columns at once.
#pragma once
#include <immintrin.h>

#include "common/epilogue.h"
#include "common/vec_avx512.h"

namespace narrowcast {

// Out of line: the code of every activation twice in each loop would push the rest out of reach.
[[gnu::noinline]] static __m512 activate16_far(Activation activation, __m512 v) {
  return activate16(activation, v);
}

static inline __m512 activate16_or_skip(Activation activation, __m512 v) {
  if (activation == Activation::kNone) [[likely]]
    return v;
  if (activation > Activation::kRelu6) return activate16_far(activation, v);
  v = _mm512_max_ps(_mm512_setzero_ps(), v);  // as in activate16: NaN stays NaN
  return activation == Activation::kRelu ? v : _mm512_min_ps(_mm512_set1_ps(6.0f), v);
}

// The last step of finish16: v to the element `at` of the output.
static inline void put16(const Epilogue& e, int64_t at, __m512 v, __mmask16 mask) {
  if (e.out_dtype != DType::kInt8 && e.out_dtype != DType::kUInt8)
    return store16(e.out, at, e.out_dtype, mask, v);
  const bool is_signed = e.out_dtype == DType::kInt8;
  v = _mm512_mul_ps(v, _mm512_set1_ps(1.0f / e.out_scale));
  v = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v, v, _CMP_ORD_Q), v);
  v = _mm512_min_ps(_mm512_max_ps(v, _mm512_set1_ps(-1024.0f)), _mm512_set1_ps(1024.0f));
  __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32(v), _mm512_set1_epi32(e.out_zero_point));
  q = _mm512_max_epi32(q, _mm512_set1_epi32(is_signed ? -127 : 0));
  q = _mm512_min_epi32(q, _mm512_set1_epi32(is_signed ? 127 : 255));
  _mm_mask_storeu_epi8(static_cast<int8_t*>(e.out) + at, mask, _mm512_cvtepi32_epi8(q));
}

static inline void finish16(const Epilogue& e, __m512 v, int64_t m, int64_t n, __mmask16 mask) {
  if (e.bias) v = _mm512_add_ps(v, load16(e.bias, n, e.bias_dtype, mask));
  v = activate16_or_skip(e.activation, v);
  if (e.residual)
    v = _mm512_add_ps(v, load16(e.residual, m * e.ld_residual + n, e.residual_dtype, mask));
  v = activate16_or_skip(e.post_activation, v);
  put16(e, m * e.ld_out + n, v, mask);
}

constexpr int kTileColumns = 64;  // of a row of a tile, filled or not

[[gnu::noinline]] static void activate_tile16(Activation activation, float* tile, int rows) {
  const auto each = [&](auto f) __attribute__((always_inline)) {
    for (int i = 0; i < rows * kTileColumns; i += 16)
      _mm512_store_ps(tile + i, f(_mm512_load_ps(tile + i)));
  };
  switch (activation) {
    case Activation::kRelu:
      return each([](__m512 x) { return activate16(Activation::kRelu, x); });
    case Activation::kRelu6:
      return each([](__m512 x) { return activate16(Activation::kRelu6, x); });
    case Activation::kGelu:
      return each(gelu16);
    default:
      return each([=](__m512 x) { return activate16_far(activation, x); });
  }
}

// finish16, but for the bias, of a whole tile of float sums: each stage asks once, not per vector,
// what it has to do. The tile is 64-byte aligned and is written to.
static inline void finish_tile16(const Epilogue& e, float* tile, int64_t m0, int rows, int64_t n0,
                                 int columns) {
  if (e.activation != Activation::kNone) activate_tile16(e.activation, tile, rows);
  const auto each = [&](auto f) __attribute__((always_inline)) {
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < columns; c += 16)
        f(tile + r * kTileColumns + c, m0 + r, n0 + c, mask16(columns - c));
  };
  // The usual dtype is a constant of the loop, any other is asked for per vector.
  const auto add_residual = [&](DType dtype) __attribute__((always_inline)) {
    each([&](float* x, int64_t m, int64_t n, __mmask16 mask) __attribute__((always_inline)) {
      const __m512 more = load16(e.residual, m * e.ld_residual + n, dtype, mask);
      _mm512_store_ps(x, _mm512_add_ps(_mm512_load_ps(x), more));
    });
  };
  if (e.residual && e.residual_dtype == DType::kFloat32)
    add_residual(DType::kFloat32);
  else if (e.residual)
    add_residual(e.residual_dtype);
  if (e.post_activation != Activation::kNone) activate_tile16(e.post_activation, tile, rows);
  if (e.out_dtype == DType::kFloat32)
    each([&](float* x, int64_t m, int64_t n, __mmask16 mask) __attribute__((always_inline)) {
      store16(e.out, m * e.ld_out + n, DType::kFloat32, mask, _mm512_load_ps(x));
    });
  else
    each([&](float* x, int64_t m, int64_t n, __mmask16 mask) {
      put16(e, m * e.ld_out + n, _mm512_load_ps(x), mask);
    });
}

}  // namespace narrowcast
