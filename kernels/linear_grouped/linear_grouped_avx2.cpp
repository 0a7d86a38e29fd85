// linear_grouped, AVX2: a panel in two halves of 8 rows of W, one row per lane, times up to 4 rows
// of x at a time.
//
// activation_bits 8: 4-bit codes times int8 in vpmaddubsw cannot saturate (2 * 15 * 127). 8-bit
// codes are split,
//   code = 2 * (code >> 1) + (code & 1), so that neither product can: 2 * 127 * 127 < 2^15.
// activation_bits 16: the same for the upper and then for the lower bytes of x.
// activation_bits 32: codes become floats by shift, mask and conversion.
#include <immintrin.h>

#include "common/vec_avx2.h"
#include "linear_grouped/linear_grouped_rows.h"

namespace narrowcast {
namespace {

constexpr int kRows = 4;

inline __m256 scales8(const GroupedLayout& l, const uint8_t* p, int64_t block, int half) {
  if (l.half)
    return _mm256_cvtph_ps(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + block * 32 + half * 16)));
  return _mm256_loadu_ps(reinterpret_cast<const float*>(p + block * 64 + half * 32));
}

inline __m256i broadcast4(const int8_t* p) {
  int32_t v;
  memcpy(&v, p, sizeof v);
  return _mm256_set1_epi32(v);
}

// Parts: bytes of an x.
template <int M, int Bits, int Parts>
void tile_integer(const GroupedLayout& l, const uint8_t* panel, int half, const GroupedTile& x,
                  int first, float* acc, int64_t ld) {
  const uint8_t* scales = panel + l.code_bytes;
  const int64_t blocks = l.k / l.block;
  const __m256i low = _mm256_set1_epi8(15), one8 = _mm256_set1_epi8(1),
                one16 = _mm256_set1_epi16(1), two16 = _mm256_set1_epi16(2),
                seven = _mm256_set1_epi8(127);
  const __m256 centre = _mm256_set1_ps(Bits == 4 ? 8.0f : 0.0f);
  __m256 y[M];
  for (int m = 0; m < M; ++m) y[m] = _mm256_setzero_ps();
  for (int64_t b = 0; b < blocks; ++b) {
    __m256i sum[M];
    for (int m = 0; m < M; ++m)
      sum[m] =
          Parts == 2 ? _mm256_setzero_si256() : _mm256_set1_epi32(x.start[b * x.ld + first + m]);
    for (int part = 0; part < Parts; ++part) {
      const uint8_t* codes = panel + half * 32 + b * l.block * Bits * 2;
      const int8_t* xq = (part ? x.xl : x.xq) + b * l.block * x.ld + 4 * first;
      if (part)
        for (int m = 0; m < M; ++m)
          sum[m] = _mm256_add_epi32(_mm256_slli_epi32(sum[m], 8),
                                    _mm256_set1_epi32(x.start[b * x.ld + first + m]));
      for (int64_t k = 0; k < l.block;
           k += Bits == 4 ? 8 : 4, codes += 64, xq += (Bits == 4 ? 8 : 4) * x.ld) {
        const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
        if (Bits == 4) {
          const __m256i even = _mm256_and_si256(v, low),
                        odd = _mm256_and_si256(_mm256_srli_epi16(v, 4), low);
          for (int m = 0; m < M; ++m) {
            const __m256i products =
                _mm256_add_epi16(_mm256_maddubs_epi16(even, broadcast4(xq + 4 * m)),
                                 _mm256_maddubs_epi16(odd, broadcast4(xq + 4 * x.ld + 4 * m)));
            sum[m] = _mm256_add_epi32(sum[m], _mm256_madd_epi16(products, one16));
          }
        } else {
          const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(v, 1), seven),
                        bit = _mm256_and_si256(v, one8);
          for (int m = 0; m < M; ++m) {
            const __m256i xs = broadcast4(xq + 4 * m);
            const __m256i twice = _mm256_madd_epi16(_mm256_maddubs_epi16(upper, xs), two16);
            const __m256i once = _mm256_madd_epi16(_mm256_maddubs_epi16(bit, xs), one16);
            sum[m] = _mm256_add_epi32(sum[m], _mm256_add_epi32(twice, once));
          }
        }
      }
    }
    const __m256 scale = scales8(l, scales, b, half);
    for (int m = 0; m < M; ++m) {
      const __m256 value = _mm256_cvtepi32_ps(sum[m]);
      y[m] = Parts == 2 ? _mm256_fmadd_ps(scale, value, y[m])
                        : _mm256_fmadd_ps(_mm256_set1_ps(x.xs[b * x.ld + first + m]),
                                          _mm256_mul_ps(scale, value), y[m]);
    }
    if (l.has_offset) {
      const __m256 offset =
          _mm256_fmadd_ps(centre, scale, scales8(l, scales + l.scale_bytes, b, half));
      for (int m = 0; m < M; ++m)
        y[m] = _mm256_fmadd_ps(offset, _mm256_set1_ps(x.xsum[b * x.ld + first + m]), y[m]);
    }
  }
  for (int m = 0; m < M; ++m) {
    if (Parts == 2) y[m] = _mm256_mul_ps(y[m], _mm256_set1_ps(x.xs[first + m]));
    _mm256_storeu_ps(acc + m * ld + half * 8, y[m]);
  }
}

template <int M, int Bits>
void tile32(const GroupedLayout& l, const uint8_t* panel, int half, const GroupedTile& x, int first,
            float* acc, int64_t ld) {
  constexpr int kStep = Bits == 4 ? 8 : 4;
  const uint8_t* scales = panel + l.code_bytes;
  const int64_t blocks = l.k / l.block;
  const __m256i low = _mm256_set1_epi32(15), eight = _mm256_set1_epi32(8),
                sign = _mm256_set1_epi8(-128);
  const __m256 centre = _mm256_set1_ps(Bits == 4 ? 8.0f : 0.0f);
  __m256 y[M];
  for (int m = 0; m < M; ++m) y[m] = _mm256_setzero_ps();
  const uint8_t* codes = panel + half * 32;
  const float* xk = x.x + first;
  for (int64_t b = 0; b < blocks; ++b) {
    __m256 sum[M];
    for (int m = 0; m < M; ++m) sum[m] = _mm256_setzero_ps();
    for (int64_t k = 0; k < l.block; k += kStep, codes += 64, xk += kStep * x.ld) {
      __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
      if (Bits == 8) v = _mm256_xor_si256(v, sign);
#pragma GCC unroll 8
      for (int i = 0; i < kStep; ++i) {
        __m256i q;
        if (Bits == 4)
          q = _mm256_sub_epi32(_mm256_and_si256(_mm256_srli_epi32(v, 4 * i), low), eight);
        else
          q = _mm256_srai_epi32(_mm256_slli_epi32(v, 24 - 8 * i), 24);
        const __m256 w = _mm256_cvtepi32_ps(q);
        for (int m = 0; m < M; ++m)
          sum[m] = _mm256_fmadd_ps(w, _mm256_set1_ps(xk[i * x.ld + m]), sum[m]);
      }
    }
    const __m256 scale = scales8(l, scales, b, half);
    for (int m = 0; m < M; ++m) y[m] = _mm256_fmadd_ps(scale, sum[m], y[m]);
    if (l.has_offset) {
      const __m256 offset =
          _mm256_fmadd_ps(centre, scale, scales8(l, scales + l.scale_bytes, b, half));
      for (int m = 0; m < M; ++m)
        y[m] = _mm256_fmadd_ps(offset, _mm256_set1_ps(x.xsum[b * x.ld + first + m]), y[m]);
    }
  }
  for (int m = 0; m < M; ++m) _mm256_storeu_ps(acc + m * ld + half * 8, y[m]);
}

using Tile = void (*)(const GroupedLayout&, const uint8_t*, int, const GroupedTile&, int, float*,
                      int64_t);
#define TILES(tile, ...) \
  {tile<1, __VA_ARGS__>, tile<2, __VA_ARGS__>, tile<3, __VA_ARGS__>, tile<4, __VA_ARGS__>}

void panel(const Tile* tiles, const GroupedLayout& l, const uint8_t* weights, const GroupedTile& x,
           float* acc, int64_t ld) {
  for (int m = 0; m < x.ld; m += kRows) {
    const int here = x.ld - m < kRows ? x.ld - m : kRows;
    for (int half = 0; half < 2; ++half) tiles[here - 1](l, weights, half, x, m, acc + m * ld, ld);
  }
}

void panel8(const GroupedLayout& l, const uint8_t* weights, const GroupedTile& x, float* acc,
            int64_t ld) {
  static constexpr Tile four[kRows] = TILES(tile_integer, 4, 1),
                        eight[kRows] = TILES(tile_integer, 8, 1);
  panel(l.bits == 4 ? four : eight, l, weights, x, acc, ld);
}

void panel16(const GroupedLayout& l, const uint8_t* weights, const GroupedTile& x, float* acc,
             int64_t ld) {
  static constexpr Tile four[kRows] = TILES(tile_integer, 4, 2),
                        eight[kRows] = TILES(tile_integer, 8, 2);
  panel(l.bits == 4 ? four : eight, l, weights, x, acc, ld);
}

void panel32(const GroupedLayout& l, const uint8_t* weights, const GroupedTile& x, float* acc,
             int64_t ld) {
  static constexpr Tile four[kRows] = TILES(tile32, 4), eight[kRows] = TILES(tile32, 8);
  panel(l.bits == 4 ? four : eight, l, weights, x, acc, ld);
}

void finish_columns(const Epilogue& e, const float* acc, int64_t m, int64_t n, int64_t count) {
  for (int64_t i = 0; i < count; i += 8) {
    const int64_t left = count - i;
    const auto load = [left](const void* p, int64_t at, DType dtype) {
      return left >= 8 ? load8(p, at, dtype) : load8_tail(p, at, dtype, left);
    };
    __m256 y = _mm256_loadu_ps(acc + i);
    if (e.bias) y = _mm256_add_ps(y, load(e.bias, n + i, e.bias_dtype));
    y = activate8(e.activation, y);
    if (e.residual)
      y = _mm256_add_ps(y, load(e.residual, m * e.ld_residual + n + i, e.residual_dtype));
    y = activate8(e.post_activation, y);
    const int64_t at = m * e.ld_out + n + i;
    if (left >= 8)
      store8(e.out, at, e.out_dtype, y);
    else
      store8_tail(e.out, at, e.out_dtype, y, left);
  }
}

}  // namespace

extern const GroupedKernels linear_grouped_avx2 = {panel8,    panel16,   panel32,       prepare8,
                                                   prepare16, prepare32, nullptr,       nullptr,
                                                   nullptr,   pack_rows, finish_columns};

}  // namespace narrowcast
