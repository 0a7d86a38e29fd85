// The 6 x 64 register tile of the AVX-512 kernels, for any step of K: 24 accumulators, 4 weight
// vectors, and a broadcast of x. Blocks of K keep a panel in L2 while up to 96 rows pass; their
// sums wait in a small buffer.
//
// Step: kDepth columns of x per step; static void load(const char* w, __m512 out[]) for one vector
// of weights; static __m512 broadcast(const char* x); static __m512 fma(__m512 x, __m512 w, __m512
// acc).
#pragma once
#include "common/epilogue_avx512.h"
#include "linear/linear.h"

namespace narrowcast {
namespace {

constexpr int64_t kDepthBlock = 1024;

inline __m512 broadcast_word(const char* x) {
  float word;  // x need not be aligned
  __builtin_memcpy(&word, x, sizeof word);
  return _mm512_set1_ps(word);
}

// Weights that are widened on load, x in float32.
template <DType kDType>
struct Widened {
  static constexpr int64_t kDepth = 1,
                           kPanelBytes = kLinearPanel * (kDType == DType::kFloat32 ? 4 : 2);
  static __m512 load(const char* w) { return load16(w, 0, kDType, 0xffff); }
  static __m512 broadcast(const char* x) { return broadcast_word(x); }
  static __m512 fma(__m512 x, __m512 w, __m512 acc) { return _mm512_fmadd_ps(x, w, acc); }
};

// K in pieces that lie this many bytes apart (a convolution's kernel, line by line).
struct Lines {
  int64_t count = 1, x = 0, w = 0;
};

template <class Step, int R, int V>
[[gnu::always_inline]] inline void multiply(const char* x, int64_t ldx_bytes, const char* w,
                                            int64_t steps, float* sums, bool first,
                                            const Lines& lines = {}) {
  __m512 acc[R][V];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
      acc[r][v] = first ? _mm512_setzero_ps() : _mm512_load_ps(sums + r * kLinearPanel + v * 16);
  for (int64_t line = 0; line < lines.count; ++line) {
    const char *x_line = x + line * lines.x, *w_line = w + line * lines.w;
    for (int64_t s = 0; s < steps; ++s, w_line += Step::kPanelBytes) {
      __m512 weights[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) weights[v] = Step::load(w_line + v * Step::kPanelBytes / 4);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const __m512 value = Step::broadcast(x_line + r * ldx_bytes + s * 4);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[r][v] = Step::fma(value, weights[v], acc[r][v]);
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) _mm512_store_ps(sums + r * kLinearPanel + v * 16, acc[r][v]);
}

// The epilogue of rows of sums, which are overwritten.
template <int V>
[[gnu::noinline]] void finish_rows(const Epilogue& epilogue, float* sums, int64_t m0, int rows,
                                   int64_t n0, int columns) {
  const Epilogue e = epilogue;  // a copy that no store can be thought to change
  if (e.bias)
    for (int v = 0; v < V; ++v) {
      const __m512 bias = load16(e.bias, n0 + v * 16, e.bias_dtype, mask16(columns - v * 16));
      for (int r = 0; r < rows; ++r) {
        float* sum = sums + r * kLinearPanel + v * 16;
        _mm512_store_ps(sum, _mm512_add_ps(_mm512_load_ps(sum), bias));
      }
    }
  finish_tile16(e, sums, m0, rows, n0, columns);
}

template <class Step, int V>
void rows_of_panel(const LinearArgs& a, const char* panel, int64_t m0, int64_t m1, int64_t n0,
                   int columns) {
  alignas(64) float sums[kLinearBlock * kLinearPanel];
  const int64_t steps = (a.depth + Step::kDepth - 1) / Step::kDepth;
  // x has 4 bytes per step: one float32, or two bfloat16.
  const int64_t ldx = a.ldx * (4 / Step::kDepth);
  const int64_t blocks = steps <= kDepthBlock ? 1 : (steps + kDepthBlock - 1) / kDepthBlock;
  const int64_t length = (steps + blocks - 1) / blocks;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t s0 = b * length, count = steps - s0 < length ? steps - s0 : length;
    const char* w = panel + s0 * Step::kPanelBytes;
    for (int64_t m = m0; m < m1;) {
      const char* x = static_cast<const char*>(a.x) + m * ldx + s0 * 4;
      float* sum = sums + (m - m0) * kLinearPanel;
      const int64_t rows = m1 - m < 6 ? m1 - m : 6;
      switch (rows) {
        case 1:
          multiply<Step, 1, V>(x, ldx, w, count, sum, b == 0);
          break;
        case 2:
          multiply<Step, 2, V>(x, ldx, w, count, sum, b == 0);
          break;
        case 3:
          multiply<Step, 3, V>(x, ldx, w, count, sum, b == 0);
          break;
        case 4:
          multiply<Step, 4, V>(x, ldx, w, count, sum, b == 0);
          break;
        case 5:
          multiply<Step, 5, V>(x, ldx, w, count, sum, b == 0);
          break;
        default:
          multiply<Step, 6, V>(x, ldx, w, count, sum, b == 0);
      }
      if (b + 1 == blocks) finish_rows<V>(a.epilogue, sum, m, static_cast<int>(rows), n0, columns);
      m += rows;
    }
  }
}

template <class Step>
void block(const LinearArgs& a, const void* panel, int64_t m0, int64_t m1, int64_t n0,
           int columns) {
  const char* w = static_cast<const char*>(panel);
  switch ((columns + 15) / 16) {
    case 1:
      return rows_of_panel<Step, 1>(a, w, m0, m1, n0, columns);
    case 2:
      return rows_of_panel<Step, 2>(a, w, m0, m1, n0, columns);
    case 3:
      return rows_of_panel<Step, 3>(a, w, m0, m1, n0, columns);
    default:
      return rows_of_panel<Step, 4>(a, w, m0, m1, n0, columns);
  }
}

}  // namespace
}  // namespace narrowcast
