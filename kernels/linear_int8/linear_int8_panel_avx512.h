// What the kernels with panels of [K / 4][64][4] bytes share: packing, the way from accumulators to
// the output, and products straight from row-major weights.
#pragma once
#include <immintrin.h>

#include "common/epilogue_avx512.h"
#include "common/transpose_avx512.h"
#include "linear_int8/linear_int8.h"

namespace narrowcast {
namespace {

constexpr int64_t kStep = kLinearInt8Panel * 4;  // bytes of a panel per 4 columns of x

template <int kDepthStep>
constexpr int64_t padded_to(int64_t depth) {
  return (depth + kDepthStep - 1) / kDepthStep * kDepthStep;
}
template <int kDepthStep>
int64_t panel_bytes(int64_t depth) {
  return padded_to<kDepthStep>(depth) * kLinearInt8Panel + kStep;
}

// K is padded by zeros; kFlip adds 128 to every byte. The sums of the 64 rows follow as int32.
template <int kDepthStep, bool kFlip>
void pack(const int8_t* w, int64_t ldw, int columns, int64_t depth, uint8_t* panel) {
  constexpr auto padded = padded_to<kDepthStep>;
  const __m512i flip = _mm512_set1_epi8(kFlip ? -128 : 0), ones = _mm512_set1_epi8(1);
  int32_t* w_sum = reinterpret_cast<int32_t*>(panel + padded(depth) * kLinearInt8Panel);
  for (int n = 0; n < kLinearInt8Panel; n += 16) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t k = 0; k < padded(depth); k += 64) {
      const int64_t left = depth - k;
      const __mmask64 mask = left >= 64 ? ~0ull : (1ull << left) - 1;
      __m512i r[16];
      for (int i = 0; i < 16; ++i)
        r[i] = n + i < columns ? _mm512_maskz_loadu_epi8(mask, w + (n + i) * ldw + k)
                               : _mm512_setzero_si512();
      transpose16(r);
      const int64_t left_padded = padded(depth) - k,
                    steps = left_padded >= 64 ? 16 : left_padded / 4;
      for (int64_t s = 0; s < steps; ++s) {
        sum = _mm512_dpbusd_epi32(sum, ones, r[s]);
        _mm512_storeu_si512(panel + (k / 4 + s) * kStep + n * 4, _mm512_xor_si512(r[s], flip));
      }
    }
    _mm512_storeu_si512(w_sum + n, sum);
  }
}

void row_starts(const int8_t* x, int64_t ldx, int64_t rows, int64_t depth, int64_t piece,
                int32_t* start) {
  const __m512i ones = _mm512_set1_epi8(1);
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t k0 = 0; k0 == 0 || k0 < depth; k0 += piece) {
      const int64_t end = depth - k0 < piece ? depth : k0 + piece;
      __m512i sum = _mm512_setzero_si512();
      for (int64_t k = k0; k < end; k += 64) {
        const __mmask64 mask = end - k >= 64 ? ~0ull : (1ull << (end - k)) - 1;
        sum = _mm512_dpbusd_epi32(sum, ones, _mm512_maskz_loadu_epi8(mask, x + m * ldx + k));
      }
      *start++ = static_cast<int32_t>(static_cast<uint32_t>(_mm512_reduce_add_epi32(sum)) * -128u);
    }
}

// Rows of accumulators, 64 apart, to the output; they are overwritten. `sums`: the accumulators are
// float sums of pieces.
[[gnu::noinline]] void finish_tile(const LinearInt8Args& a, __m512i* tile, bool sums, int64_t m0,
                                   int rows, int64_t n0, int columns, const int32_t* w_sum) {
  const Epilogue e = a.epilogue;  // a copy that no store can be thought to change
  const bool has_zero_point = a.x_zero_point, grouped = a.group != 0;
  float* values = reinterpret_cast<float*>(tile);
  const float* x_scale = a.x_scale + m0 * a.x_scale_stride;
  const int64_t x_scale_stride = a.x_scale_stride;
  for (int v = 0; v * 16 < columns; ++v) {
    const __mmask16 mask = mask16(columns - v * 16);
    const int64_t n = n0 + v * 16;
    const __m512 w_scale =
        a.w_scale_stride ? _mm512_maskz_loadu_ps(mask, a.w_scale + n) : _mm512_set1_ps(*a.w_scale);
    const __m512 bias = e.bias ? load16(e.bias, n, e.bias_dtype, mask) : _mm512_setzero_ps();
    const __m512i w_total = _mm512_loadu_si512(w_sum + v * 16);
    for (int r = 0; r < rows; ++r) {
      __m512i acc = tile[r * 4 + v];
      __m512 y;
      if (has_zero_point) {
        const int32_t zero = a.x_zero_point[m0 + r];
        if (sums)
          y = _mm512_sub_ps(
              _mm512_castsi512_ps(acc),
              _mm512_mul_ps(_mm512_set1_ps(static_cast<float>(zero)), _mm512_cvtepi32_ps(w_total)));
        else
          y = _mm512_cvtepi32_ps(
              _mm512_sub_epi32(acc, _mm512_mullo_epi32(_mm512_set1_epi32(zero), w_total)));
      } else {
        y = sums ? _mm512_castsi512_ps(acc) : _mm512_cvtepi32_ps(acc);
      }
      if (!grouped) y = _mm512_mul_ps(y, _mm512_set1_ps(x_scale[r * x_scale_stride]));
      y = _mm512_mul_ps(y, w_scale);
      if (e.bias) y = _mm512_add_ps(y, bias);
      _mm512_store_ps(values + r * kTileColumns + v * 16, y);
    }
  }
  finish_tile16(e, values, m0, rows, n0, columns);
}

// Row-major weights: 16 dot products along K at once, of R rows of x and 16 / R of w; one
// transposition adds up their lanes.
template <int R>
void direct_rows(const LinearInt8Args& a, int64_t n0, int64_t n1) {
  constexpr int W = 16 / R;
  const __m512i flip = _mm512_set1_epi8(-128);
  const int8_t* x[R];
  for (int r = 0; r < R; ++r) x[r] = a.x + (r < a.rows ? r : 0) * a.ldx;
  for (int64_t n = n0; n < n1; n += 16) {
    const int columns = n1 - n < 16 ? static_cast<int>(n1 - n) : 16;
    alignas(64) int32_t tile[R][16];
    for (int first = 0; first < columns; first += W) {
      const int8_t* w[W];
      for (int i = 0; i < W; ++i) w[i] = a.w + (n + (first + i < columns ? first + i : 0)) * a.ldw;
      __m512i acc[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) acc[i] = _mm512_setzero_si512();
      const auto step = [&](int64_t k, __mmask64 mask) __attribute__((always_inline)) {
        __m512i activations[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) activations[r] = _mm512_maskz_loadu_epi8(mask, x[r] + k);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
          const __m512i weights = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, w[i] + k), flip);
          // The rows that come next: so few streams at once would leave the memory waiting.
          if constexpr (R > 1) _mm_prefetch(w[i] + W * a.ldw + k, _MM_HINT_T0);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r)
            acc[r * W + i] = _mm512_dpbusd_epi32(acc[r * W + i], weights, activations[r]);
        }
      };
      int64_t k = 0;
      for (; k + 64 <= a.depth; k += 64) step(k, ~0ull);
      if (k < a.depth) step(k, (1ull << (a.depth - k)) - 1);
      transpose16(acc);
      __m512i total = acc[0];
#pragma GCC unroll 16
      for (int i = 1; i < 16; ++i) total = _mm512_add_epi32(total, acc[i]);
      alignas(64) int32_t lanes[16];
      _mm512_store_si512(lanes, total);
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < W; ++i) tile[r][first + i] = lanes[r * W + i];
    }
    const __mmask16 mask = mask16(columns);
    const __m512 w_scale =
        a.w_scale_stride ? _mm512_maskz_loadu_ps(mask, a.w_scale + n) : _mm512_set1_ps(*a.w_scale);
    for (int64_t m = 0; m < a.rows; ++m) {
      const __m512i acc =
          _mm512_add_epi32(_mm512_load_si512(tile[m]), _mm512_set1_epi32(a.start[m]));
      const __m512 y =
          _mm512_mul_ps(_mm512_cvtepi32_ps(acc), _mm512_set1_ps(a.x_scale[m * a.x_scale_stride]));
      finish16(a.epilogue, _mm512_mul_ps(y, w_scale), m, n, mask);
    }
  }
}

void direct(const LinearInt8Args& a, int64_t n0, int64_t n1) {
  return a.rows == 1   ? direct_rows<1>(a, n0, n1)
         : a.rows == 2 ? direct_rows<2>(a, n0, n1)
                       : direct_rows<4>(a, n0, n1);
}

}  // namespace
}  // namespace narrowcast
