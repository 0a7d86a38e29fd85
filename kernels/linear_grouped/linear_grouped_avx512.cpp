// linear_grouped, AVX-512 VNNI: one panel of 16 rows of W, one row per lane, times up to 12 rows of
// x.
//
// activation_bits 8: the unsigned codes are the first operand of vpdpbusd, four successive x the
// second, broadcast to all lanes. 12 integer sums live in registers. Per block of 32 a row of x
// costs 8 vpdpbusd, one product, one or two FMAs (the conversion goes beside them). activation_bits
// 16: upper and lower bytes of x, 24 integer sums. activation_bits 32: a table of the 16 centred
// values in one register turns nibbles into floats (vpermps reads the low four bits of a lane), so
// a weight costs a shift and a permutation, shared by all rows of x. Many rows of x:
// linear_grouped_wide_avx512.h.
#include <immintrin.h>

#include "common/epilogue_avx512.h"
#include "common/transpose_avx512.h"
#include "linear_grouped/linear_grouped_rows.h"
#include "linear_grouped/linear_grouped_wide_avx512.h"

namespace narrowcast {
namespace {

// sum += codes * the four x at p, broadcast. In assembly because GCC 12 loads the broadcast on its
// own and then runs out of registers: 2 instructions and a move for each product.
inline void dot4(__m512i& sum, __m512i codes, const int8_t* p) {
  asm("vpdpbusd %2%{1to16%}, %1, %0"
      : "+v"(sum)
      : "v"(codes), "m"(*reinterpret_cast<const int8_t (*)[4]>(p)));
}

constexpr int64_t kAhead = 2048;  // bytes

template <int M, int kInRegisters>
inline void clear(__m512 (&y)[M], float* acc, int64_t ld) {
  for (int m = 0; m < M; ++m) {
    y[m] = _mm512_setzero_ps();
    if (M > kInRegisters) _mm512_storeu_ps(acc + m * ld, y[m]);
  }
}

template <int M, int kInRegisters>
inline void store(const __m512 (&y)[M], float* acc, int64_t ld) {
  if (M <= kInRegisters)
    for (int m = 0; m < M; ++m) _mm512_storeu_ps(acc + m * ld, y[m]);
}

// Few rows wait for the weights: asks for the lines that the panels behind this one start with.
template <int M>
inline void prefetch(const uint8_t* codes) {
  if (M <= 4) _mm_prefetch(reinterpret_cast<const char*>(codes + kAhead), _MM_HINT_T0);
}

// y[m] += scale * factor[m] * sums[m] + (offset + centre * scale) * xsum[m], of one block. Where M
// is above kInRegisters, y lives in memory: it is touched once per 32 products and more.
template <int M, int Bits, int kInRegisters>
inline void add_block(const GroupedLayout& l, const uint8_t* scales, int64_t b,
                      const __m512 (&sums)[M], const float* factor, const float* xsum, float* acc,
                      int64_t ld, __m512 (&y)[M]) {
  const __m512 scale = scales16(l, scales, b);
  const __m512 centre = _mm512_set1_ps(Bits == 4 ? 8.0f : 0.0f);
  __m512 offset = _mm512_setzero_ps();
  if (l.has_offset) offset = _mm512_fmadd_ps(centre, scale, scales16(l, scales + l.scale_bytes, b));
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
    __m512 v = M > kInRegisters ? _mm512_loadu_ps(acc + m * ld) : y[m];
    if (factor)
      v = _mm512_fmadd_ps(_mm512_set1_ps(factor[m]), _mm512_mul_ps(scale, sums[m]), v);
    else
      v = _mm512_fmadd_ps(scale, sums[m], v);
    if (l.has_offset) v = _mm512_fmadd_ps(offset, _mm512_set1_ps(xsum[m]), v);
    if (M > kInRegisters)
      _mm512_storeu_ps(acc + m * ld, v);
    else
      y[m] = v;
  }
}

// Parts: bytes of an x.
template <int M, int Bits, int Parts>
void tile_integer(const GroupedLayout& l, const uint8_t* panel, const GroupedTile& x, float* acc,
                  int64_t ld) {
  constexpr int kInRegisters = Parts == 1 ? 8 : 4;
  const int64_t blocks = l.k / l.block;
  const __m512i low = _mm512_set1_epi8(15);
  __m512 y[M], sums[M];
  clear<M, kInRegisters>(y, acc, ld);
  const uint8_t* codes = panel;
  const int8_t *xq = x.xq, *xl = x.xl;
  for (int64_t b = 0; b < blocks; ++b) {
    __m512i sum[M], upper[M];
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      sum[m] = _mm512_set1_epi32(x.start[b * M + m]);
      upper[m] = _mm512_setzero_si512();
    }
    for (int64_t k = 0; k < l.block; k += 32, xq += 32 * M, xl += 32 * M) {
#pragma GCC unroll 8
      for (int t = 0; t < 32; t += Bits == 4 ? 8 : 4, codes += 64) {
        prefetch<M>(codes);
        const __m512i v = _mm512_loadu_si512(codes);
        if (Bits == 4) {
          const __m512i even = _mm512_and_si512(v, low),
                        odd = _mm512_and_si512(_mm512_srli_epi16(v, 4), low);
#pragma GCC unroll 12
          for (int m = 0; m < M; ++m) {
            dot4(Parts == 1 ? sum[m] : upper[m], even, xq + t * M + 4 * m);
            if (Parts == 2) dot4(sum[m], even, xl + t * M + 4 * m);
            dot4(Parts == 1 ? sum[m] : upper[m], odd, xq + (t + 4) * M + 4 * m);
            if (Parts == 2) dot4(sum[m], odd, xl + (t + 4) * M + 4 * m);
          }
        } else {
#pragma GCC unroll 12
          for (int m = 0; m < M; ++m) {
            dot4(Parts == 1 ? sum[m] : upper[m], v, xq + t * M + 4 * m);
            if (Parts == 2) dot4(sum[m], v, xl + t * M + 4 * m);
          }
        }
      }
    }
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      if (Parts == 2) sum[m] = _mm512_add_epi32(sum[m], _mm512_slli_epi32(upper[m], 8));
      sums[m] = _mm512_cvtepi32_ps(sum[m]);
    }
    add_block<M, Bits, kInRegisters>(l, panel + l.code_bytes, b, sums,
                                     Parts == 1 ? x.xs + b * M : nullptr, x.xsum + b * M, acc, ld,
                                     y);
  }
  store<M, kInRegisters>(y, acc, ld);
  if (Parts == 2)
    for (int m = 0; m < M; ++m)
      _mm512_storeu_ps(acc + m * ld,
                       _mm512_mul_ps(_mm512_loadu_ps(acc + m * ld), _mm512_set1_ps(x.xs[m])));
}

template <int M, int Bits>
void tile32(const GroupedLayout& l, const uint8_t* panel, const GroupedTile& x, float* acc,
            int64_t ld) {
  constexpr int kStep = Bits == 4 ? 8 : 4;
  const int64_t blocks = l.k / l.block;
  const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  const __m512i sign = _mm512_set1_epi8(-128);
  __m512 y[M];
  clear<M, 8>(y, acc, ld);
  const uint8_t* codes = panel;
  const float* xk = x.x;
  for (int64_t b = 0; b < blocks; ++b) {
    __m512 sum[M], more[M];  // two chains where few rows leave the adder waiting
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) sum[m] = more[m] = _mm512_setzero_ps();
    for (int64_t k = 0; k < l.block; k += kStep, codes += 64, xk += kStep * M) {
      prefetch<M>(codes);
      __m512i v = _mm512_loadu_si512(codes);
      if (Bits == 8) v = _mm512_xor_si512(v, sign);
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
          to = _mm512_fmadd_ps(w, _mm512_set1_ps(xk[i * M + m]), to);
        }
      }
    }
    if (M <= 2)
      for (int m = 0; m < M; ++m) sum[m] = _mm512_add_ps(sum[m], more[m]);
    add_block<M, Bits, 8>(l, panel + l.code_bytes, b, sum, nullptr, x.xsum + b * M, acc, ld, y);
  }
  store<M, 8>(y, acc, ld);
}

using Tile = void (*)(const GroupedLayout&, const uint8_t*, const GroupedTile&, float*, int64_t);
#define TILES(tile, ...)                                                                     \
  {tile<1, __VA_ARGS__>, tile<2, __VA_ARGS__>,  tile<3, __VA_ARGS__>,  tile<4, __VA_ARGS__>, \
   tile<5, __VA_ARGS__>, tile<6, __VA_ARGS__>,  tile<7, __VA_ARGS__>,  tile<8, __VA_ARGS__>, \
   tile<9, __VA_ARGS__>, tile<10, __VA_ARGS__>, tile<11, __VA_ARGS__>, tile<12, __VA_ARGS__>}

template <int Parts>
void panel_integer(const GroupedLayout& l, const uint8_t* panel, const GroupedTile& x, float* acc,
                   int64_t ld) {
  static constexpr Tile four[kGroupedMaxRows] = TILES(tile_integer, 4, Parts),
                        eight[kGroupedMaxRows] = TILES(tile_integer, 8, Parts);
  (l.bits == 4 ? four : eight)[x.ld - 1](l, panel, x, acc, ld);
}

void panel32(const GroupedLayout& l, const uint8_t* panel, const GroupedTile& x, float* acc,
             int64_t ld) {
  static constexpr Tile four[kGroupedMaxRows] = TILES(tile32, 4),
                        eight[kGroupedMaxRows] = TILES(tile32, 8);
  (l.bits == 4 ? four : eight)[x.ld - 1](l, panel, x, acc, ld);
}

// 16 codes in the order of xq.
inline void put16(const GroupedLayout& l, __m128i codes, int8_t* to, int ld) {
  const __m128i even_odd = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  if (l.bits == 4) codes = _mm_shuffle_epi8(codes, even_odd);
  if (ld == 1) return _mm_storeu_si128(reinterpret_cast<__m128i*>(to), codes);
  int32_t dwords[4];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(dwords), codes);
  for (int j = 0; j < 4; ++j) memcpy(to + 4 * j * ld, dwords + j, 4);
}

// Quantises 16 elements at a time; the formulas of the portable form in linear_grouped_rows.h.
void prepare8_avx512(const GroupedLayout& l, const void* x, DType dtype, int r,
                     const GroupedTile& t) {
  const __m512 inf = _mm512_set1_ps(__builtin_inff()), limit = _mm512_set1_ps(127.0f);
  const int64_t pieces = l.block / 16;
  for (int64_t b = 0; b < l.k / l.block; ++b) {
    __m512 v[kMaxBlock / 16], most = _mm512_setzero_ps();
    for (int64_t i = 0; i < pieces; ++i) {
      v[i] = load16(x, b * l.block + 16 * i, dtype, 0xffff);
      const __m512 size = _mm512_abs_ps(v[i]);
      most = _mm512_mask_max_ps(most, _mm512_cmp_ps_mask(size, inf, _CMP_LT_OQ), most, size);
    }
    const float scale = scale_of(_mm512_reduce_max_ps(most));
    const __m512 inverse = _mm512_set1_ps(1.0f / scale);
    __m512i sums = _mm512_setzero_si512();
    int8_t* to = t.xq + b * l.block * t.ld + 4 * r;
    for (int64_t i = 0; i < pieces; ++i, to += 16 * t.ld) {
      __m512 y = _mm512_mul_ps(v[i], inverse);
      y = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, y, _CMP_ORD_Q), y);
      y = _mm512_max_ps(_mm512_min_ps(y, limit), _mm512_sub_ps(_mm512_setzero_ps(), limit));
      const __m512i q = _mm512_cvtps_epi32(y);  // rounds half to even
      sums = _mm512_add_epi32(sums, q);
      put16(l, _mm512_cvtepi32_epi8(q), to, t.ld);
    }
    const int32_t sum = _mm512_reduce_add_epi32(sums);
    const int64_t at = b * t.ld + r;
    t.xs[at] = scale;
    t.xsum[at] = scale * static_cast<float>(sum);
    t.start[at] = -(l.bits == 8 ? 128 : 8) * sum;
  }
}

void prepare16_avx512(const GroupedLayout& l, const void* x, DType dtype, int r,
                      const GroupedTile& t) {
  __m512i most = _mm512_setzero_si512();
  for (int64_t k = 0; k < l.k; k += 16)
    most = _mm512_max_epu32(most, _mm512_castps_si512(_mm512_abs_ps(load16(x, k, dtype, 0xffff))));
  const float scale = scale_of_row(_mm512_reduce_max_epu32(most));
  const __m512 inverse = _mm512_set1_ps(scale == scale ? 1.0f / scale : 0.0f);
  const __m512 limit = _mm512_set1_ps(kMost16), below = _mm512_set1_ps(-kMost16);
  t.xs[r] = scale;
  for (int64_t b = 0; b < l.k / l.block; ++b) {
    __m512i sums = _mm512_setzero_si512();
    for (int64_t k = b * l.block; k < (b + 1) * l.block; k += 16) {
      __m512 y = _mm512_mul_ps(load16(x, k, dtype, 0xffff), inverse);
      y = _mm512_min_ps(_mm512_max_ps(y, below), limit);  // a NaN becomes a number
      const __m512i q = _mm512_cvtps_epi32(y);            // rounds half to even
      sums = _mm512_add_epi32(sums, q);
      const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
      const int64_t at = k * t.ld + 4 * r;
      put16(l, _mm512_cvtepi32_epi8(upper), t.xq + at, t.ld);
      put16(l, _mm512_cvtepi32_epi8(q), t.xl + at, t.ld);
    }
    const int32_t sum = _mm512_reduce_add_epi32(sums);
    t.xsum[b * t.ld + r] = static_cast<float>(sum);
    t.start[b * t.ld + r] = -(l.bits == 8 ? 128 : 8) * sum;
  }
}

void pack16(const uint8_t* rows, int64_t row_bytes, int64_t dwords, uint32_t flip, uint8_t* out) {
  const __m512i flips = _mm512_set1_epi32(static_cast<int>(flip));
  for (int64_t d = 0; d < dwords; d += 16, out += 1024) {
    const int64_t left = dwords - d;
    const __mmask16 mask = mask16(left);
    __m512i r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      r[i] = _mm512_xor_si512(flips, _mm512_maskz_loadu_epi32(mask, rows + i * row_bytes + 4 * d));
    transpose16(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      if (i < left) _mm512_storeu_si512(out + 64 * i, r[i]);
  }
}

void finish_columns(const Epilogue& e, const float* acc, int64_t m, int64_t n, int64_t count) {
  for (int64_t i = 0; i < count; i += 16)
    finish16(e, _mm512_loadu_ps(acc + i), m, n + i, mask16(count - i));
}

}  // namespace

extern const GroupedKernels linear_grouped_avx512 = {
    panel_integer<1>, panel_integer<2>, panel32, prepare8_avx512, prepare16_avx512, prepare32,
    wide<1>,          wide<2>,          widen,   pack16,          finish_columns};

}  // namespace narrowcast
