// Scores by vpdpbusd, for the AVX-512 kernels of the room.
#pragma once
#include "attention/attention_wide_avx512.h"
#include "attention_int8/attention_int8_tile.h"

namespace narrowcast {
namespace {

template <class Base>
struct Vnni : Base {
  static constexpr uint32_t kFlip = 0x80808080u;  // q + 128, the unsigned side of vpdpbusd

  template <int N, int K>
  static void block(const uint8_t* q, const int8_t* k, int64_t depth, const float* scales,
                    const int32_t* sums, const float* factor, const float* offset, float* scores) {
    __m512i acc[K][N];
#pragma GCC unroll 8
    for (int i = 0; i < K; ++i)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[i][n] = _mm512_set1_epi32(-128 * sums[i]);
    for (int64_t d = 0; d < depth; d += 4) {
      __m512i x[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) x[n] = _mm512_loadu_si512(q + d * kAttentionRows + n * 64);
#pragma GCC unroll 8
      for (int i = 0; i < K; ++i) {
        int32_t four;
        memcpy(&four, k + i * depth + d, 4);
        const __m512i y = _mm512_set1_epi32(four);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc[i][n] = _mm512_dpbusd_epi32(acc[i][n], x[n], y);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < K; ++i)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n)
        Base::store(scores + i * kAttentionRows + n * 16,
                    Base::fma(Base::mul(_mm512_cvtepi32_ps(acc[i][n]), Base::set(scales[i])),
                              Base::load(factor + n * 16), Base::load(offset + n * 16)));
  }

  template <int N>
  static void columns(const uint8_t* q, const int8_t* k, int64_t depth, int64_t keys,
                      const float* scales, const int32_t* sums, const float* factor,
                      const float* offset, float* scores) {
    constexpr int kKeys = N == 4 ? 4 : 8;
    int64_t j = 0;
    for (; j + kKeys <= keys; j += kKeys)
      block<N, kKeys>(q, k + j * depth, depth, scales + j, sums + j, factor, offset,
                      scores + j * kAttentionRows);
    for (; j < keys; ++j)
      block<N, 1>(q, k + j * depth, depth, scales + j, sums + j, factor, offset,
                  scores + j * kAttentionRows);
  }

  static void int8_scores(const uint8_t* q, const int8_t* k, int64_t depth, int64_t keys,
                          int64_t lanes, const float* scales, const int32_t* sums,
                          const float* factor, const float* offset, float* scores) {
    int64_t r = 0;
    for (; r + 64 <= lanes; r += 64)
      columns<4>(q + r * 4, k, depth, keys, scales, sums, factor + r, offset + r, scores + r);
    for (; r + 32 <= lanes; r += 32)
      columns<2>(q + r * 4, k, depth, keys, scales, sums, factor + r, offset + r, scores + r);
    for (; r < lanes; r += 16)
      columns<1>(q + r * 4, k, depth, keys, scales, sums, factor + r, offset + r, scores + r);
  }
};

}  // namespace
}  // namespace narrowcast
