// The type of attention_wide_avx512.h with bfloat16 values weighed by vdpbf16ps: weights rounded to
// bfloat16, two keys a step, sums in float32.
#pragma once
#include "attention/attention_wide_avx512.h"

namespace narrowcast {
namespace {

// Two vectors of bfloat16 as 32-bit pairs, the first in the low half.
static inline __m512i pair16(__m256i low, __m256i high) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(low),
                         _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

[[gnu::always_inline]] static inline __m512 dot_pairs(__m512 acc, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

struct WidePairs : Wide {
  static constexpr bool kPairs = true;

  // pairs[j / 2][c] = v[j][c], v[j + 1][c]; returns whether all of them are finite.
  static bool pair_values(const AttentionArgs& a, const AttentionItem& it, const Sequence& s,
                          int64_t key, int64_t count, uint32_t* pairs, int64_t ld) {
    const uint16_t* v = static_cast<const uint16_t*>(a.v) + it.sequence * a.v_strides.batch +
                        it.kv_head * a.v_strides.head + (s.k0 + key) * a.v_strides.row;
    const __m512i low = _mm512_set1_epi32(0x7f80), high = _mm512_set1_epi32(0x7f800000);
    __mmask16 odd = 0;
    for (int64_t j = 0; j < count; j += 2)
      for (int64_t c = 0; c < a.v_depth; c += 16) {
        const __mmask16 mask = mask16(a.v_depth - c);
        const uint16_t* at = v + j * a.v_strides.row + c;
        const __m256i x = _mm256_maskz_loadu_epi16(mask, at);
        const __m256i y = j + 1 < count ? _mm256_maskz_loadu_epi16(mask, at + a.v_strides.row)
                                        : _mm256_setzero_si256();
        const __m512i both = pair16(x, y);
        odd |= _mm512_cmpeq_epi32_mask(_mm512_and_si512(both, low), low);
        odd |= _mm512_cmpeq_epi32_mask(_mm512_and_si512(both, high), high);
        _mm512_storeu_si512(pairs + j / 2 * ld + c, both);
      }
    return odd == 0;
  }

  template <int N>
  static void columns(const uint32_t* p, const uint32_t* v, int64_t steps, const float* keep,
                      float* sums, int64_t ld) {
    __m512 acc[4][N];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[r][n] = mul(set(keep[r]), load(sums + r * ld + n * 16));
    for (int64_t j = 0; j < steps; ++j) {
      __m512i x[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) x[n] = _mm512_loadu_si512(v + j * ld + n * 16);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const __m512i w = _mm512_set1_epi32(static_cast<int>(p[j * kAttentionRows + r]));
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc[r][n] = dot_pairs(acc[r][n], x[n], w);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) store(sums + r * ld + n * 16, acc[r][n]);
  }

  // weights [key][row] become pairs of keys where they lie; then sums = sums * keep + weights v.
  static void weigh_pairs(float* weights, const uint32_t* pairs, int64_t count, int64_t rows,
                          const float* keep, float* sums, int64_t ld) {
    const int64_t lanes = round_up(rows, 16), steps = (count + 1) / 2;
    for (int64_t j = 0; j < count; j += 2)
      for (int64_t r = 0; r < lanes; r += 16) {
        const __m512 x = load(weights + j * kAttentionRows + r);
        const __m512 y =
            j + 1 < count ? load(weights + (j + 1) * kAttentionRows + r) : _mm512_setzero_ps();
        const __m512i both = pair16(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)),
                                    reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(y)));
        _mm512_storeu_si512(weights + j / 2 * kAttentionRows + r, both);
      }
    const uint32_t* p = reinterpret_cast<const uint32_t*>(weights);
    for (int64_t r = 0; r < rows; r += 4) {
      int64_t c = 0;
      for (; c + 64 <= ld; c += 64)
        columns<4>(p + r, pairs + c, steps, keep + r, sums + r * ld + c, ld);
      for (; c + 32 <= ld; c += 32)
        columns<2>(p + r, pairs + c, steps, keep + r, sums + r * ld + c, ld);
      for (; c < ld; c += 16) columns<1>(p + r, pairs + c, steps, keep + r, sums + r * ld + c, ld);
    }
  }
};

}  // namespace
}  // namespace narrowcast
