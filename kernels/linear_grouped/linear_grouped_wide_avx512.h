// linear_grouped for many rows of x: register tiles of 4 rows times 64 columns, or times 32 columns
// with the sums of the upper and the lower bytes of x (activation_bits 16): 16 integer sums, and
// registers to spare for a compiler that keeps copies. Codes are bytes and scales float32, made
// once per 64 columns for all rows.
//
// Conversions, shifts and integer additions go to other ports than products. Per block of 32 a row
// of 16 columns costs 8 vpdpbusd, a product and one or two FMAs; for activation_bits 16, 16
// vpdpbusd and one or two FMAs.
#pragma once
#include <immintrin.h>

#include "common/dot4_avx512.h"
#include "common/half.h"
#include "linear_grouped/linear_grouped.h"

namespace narrowcast {
namespace {

inline __m512 scales16(const GroupedLayout& l, const uint8_t* p, int64_t block) {
  if (l.half)
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + block * 32)));
  return _mm512_loadu_ps(p + block * 64);
}

GroupedWide widen(const GroupedLayout& l, const uint8_t* panels, int64_t count, uint8_t* memory) {
  constexpr int kPanels = kGroupedWide / kGroupedPanel;
  const __m512i low = _mm512_set1_epi8(15);
  const __m512 centre = _mm512_set1_ps(l.bits == 4 ? 8.0f : 0.0f);
  const int64_t bytes = l.k * kGroupedPanel;
  float* scales = reinterpret_cast<float*>(memory + kPanels * bytes);
  const bool in_place = l.bits == 8 && count == kPanels;
  for (int v = 0; v < kPanels; ++v) {
    const uint8_t* panel = panels + (v < count ? v : 0) * l.panel_bytes;  // a stand-in, unused
    uint8_t* codes = memory + v * bytes;
    if (l.bits == 4) {
      for (int64_t i = 0; i < l.k / 8; ++i) {
        const __m512i c = _mm512_loadu_si512(panel + 64 * i);
        _mm512_storeu_si512(codes + 128 * i, _mm512_and_si512(c, low));
        _mm512_storeu_si512(codes + 128 * i + 64, _mm512_and_si512(_mm512_srli_epi16(c, 4), low));
      }
    } else if (!in_place) {
      memcpy(codes, panel, bytes);
    }
    for (int64_t b = 0; b < l.k / l.block; ++b) {
      float* to = scales + b * 2 * kGroupedWide + v * kGroupedPanel;
      const __m512 scale = scales16(l, panel + l.code_bytes, b);
      _mm512_storeu_ps(to, scale);
      if (l.has_offset)
        _mm512_storeu_ps(
            to + kGroupedWide,
            _mm512_fmadd_ps(centre, scale, scales16(l, panel + l.code_bytes + l.scale_bytes, b)));
    }
  }
  return {in_place ? panels : memory, in_place ? l.panel_bytes : bytes, scales};
}

// Four bytes of x, or of a row's share of any array: rows lie `ld` of them apart.
using Dword [[gnu::may_alias]] = int32_t;

// R rows times V * 16 columns; acc has rows of kGroupedWide.
template <int Parts, bool Offset, int R, int V>
void wide_tile(const GroupedLayout& l, const GroupedWide& weights, int column, const GroupedTile& x,
               int64_t ld, float* __restrict acc) {
  const int64_t stride = weights.stride, steps = l.block / 4;
  const uint8_t* codes = weights.codes + column / kGroupedPanel * stride;
  const float *scales = weights.scales + column, *xs = x.xs, *xsum = x.xsum;
  const Dword *xq = reinterpret_cast<const Dword*>(x.xq),
              *xl = reinterpret_cast<const Dword*>(x.xl);
  const int32_t* start = x.start;
  acc += column;
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v)
      _mm512_storeu_ps(acc + r * kGroupedWide + 16 * v, _mm512_setzero_ps());
  for (int64_t left = l.k / l.block; left > 0; --left) {
    __m512i sums[R][V], upper[R][V];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        sums[r][v] = _mm512_set1_epi32(start[r * ld]);
        upper[r][v] = _mm512_setzero_si512();
      }
    const uint8_t* w = codes;
    const Dword* const end = xq + steps;
    do {  // 32 columns of x
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        __m512i c[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) c[v] = _mm512_loadu_si512(w + v * stride + i * 64);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const __m512i value = _mm512_set1_epi32(xq[r * ld + i]);
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) dot4(Parts == 1 ? sums[r][v] : upper[r][v], c[v], value);
          if (Parts == 1) continue;
          const __m512i lower = _mm512_set1_epi32(xl[r * ld + i]);
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) dot4(sums[r][v], c[v], lower);
        }
      }
      w += 8 * 64, xq += 8, xl += 8;
    } while (xq < end);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const __m512 scale = _mm512_loadu_ps(scales + 16 * v);
      const __m512 offset =
          Offset ? _mm512_loadu_ps(scales + kGroupedWide + 16 * v) : _mm512_setzero_ps();
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        float* to = acc + r * kGroupedWide + 16 * v;
        __m512i sum = sums[r][v];
        if (Parts == 2) sum = _mm512_add_epi32(sum, _mm512_slli_epi32(upper[r][v], 8));
        const __m512 value = _mm512_cvtepi32_ps(sum);
        __m512 y = _mm512_loadu_ps(to);
        if (Parts == 2)
          y = _mm512_fmadd_ps(scale, value, y);
        else
          y = _mm512_fmadd_ps(_mm512_set1_ps(xs[r * ld]), _mm512_mul_ps(scale, value), y);
        if (Offset) y = _mm512_fmadd_ps(offset, _mm512_set1_ps(xsum[r * ld]), y);
        _mm512_storeu_ps(to, y);
      }
    }
    codes += steps * 64, scales += 2 * kGroupedWide;
    ++start, ++xsum, xs += Parts == 1;
  }
  if (Parts == 1) return;
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      float* to = acc + r * kGroupedWide + 16 * v;
      _mm512_storeu_ps(to, _mm512_mul_ps(_mm512_loadu_ps(to), _mm512_set1_ps(xs[r * ld])));
    }
}

template <int Parts>
void wide(const GroupedLayout& l, const GroupedWide& weights, const GroupedTile& first,
          int64_t row_bytes, int rows, float* acc) {
  using Tile =
      void (*)(const GroupedLayout&, const GroupedWide&, int, const GroupedTile&, int64_t, float*);
  constexpr int V = Parts == 1 ? 4 : 2;
  static constexpr Tile tiles[2][kGroupedWideRows] = {
      {wide_tile<Parts, false, 1, V>, wide_tile<Parts, false, 2, V>, wide_tile<Parts, false, 3, V>,
       wide_tile<Parts, false, 4, V>},
      {wide_tile<Parts, true, 1, V>, wide_tile<Parts, true, 2, V>, wide_tile<Parts, true, 3, V>,
       wide_tile<Parts, true, 4, V>}};
  for (int column = 0; column < kGroupedWide; column += V * kGroupedPanel)
    tiles[l.has_offset][rows - 1](l, weights, column, first, row_bytes / 4, acc);
}

}  // namespace
}  // namespace narrowcast
