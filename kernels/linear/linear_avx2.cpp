// linear with 256-bit FMA. Panels: [K][64] in the dtype of the weights; half precision is widened
// on load, and x once per call by the run. Tile: 6 rows x 16 columns, 12 accumulators. Blocks of K
// keep a panel in L2 while up to 96 rows pass; their sums wait in a small buffer.
#include "common/epilogue_avx2.h"
#include "linear/linear.h"

namespace narrowcast {
namespace {

constexpr int64_t kDepthBlock = 1024;

template <class Word>
void pack(const void* w, int64_t ldw, int columns, int64_t depth, void* panel) {
  const Word* from = static_cast<const Word*>(w);
  Word* to = static_cast<Word*>(panel);
  for (int64_t k = 0; k < depth; ++k)
    for (int n = 0; n < kLinearPanel; ++n)
      to[k * kLinearPanel + n] = n < columns ? from[n * ldw + k] : 0;
}

template <DType kDType, int R>
void multiply(const float* x, int64_t ldx, const char* w, int64_t steps, float* sums, bool first) {
  constexpr int64_t kRow = kLinearPanel * (kDType == DType::kFloat32 ? 4 : 2);
  __m256 acc[R][2];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v)
      acc[r][v] = first ? _mm256_setzero_ps() : _mm256_load_ps(sums + r * kLinearPanel + v * 8);
  for (int64_t s = 0; s < steps; ++s, w += kRow) {
    const __m256 w0 = load8(w, 0, kDType), w1 = load8(w, 8, kDType);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const __m256 value = _mm256_broadcast_ss(x + r * ldx + s);
      acc[r][0] = _mm256_fmadd_ps(value, w0, acc[r][0]);
      acc[r][1] = _mm256_fmadd_ps(value, w1, acc[r][1]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) _mm256_store_ps(sums + r * kLinearPanel + v * 8, acc[r][v]);
}

template <DType kDType>
void block(const LinearArgs& a, const void* panel, int64_t m0, int64_t m1, int64_t n0,
           int columns) {
  constexpr int64_t kWord = kDType == DType::kFloat32 ? 4 : 2;
  alignas(32) float sums[kLinearBlock * kLinearPanel];
  const int64_t blocks = a.depth <= kDepthBlock ? 1 : (a.depth + kDepthBlock - 1) / kDepthBlock;
  const int64_t length = (a.depth + blocks - 1) / blocks;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t k = b * length, count = a.depth - k < length ? a.depth - k : length;
    for (int64_t m = m0; m < m1;) {
      const int64_t rows = m1 - m < 6 ? m1 - m : 6;
      const float* x = static_cast<const float*>(a.x) + m * a.ldx + k;
      float* tile = sums + (m - m0) * kLinearPanel;
      for (int n = 0; n < columns; n += 16) {
        const char* w = static_cast<const char*>(panel) + (k * kLinearPanel + n) * kWord;
        switch (rows) {
          case 1:
            multiply<kDType, 1>(x, a.ldx, w, count, tile + n, b == 0);
            break;
          case 2:
            multiply<kDType, 2>(x, a.ldx, w, count, tile + n, b == 0);
            break;
          case 3:
            multiply<kDType, 3>(x, a.ldx, w, count, tile + n, b == 0);
            break;
          case 4:
            multiply<kDType, 4>(x, a.ldx, w, count, tile + n, b == 0);
            break;
          case 5:
            multiply<kDType, 5>(x, a.ldx, w, count, tile + n, b == 0);
            break;
          default:
            multiply<kDType, 6>(x, a.ldx, w, count, tile + n, b == 0);
        }
      }
      if (b + 1 == blocks)
        for (int64_t r = 0; r < rows; ++r)
          for (int n = 0; n < columns; n += 8)
            finish8(a.epilogue, _mm256_load_ps(tile + r * kLinearPanel + n), m + r, n0 + n,
                    columns - n);
      m += rows;
    }
  }
}

// Row-major weights: 8 dot products along K at once.
template <DType kDType>
void direct(const LinearArgs& a, int64_t n0, int64_t n1) {
  for (int64_t n = n0; n < n1; n += 8) {
    const int64_t columns = n1 - n < 8 ? n1 - n : 8;
    int64_t at[8];
    for (int i = 0; i < 8; ++i) at[i] = (n + (i < columns ? i : 0)) * a.ldw;
    for (int64_t m = 0; m < a.rows; ++m) {
      const float* x = static_cast<const float*>(a.x) + m * a.ldx;
      __m256 sum[8];
      for (int i = 0; i < 8; ++i) sum[i] = _mm256_setzero_ps();
      int64_t k = 0;
      for (; k + 8 <= a.depth; k += 8) {
        const __m256 value = _mm256_loadu_ps(x + k);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i)
          sum[i] = _mm256_fmadd_ps(value, load8(a.w, at[i] + k, kDType), sum[i]);
      }
      alignas(32) float totals[8];
      for (int i = 0; i < 8; ++i) {
        totals[i] = sum8(sum[i]);
        for (int64_t t = k; t < a.depth; ++t)
          totals[i] += x[t] * load_float(a.w, at[i] + t, kDType);
      }
      finish8(a.epilogue, _mm256_load_ps(totals), m, n, columns);
    }
  }
}

template <DType kDType, class Word>
constexpr LinearFormat format(const char* layout) {
  return {layout, DType::kFloat32, 1, sizeof(Word), pack<Word>, block<kDType>, direct<kDType>};
}
constexpr LinearFormat kFloat32 = format<DType::kFloat32, uint32_t>("f32x64");
constexpr LinearFormat kFloat16 = format<DType::kFloat16, uint16_t>("f16x64");
constexpr LinearFormat kBFloat16 = format<DType::kBFloat16, uint16_t>("bf16x64");

}  // namespace

extern const LinearKernel linear_avx2 = {&kFloat32, &kFloat16, &kBFloat16};

}  // namespace narrowcast
