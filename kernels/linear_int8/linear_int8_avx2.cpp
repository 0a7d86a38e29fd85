// linear_int8 with vpmovsxbw and vpmaddwd: products in 16 bits are exact, where vpmaddubsw would
// saturate.
//
// Panel: [K / 2][64][2] bytes (K padded by a zero), then the sums of its 64 rows as int32.
// Tile: 4 rows x 16 columns = 8 accumulators; x is widened to 16 bits once per 4 rows and 512
// columns.
#include "common/epilogue_avx2.h"
#include "linear_int8/linear_int8.h"

namespace narrowcast {
namespace {

constexpr int64_t kChunk = 512;

int64_t padded(int64_t depth) { return (depth + 1) / 2 * 2; }
int64_t panel_bytes(int64_t depth) {
  return padded(depth) * kLinearInt8Panel + kLinearInt8Panel * 4;
}

void pack(const int8_t* w, int64_t ldw, int columns, int64_t depth, uint8_t* panel) {
  int32_t sums[kLinearInt8Panel] = {};
  for (int n = 0; n < kLinearInt8Panel; ++n)
    for (int64_t k = 0; k < padded(depth); ++k) {
      const int8_t value = n < columns && k < depth ? w[n * ldw + k] : 0;
      panel[k / 2 * 2 * kLinearInt8Panel + n * 2 + k % 2] = static_cast<uint8_t>(value);
      sums[n] += value;
    }
  __builtin_memcpy(panel + padded(depth) * kLinearInt8Panel, sums, sizeof sums);
}

inline __m256i widen(const void* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}

// acc[r][0..15] += the products of `pairs` pairs of columns of x with one strip of the panel.
template <int R>
void multiply(const int16_t* x, const uint8_t* w, int64_t pairs, int32_t* acc) {
  __m256i sum[R][2];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v)
      sum[r][v] = _mm256_load_si256(reinterpret_cast<__m256i*>(acc + r * kLinearInt8Panel + v * 8));
  for (int64_t p = 0; p < pairs; ++p, w += 2 * kLinearInt8Panel) {
    const __m256i w0 = widen(w), w1 = widen(w + 16);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      __builtin_memcpy(&pair, x + r * kChunk + p * 2, 4);
      const __m256i activations = _mm256_set1_epi32(pair);
      sum[r][0] = _mm256_add_epi32(sum[r][0], _mm256_madd_epi16(w0, activations));
      sum[r][1] = _mm256_add_epi32(sum[r][1], _mm256_madd_epi16(w1, activations));
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v)
      _mm256_store_si256(reinterpret_cast<__m256i*>(acc + r * kLinearInt8Panel + v * 8), sum[r][v]);
}

// One vector of sums to the output. `value`: int32 sums, or the float sums of pieces.
inline void finish_sums(const LinearInt8Args& a, __m256i value, bool pieces, __m256i w_sum,
                        int64_t m, int64_t n, int64_t count) {
  __m256 y;
  if (!pieces) {
    if (a.x_zero_point)
      value =
          _mm256_sub_epi32(value, _mm256_mullo_epi32(_mm256_set1_epi32(a.x_zero_point[m]), w_sum));
    y = _mm256_cvtepi32_ps(value);
  } else {
    y = _mm256_castsi256_ps(value);
    if (a.x_zero_point)
      y = _mm256_sub_ps(y, _mm256_mul_ps(_mm256_set1_ps(static_cast<float>(a.x_zero_point[m])),
                                         _mm256_cvtepi32_ps(w_sum)));
  }
  if (!a.group) y = _mm256_mul_ps(y, _mm256_set1_ps(a.x_scale[m * a.x_scale_stride]));
  const __m256 w_scale = a.w_scale_stride ? load_up_to8(a.w_scale, n, DType::kFloat32, count)
                                          : _mm256_set1_ps(*a.w_scale);
  finish8(a.epilogue, _mm256_mul_ps(y, w_scale), m, n, count);
}

template <int R>
void tile(const LinearInt8Args& a, const uint8_t* panel, int64_t m, int64_t n0, int columns) {
  alignas(32) int32_t acc[R * kLinearInt8Panel];
  alignas(32) float total[R * kLinearInt8Panel] = {};
  alignas(32) int16_t wide[R * kChunk];
  const bool pieces = a.pieces != 1 || a.group;
  for (int64_t p = 0; p < a.pieces; ++p) {
    const int64_t begin = p * a.piece, end = a.depth - begin < a.piece ? a.depth : begin + a.piece;
    __builtin_memset(acc, 0, sizeof acc);
    for (int64_t k = begin; k < end; k += kChunk) {
      const int64_t count = padded(end - k < kChunk ? end - k : kChunk);
      for (int r = 0; r < R; ++r) {
        const int8_t* x = a.x + (m + r) * a.ldx + k;
        int64_t i = 0;
        for (; i + 16 <= count; i += 16)
          _mm256_store_si256(reinterpret_cast<__m256i*>(wide + r * kChunk + i), widen(x + i));
        for (; i < count; ++i) wide[r * kChunk + i] = x[i];
      }
      for (int n = 0; n < columns; n += 16)
        multiply<R>(wide, panel + k * kLinearInt8Panel + n * 2, count / 2, acc + n);
    }
    if (pieces)
      for (int r = 0; r < R; ++r) {
        const __m256 scale =
            _mm256_set1_ps(a.group ? a.x_scale[(m + r) * a.x_scale_stride + p] : 1.0f);
        for (int n = r * kLinearInt8Panel; n < r * kLinearInt8Panel + columns; n += 8) {
          const __m256i sums = _mm256_load_si256(reinterpret_cast<__m256i*>(acc + n));
          _mm256_store_ps(total + n, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), scale,
                                                     _mm256_load_ps(total + n)));
        }
      }
  }
  const uint8_t* w_sums = panel + padded(a.depth) * kLinearInt8Panel;
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < columns; n += 8) {
      const void* from = pieces ? static_cast<const void*>(total) : acc;
      const __m256i value =
          _mm256_load_si256(static_cast<const __m256i*>(from) + (r * kLinearInt8Panel + n) / 8);
      const __m256i w_sum = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w_sums + n * 4));
      finish_sums(a, value, pieces, w_sum, m + r, n0 + n, columns - n);
    }
}

void block(const LinearInt8Args& a, const uint8_t* panel, int64_t m0, int64_t m1, int64_t n0,
           int columns) {
  int64_t m = m0;
  for (; m + 4 <= m1; m += 4) tile<4>(a, panel, m, n0, columns);
  switch (m1 - m) {
    case 1:
      return tile<1>(a, panel, m, n0, columns);
    case 2:
      return tile<2>(a, panel, m, n0, columns);
    case 3:
      return tile<3>(a, panel, m, n0, columns);
  }
}

inline int32_t sum_lanes(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

// Row-major weights: 8 dot products along K at once.
void direct(const LinearInt8Args& a, int64_t n0, int64_t n1) {
  for (int64_t n = n0; n < n1; n += 8) {
    const int64_t columns = n1 - n < 8 ? n1 - n : 8;
    for (int64_t m = 0; m < a.rows; ++m) {
      const int8_t* x = a.x + m * a.ldx;
      __m256i sum[8];
      const int8_t* w[8];
      for (int i = 0; i < 8; ++i) w[i] = a.w + (n + (i < columns ? i : 0)) * a.ldw;
      for (int i = 0; i < 8; ++i) sum[i] = _mm256_setzero_si256();
      int64_t k = 0;
      for (; k + 16 <= a.depth; k += 16) {
        const __m256i activations = widen(x + k);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i)
          sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(widen(w[i] + k), activations));
      }
      alignas(32) int32_t totals[8];
      for (int i = 0; i < 8; ++i) {
        totals[i] = sum_lanes(sum[i]);
        for (int64_t t = k; t < a.depth; ++t) totals[i] += static_cast<int32_t>(x[t]) * w[i][t];
      }
      finish_sums(a, _mm256_load_si256(reinterpret_cast<__m256i*>(totals)), false,
                  _mm256_setzero_si256(), m, n, columns);
    }
  }
}

}  // namespace

extern const LinearInt8Kernel linear_int8_avx2 = {"pairs64", 2,       panel_bytes, pack,
                                                  block,     nullptr, direct,      4};

}  // namespace narrowcast
