// linear_int8 with vpdpbusd, which multiplies unsigned by signed bytes: the weights are stored plus
// 128, and the accumulators of row m start at -128 * sum_k x[m, k], which cancels the shift exactly
// (modulo 2^32).
//
// Panel: [K / 4][64][4] bytes (K padded by zeros), then the sums of its 64 rows as int32.
// Tile: 6 rows x 64 columns = 24 accumulators, 4 weight vectors and a broadcast of 4 activations:
// 29 registers; with groups 3 x 64, since integer and float accumulators are live together. Bound:
// one vpdpbusd (64 products) per cycle on Zen 4; for few rows the bandwidth of the packed weights.
#include <immintrin.h>

#include "common/dot4_avx512.h"
#include "linear_int8/linear_int8_panel_avx512.h"

namespace narrowcast {
namespace {

constexpr auto padded = padded_to<4>;

template <int R, int V>
[[gnu::always_inline]] inline void step(const int8_t* x, int64_t ldx, const uint8_t* w,
                                        __m512i (&acc)[R][V]) {
  __m512i weights[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) weights[v] = _mm512_loadu_si512(w + v * 64);
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    int32_t four;
    __builtin_memcpy(&four, x + r * ldx, 4);
    const __m512i activations = _mm512_set1_epi32(four);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) dot4(acc[r][v], weights[v], activations);
  }
}

template <int R, int V>
[[gnu::always_inline]] inline void multiply(const int8_t* x, int64_t ldx, const uint8_t* w,
                                            int64_t steps, __m512i (&acc)[R][V]) {
  int64_t s = 0;
  for (; s + 8 <= steps; s += 8, w += 8 * kStep, x += 32)
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) step<R, V>(x + 4 * i, ldx, w + i * kStep, acc);
  for (; s < steps; ++s, w += kStep, x += 4) step<R, V>(x, ldx, w, acc);
}

template <int R, int V>
void tile(const LinearInt8Args& a, const uint8_t* panel, int64_t m, int64_t n0, int columns) {
  const int8_t* x = a.x + m * a.ldx;
  const int32_t* w_sum =
      reinterpret_cast<const int32_t*>(panel + padded(a.depth) * kLinearInt8Panel);
  __m512i acc[R][V], out[R][4];
  if (a.pieces == 1 && !a.group) {
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = _mm512_set1_epi32(a.start[m + r]);
    multiply<R, V>(x, a.ldx, panel, padded(a.depth) / 4, acc);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) _mm512_store_si512(&out[r][v], acc[r][v]);
    return finish_tile(a, out[0], false, m, R, n0, columns, w_sum);
  }
  if constexpr (R <= 3) {
    __m512 total[R][V];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) total[r][v] = _mm512_setzero_ps();
    for (int64_t p = 0; p < a.pieces; ++p) {
      const int64_t k = p * a.piece, count = a.depth - k < a.piece ? a.depth - k : a.piece;
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[r][v] = _mm512_set1_epi32(a.start[(m + r) * a.pieces + p]);
      multiply<R, V>(x + k, a.ldx, panel + k / 4 * kStep, padded(count) / 4, acc);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const __m512 scale =
            _mm512_set1_ps(a.group ? a.x_scale[(m + r) * a.x_scale_stride + p] : 1.0f);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
          total[r][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[r][v]), scale, total[r][v]);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) _mm512_store_si512(&out[r][v], _mm512_castps_si512(total[r][v]));
    finish_tile(a, out[0], true, m, R, n0, columns, w_sum);
  }
}

template <int V>
void block_of(const LinearInt8Args& a, const uint8_t* panel, int64_t m0, int64_t m1, int64_t n0,
              int columns) {
  int64_t m = m0;
  if (a.pieces == 1 && !a.group)
    for (; m + 6 <= m1; m += 6) tile<6, V>(a, panel, m, n0, columns);
  else
    for (; m + 3 <= m1; m += 3) tile<3, V>(a, panel, m, n0, columns);
  switch (m1 - m) {
    case 1:
      return tile<1, V>(a, panel, m, n0, columns);
    case 2:
      return tile<2, V>(a, panel, m, n0, columns);
    case 3:
      return tile<3, V>(a, panel, m, n0, columns);
    case 4:
      return tile<4, V>(a, panel, m, n0, columns);
    case 5:
      return tile<5, V>(a, panel, m, n0, columns);
  }
}

void block(const LinearInt8Args& a, const uint8_t* panel, int64_t m0, int64_t m1, int64_t n0,
           int columns) {
  switch ((columns + 15) / 16) {
    case 1:
      return block_of<1>(a, panel, m0, m1, n0, columns);
    case 2:
      return block_of<2>(a, panel, m0, m1, n0, columns);
    case 3:
      return block_of<3>(a, panel, m0, m1, n0, columns);
    default:
      return block_of<4>(a, panel, m0, m1, n0, columns);
  }
}

}  // namespace

extern const LinearInt8Kernel linear_int8_avx512 = {
    "vnni64", 4, panel_bytes<4>, pack<4, true>, block, row_starts, direct, 4};

}  // namespace narrowcast
