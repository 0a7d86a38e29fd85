// linear_grouped, AVX-512 VNNI: one panel of 16 rows of W, one row per lane, times up to 12 rows of
// x.
//
// activation_bits 8: the unsigned codes are the first operand of vpdpbusd, four successive x the
// second, broadcast
//   to all lanes. 12 integer and 12 float sums live in registers. Per block of 32 a row of x costs
//   8 vpdpbusd, one conversion, one product, one or two FMAs: 3/4 of the integer peak at best, 7/8
//   for blocks of 64.
// activation_bits 16: a table of the 16 centred values in one register turns nibbles into floats
// (vpermps reads the
//   low four bits of a lane), so a weight costs a shift and a permutation, shared by all rows of x.
#include <immintrin.h>

#include "common/epilogue_avx512.h"
#include "linear_grouped/linear_grouped_rows.h"

namespace narrowcast {
namespace {

inline __m512 scales16(const GroupedLayout& l, const uint8_t* p, int64_t block) {
  if (l.half)
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + block * 32)));
  return _mm512_loadu_ps(p + block * 64);
}

inline __m512i broadcast4(const int8_t* p) {
  int32_t v;
  memcpy(&v, p, sizeof v);
  return _mm512_set1_epi32(v);
}

template <int M, int Bits>
void tile8(const GroupedLayout& l, const uint8_t* panel, const GroupedRows& x, float* acc,
           int64_t ld) {
  const uint8_t* scales = panel + l.code_bytes;
  const int64_t blocks = l.k / l.block;
  const __m512i low = _mm512_set1_epi8(15);
  const __m512 centre = _mm512_set1_ps(Bits == 4 ? 8.0f : 0.0f);
  __m512 y[M];
  for (int m = 0; m < M; ++m) y[m] = _mm512_setzero_ps();
  const uint8_t* codes = panel;
  const int8_t* xq = x.xq;
  for (int64_t b = 0; b < blocks; ++b) {
    __m512i sum[M];
    for (int m = 0; m < M; ++m) sum[m] = _mm512_set1_epi32(x.start[m * blocks + b]);
    for (int64_t k = 0; k < l.block; k += 32, xq += 32) {
      _mm_prefetch(reinterpret_cast<const char*>(codes + 2048), _MM_HINT_T0);
      if (Bits == 4) _mm_prefetch(reinterpret_cast<const char*>(codes + 2048 + 64), _MM_HINT_T0);
#pragma GCC unroll 8
      for (int t = 0; t < 32; t += Bits == 4 ? 8 : 4, codes += 64) {
        const __m512i v = _mm512_loadu_si512(codes);
        if (Bits == 4) {
          const __m512i even = _mm512_and_si512(v, low),
                        odd = _mm512_and_si512(_mm512_srli_epi16(v, 4), low);
#pragma GCC unroll 12
          for (int m = 0; m < M; ++m) {
            sum[m] = _mm512_dpbusd_epi32(sum[m], even, broadcast4(xq + m * l.k + t));
            sum[m] = _mm512_dpbusd_epi32(sum[m], odd, broadcast4(xq + m * l.k + t + 4));
          }
        } else {
#pragma GCC unroll 12
          for (int m = 0; m < M; ++m)
            sum[m] = _mm512_dpbusd_epi32(sum[m], v, broadcast4(xq + m * l.k + t));
        }
      }
    }
    const __m512 scale = scales16(l, scales, b);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m)
      y[m] = _mm512_fmadd_ps(_mm512_set1_ps(x.xs[m * blocks + b]),
                             _mm512_mul_ps(scale, _mm512_cvtepi32_ps(sum[m])), y[m]);
    if (l.has_offset) {
      const __m512 offset = _mm512_fmadd_ps(centre, scale, scales16(l, scales + l.scale_bytes, b));
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m)
        y[m] = _mm512_fmadd_ps(offset, _mm512_set1_ps(x.xsum[m * blocks + b]), y[m]);
    }
  }
  for (int m = 0; m < M; ++m) _mm512_storeu_ps(acc + m * ld, y[m]);
}

template <int M, int Bits>
void tile16(const GroupedLayout& l, const uint8_t* panel, const GroupedRows& x, float* acc,
            int64_t ld) {
  constexpr int kStep = Bits == 4 ? 8 : 4;
  const uint8_t* scales = panel + l.code_bytes;
  const int64_t blocks = l.k / l.block;
  const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  const __m512i sign = _mm512_set1_epi8(-128);
  const __m512 centre = _mm512_set1_ps(Bits == 4 ? 8.0f : 0.0f);
  __m512 y[M];
  for (int m = 0; m < M; ++m) y[m] = _mm512_setzero_ps();
  const uint8_t* codes = panel;
  const float* xk = x.x;
  for (int64_t b = 0; b < blocks; ++b) {
    __m512 sum[M], more[M];  // two chains where few rows leave the adder waiting
    for (int m = 0; m < M; ++m) sum[m] = more[m] = _mm512_setzero_ps();
    for (int64_t k = 0; k < l.block; k += kStep, codes += 64, xk += kStep) {
      _mm_prefetch(reinterpret_cast<const char*>(codes + 2048), _MM_HINT_T0);
      const __m512i v =
          Bits == 4 ? _mm512_loadu_si512(codes) : _mm512_xor_si512(_mm512_loadu_si512(codes), sign);
#pragma GCC unroll 8
      for (int i = 0; i < kStep; ++i) {
        __m512 w;
        if (Bits == 4)
          w = _mm512_permutexvar_ps(_mm512_srli_epi32(v, 4 * i), table);
        else
          w = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(v, 24 - 8 * i), 24));
#pragma GCC unroll 12
        for (int m = 0; m < M; ++m) {
          __m512& to = M <= 2 && (i & 1) ? more[m] : sum[m];
          to = _mm512_fmadd_ps(w, _mm512_set1_ps(xk[m * l.k + i]), to);
        }
      }
    }
    const __m512 scale = scales16(l, scales, b);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      if (M <= 2) sum[m] = _mm512_add_ps(sum[m], more[m]);
      y[m] = _mm512_fmadd_ps(scale, sum[m], y[m]);
    }
    if (l.has_offset) {
      const __m512 offset = _mm512_fmadd_ps(centre, scale, scales16(l, scales + l.scale_bytes, b));
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m)
        y[m] = _mm512_fmadd_ps(offset, _mm512_set1_ps(x.xsum[m * blocks + b]), y[m]);
    }
  }
  for (int m = 0; m < M; ++m) _mm512_storeu_ps(acc + m * ld, y[m]);
}

using Tile = void (*)(const GroupedLayout&, const uint8_t*, const GroupedRows&, float*, int64_t);
#define TILES(tile, bits)                                                                      \
  {tile<1, bits>, tile<2, bits>, tile<3, bits>, tile<4, bits>,  tile<5, bits>,  tile<6, bits>, \
   tile<7, bits>, tile<8, bits>, tile<9, bits>, tile<10, bits>, tile<11, bits>, tile<12, bits>}

void panel8(const GroupedLayout& l, const uint8_t* panel, const GroupedRows& x, int rows,
            float* acc, int64_t ld) {
  static constexpr Tile four[kGroupedMaxRows] = TILES(tile8, 4),
                        eight[kGroupedMaxRows] = TILES(tile8, 8);
  (l.bits == 4 ? four : eight)[rows - 1](l, panel, x, acc, ld);
}

void panel16(const GroupedLayout& l, const uint8_t* panel, const GroupedRows& x, int rows,
             float* acc, int64_t ld) {
  static constexpr Tile four[kGroupedMaxRows] = TILES(tile16, 4),
                        eight[kGroupedMaxRows] = TILES(tile16, 8);
  (l.bits == 4 ? four : eight)[rows - 1](l, panel, x, acc, ld);
}

void finish_columns(const Epilogue& e, const float* acc, int64_t m, int64_t n, int64_t count) {
  for (int64_t i = 0; i < count; i += 16)
    finish16(e, _mm512_loadu_ps(acc + i), m, n + i, mask16(count - i));
}

}  // namespace

extern const GroupedKernels linear_grouped_avx512 = {panel8, panel16,    quantize_row,
                                                     widen,  sum_blocks, finish_columns};

}  // namespace narrowcast
