// Up to kFewRows rows against one chunk of a cache: products along D, so that a cache row is read
// once, widened in registers and used for all rows that share it. More rows take the tile loop.
//
// V: the type of attention_tile.h, with widen, widen_tail (elements of any dtype as floats) and
// reduce (kWidth vectors to the vector of their sums).
#pragma once
#include "attention/attention_tile.h"
#include "attention_decode/attention_decode.h"

namespace narrowcast {
namespace {

constexpr int64_t kFewRows = 4;

// Where the rows of a chunk lie, and their scales.
struct CacheRows {
  const char* at[kDecodeChunk + 16];
  const uint32_t* pairs[kDecodeChunk + 16];  // of 4-bit codes
  alignas(64) float scale[kDecodeChunk + 16];

  void find(const AttentionArgs& a, const AttentionItem& it, bool values, int64_t key,
            int64_t count, int64_t padded) {
    const void* from = values ? a.v : a.k;
    const AttentionStrides& st = values ? a.v_strides : a.k_strides;
    const float* scales = values ? a.v_scale : a.k_scale;
    const uint32_t* grids = values ? a.v_pairs : a.k_pairs;
    const AttentionStrides& ss = values ? a.v_scale_strides : a.k_scale_strides;
    for (int64_t j = 0; j < count;) {
      int64_t outer = it.sequence, row = key + j, run = count - j;
      if (a.block_table) {
        outer = a.block_table[it.sequence * a.table_stride + row / a.page_size];
        row %= a.page_size;
        run = a.page_size - row < run ? a.page_size - row : run;
      }
      const char* first =
          row_at(from, outer * st.batch + it.kv_head * st.head + row * st.row, a.kv_dtype);
      const int64_t step = st.row * bytes_of(a.kv_dtype);
      for (int64_t i = 0; i < run; ++i) at[j + i] = first + i * step;
      if (scales) {
        const float* s = scales + outer * ss.batch + it.kv_head * ss.head + row * ss.row;
        for (int64_t i = 0; i < run; ++i) scale[j + i] = s[i * ss.row];
      }
      if (grids) {
        const uint32_t* s = grids + outer * ss.batch + it.kv_head * ss.head + row * ss.row;
        for (int64_t i = 0; i < run; ++i) pairs[j + i] = s + i * ss.row;
      }
      j += run;
    }
    for (int64_t j = count; j < padded; ++j) {
      at[j] = at[count - 1], scale[j] = 0.0f;
      if (grids) pairs[j] = pairs[count - 1];
    }
  }
};

// V::kWidth elements from d of a cache row; pairs: of 4-bit codes.
template <class V, DType kType>
[[gnu::always_inline]] inline typename V::T cached(const char* row, const uint32_t* pairs,
                                                   int64_t d) {
  if constexpr (kType == DType::kUInt8)
    return of_nibbles<V>(row, pairs, d);
  else
    return V::widen(row, d, kType);
}

// parts[r][j] = the vector of products of row r of q with cache row j, K of them, to be reduced.
template <class V, DType kType, int R, int K>
[[gnu::always_inline]] inline void multiply_keys(const float* q, int64_t ldq,
                                                 const char* const* rows,
                                                 const uint32_t* const* pairs, int64_t depth,
                                                 float* parts) {
  typename V::T acc[R][K];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) acc[r][j] = V::set(0.0f);
  int64_t d = 0;
  for (; d + V::kWidth <= depth; d += V::kWidth) {
    typename V::T x[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) x[r] = V::load(q + r * ldq + d);
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) {
      const typename V::T y = cached<V, kType>(rows[j], pairs[j], d);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r][j] = V::fma(x[r], y, acc[r][j]);
    }
  }
  if (kType != DType::kUInt8 && d < depth)
    for (int j = 0; j < K; ++j) {
      const typename V::T y = V::widen_tail(rows[j], d, kType, depth - d);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r][j] = V::fma(V::load(q + r * ldq + d), y, acc[r][j]);
    }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) V::store(parts + (r * V::kWidth + j) * V::kWidth, acc[r][j]);
}

// sums[r][c ..] += sum over j of w[r][j] v[j][c ..], N vectors of columns.
template <class V, DType kType, int R, int N>
[[gnu::always_inline]] inline void weigh_rows(const float* w, const CacheRows& rows, int64_t j0,
                                              int64_t j1, int64_t c, float* sums, int64_t ld) {
  typename V::T acc[R][N];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) acc[r][n] = V::load(sums + r * ld + c + n * V::kWidth);
  for (int64_t j = j0; j < j1; ++j) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const typename V::T y = cached<V, kType>(rows.at[j], rows.pairs[j], c + n * V::kWidth);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r][n] = V::fma(V::set(w[r * kDecodeChunk + j]), y, acc[r][n]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) V::store(sums + r * ld + c + n * V::kWidth, acc[r][n]);
}

template <class V, DType kType, int R>
void weigh_columns(const float* w, const CacheRows& rows, int64_t j0, int64_t j1, int64_t depth,
                   float* sums, int64_t ld) {
  if (j0 >= j1) return;
  constexpr int kColumns = V::kWidth == 16 ? (R <= 2 ? 8 : 4) : 2;
  int64_t c = 0;
  for (; c + kColumns * V::kWidth <= depth; c += kColumns * V::kWidth)
    weigh_rows<V, kType, R, kColumns>(w, rows, j0, j1, c, sums, ld);
  if constexpr (kColumns == 8)
    if (c + 4 * V::kWidth <= depth) {
      weigh_rows<V, kType, R, 4>(w, rows, j0, j1, c, sums, ld);
      c += 4 * V::kWidth;
    }
  for (; c + V::kWidth <= depth; c += V::kWidth)
    weigh_rows<V, kType, R, 1>(w, rows, j0, j1, c, sums, ld);
  if (c == depth) return;
  for (int64_t j = j0; j < j1; ++j) {
    const typename V::T y = V::widen_tail(rows.at[j], c, kType, depth - c);
    for (int r = 0; r < R; ++r) {
      float* at = sums + r * ld + c;
      V::store(at, V::fma(V::set(w[r * kDecodeChunk + j]), y, V::load(at)));
    }
  }
}

template <class V, DType kType, int R>
void few_rows(const AttentionArgs& a, const AttentionItem& it, float* scratch) {
  using T = typename V::T;
  constexpr int64_t kW = V::kWidth;
  constexpr float kNone = -INFINITY;
  const int64_t group = a.heads / a.kv_heads, ld = round_up(a.depth, kW);
  const int64_t length = a.lengths[it.sequence];
  float *q = scratch, *sums = q + R * ld;
  alignas(64) float scores[R * kDecodeChunk], parts[R * kW * kW], lane[kW];
  float top[R], total[R];
  int64_t first[R], last[R], lowest = it.key1, highest = it.key0, common0 = it.key0,
                             common1 = it.key1;
  CacheRows rows;

  for (int r = 0; r < R; ++r) {
    const int64_t i = (it.row0 + r) / group, h = it.kv_head * group + (it.row0 + r) % group;
    const int64_t position = i + length - a.sq;
    int64_t lo = it.key0, hi = position + 1 < it.key1 ? position + 1 : it.key1;
    if (a.window > 0 && position - a.window + 1 > lo) lo = position - a.window + 1;
    if (hi < lo) hi = lo = it.key0;
    first[r] = lo, last[r] = hi;
    if (hi > lo) lowest = lo < lowest ? lo : lowest, highest = hi > highest ? hi : highest;
    common0 = lo > common0 ? lo : common0, common1 = hi < common1 ? hi : common1;
    V::load_row(
        row_at(a.q, it.sequence * a.q_strides.batch + h * a.q_strides.head + i * a.q_strides.row,
               a.q_dtype),
        a.q_dtype, a.scale, a.depth, q + r * ld);
    for (int64_t d = a.depth; d < ld; ++d) q[r * ld + d] = 0.0f;
    if (kType == DType::kUInt8) hadamard(q + r * ld, a.depth);
    const bool sink = a.sinks && !it.partial && a.sinks[h] != kNone;
    top[r] = sink ? a.sinks[h] : kNone, total[r] = sink ? 1.0f : 0.0f;
  }
  memset(sums, 0, static_cast<size_t>(R * ld) * sizeof(float));

  if (highest > lowest) {
    const int64_t count = highest - lowest, padded = round_up(count, kW);
    rows.find(a, it, false, lowest, count, padded);
    constexpr int kKeys = kW < 8 ? 2 : R <= 2 && kW == 16 ? 8 : kW == 16 ? 4 : 2;
    for (int64_t j = 0; j < padded; j += kW) {
      for (int64_t i = 0; i < kW; i += kKeys)
        multiply_keys<V, kType, R, kKeys>(q, ld, rows.at + j + i, rows.pairs + j + i, a.depth,
                                          parts + i * kW);
      for (int r = 0; r < R; ++r) {
        T x = V::reduce(parts + r * kW * kW);
        if (kType == DType::kInt8) x = V::mul(x, V::load(rows.scale + j));
        if (a.softcap > 0)
          x = V::mul(V::set(a.softcap), V::tanh(V::mul(x, V::set(1.0f / a.softcap))));
        V::store(scores + r * kDecodeChunk + j, x);
      }
    }
    rows.find(a, it, true, lowest, count, padded);
    for (int r = 0; r < R; ++r) {
      float* score = scores + r * kDecodeChunk;
      for (int64_t j = 0; j < first[r] - lowest; ++j) score[j] = kNone;
      for (int64_t j = last[r] > first[r] ? last[r] - lowest : 0; j < padded; ++j) score[j] = kNone;
      T peak = V::set(top[r]);
      for (int64_t j = 0; j < padded; j += kW) peak = V::max(V::load(score + j), peak);
      V::store(lane, peak);
      float best = lane[0];
      for (int i = 1; i < kW; ++i) best = lane[i] > best ? lane[i] : best;
      const float base = best == kNone ? 0.0f : best;
      T sum = V::set(0.0f);
      for (int64_t j = 0; j < padded; j += kW) {
        const T e = V::exp(V::sub(V::load(score + j), V::set(base)));
        sum = V::add(sum, e);
        V::store(score + j, kType == DType::kInt8 ? V::mul(e, V::load(rows.scale + j)) : e);
      }
      V::store(lane, sum);
      for (int step = kW / 2; step > 0; step /= 2)
        for (int i = 0; i < step; ++i) lane[i] += lane[i + step];
      total[r] = total[r] * expf(top[r] - base) + lane[0];
      top[r] = best;
    }
    // Keys that all rows see at once, the others row by row: what a mask hides is not touched.
    common0 -= lowest, common1 -= lowest;
    if (common0 >= common1) common0 = common1 = 0;
    weigh_columns<V, kType, R>(scores, rows, common0, common1, a.depth, sums, ld);
    for (int r = 0; r < R; ++r) {
      const int64_t lo = first[r] - lowest, hi = last[r] - lowest;
      const bool none = common0 == common1;
      const float* w = scores + r * kDecodeChunk;
      weigh_columns<V, kType, 1>(w, rows, lo, none ? hi : common0, a.depth, sums + r * ld, ld);
      if (!none) weigh_columns<V, kType, 1>(w, rows, common1, hi, a.depth, sums + r * ld, ld);
    }
  }

  for (int r = 0; r < R; ++r) {
    float* sum = sums + r * ld;
    if (kType == DType::kUInt8) hadamard(sum, a.depth);
    if (it.partial) {
      float* to = it.partial + r * (a.depth + 2);
      to[0] = top[r], to[1] = total[r];
      memcpy(to + 2, sum, static_cast<size_t>(a.depth) * sizeof(float));
      continue;
    }
    const int64_t i = (it.row0 + r) / group, h = it.kv_head * group + (it.row0 + r) % group;
    const int64_t at =
        it.sequence * a.out_strides.batch + h * a.out_strides.head + i * a.out_strides.row;
    V::store_row(sum, total[r] == 0.0f ? 0.0f : 1.0f / total[r], a.depth,
                 const_cast<char*>(row_at(a.out, at, a.out_dtype)), a.out_dtype);
  }
}

template <class V, DType kType>
void few_rows(const AttentionArgs& a, const AttentionItem& it, float* scratch) {
  switch (it.rows) {
    case 1:
      return few_rows<V, kType, 1>(a, it, scratch);
    case 2:
      return few_rows<V, kType, 2>(a, it, scratch);
    case 3:
      return few_rows<V, kType, 3>(a, it, scratch);
    default:
      return few_rows<V, kType, 4>(a, it, scratch);
  }
}

template <class V>
void decode_rows(const AttentionArgs& a, const AttentionItem& it, float* scratch) {
  if (it.rows > kFewRows) return attention_rows<V>(a, it, scratch);
  switch (a.kv_dtype) {
    case DType::kFloat32:
      return few_rows<V, DType::kFloat32>(a, it, scratch);
    case DType::kFloat16:
      return few_rows<V, DType::kFloat16>(a, it, scratch);
    case DType::kBFloat16:
      return few_rows<V, DType::kBFloat16>(a, it, scratch);
    case DType::kInt8:
      return few_rows<V, DType::kInt8>(a, it, scratch);
    default:
      return few_rows<V, DType::kUInt8>(a, it, scratch);
  }
}

}  // namespace
}  // namespace narrowcast
