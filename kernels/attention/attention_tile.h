// The loop over key tiles, for any vector width. Scores are kept transposed, [key][row]: q is
// transposed once, k and v are read where they lie, and the softmax needs no horizontal step.
//
// V: kWidth floats in T, and the few operations used below; the row functions convert a row of any
// dtype to float32 and back.
#pragma once
#include <math.h>
#include <string.h>

#include "attention/attention.h"
#include "common/hadamard.h"
#include "common/half.h"

namespace narrowcast {
namespace {

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline int64_t bytes_of(DType t) {
  return t == DType::kFloat32 ? 4 : t == DType::kInt8 || t == DType::kUInt8 ? 1 : 2;
}

inline const char* row_at(const void* p, int64_t element, DType t) {
  return static_cast<const char*>(p) + element * bytes_of(t);
}

struct Sequence {
  int64_t q0, k0, sq, sk;
};

inline Sequence sequence_of(const AttentionArgs& a, int64_t b) {
  Sequence s = {0, 0, a.sq, a.sk};
  if (a.cu_q) s.q0 = a.cu_q[b], s.sq = a.cu_q[b + 1] - a.cu_q[b];
  if (a.cu_k) s.k0 = a.cu_k[b], s.sk = a.cu_k[b + 1] - a.cu_k[b];
  if (a.lengths) s.sk = a.lengths[b];
  return s;
}

// V::kWidth elements from d of a cache row of 4-bit codes (hadamard.h).
template <class V>
[[gnu::always_inline]] inline typename V::T of_nibbles(const char* row, const uint32_t* pairs,
                                                       int64_t d) {
  const uint32_t pair = pairs[d / kNibbleGroup];
  return V::fma(V::nibbles(row + nibble_byte(d), nibble_shift(d)), V::set(step_of(pair)),
                V::set(minimum_of(pair)));
}

// Rows key .. key + count of one head as float32 rows ld apart: in place when they lie so.
template <class V>
const float* rows_of(const AttentionArgs& a, const AttentionItem& it, const Sequence& s,
                     bool values, int64_t key, int64_t count, float* buffer, int64_t* ld) {
  const void* from = values ? a.v : a.k;
  const AttentionStrides& st = values ? a.v_strides : a.k_strides;
  const float* scales = values ? a.v_scale : a.k_scale;
  const AttentionStrides& ss = values ? a.v_scale_strides : a.k_scale_strides;
  const int64_t depth = values ? a.v_depth : a.depth;
  const bool even = !values || depth % V::kWidth == 0;
  if (a.kv_dtype == DType::kFloat32 && !a.block_table && even) {
    *ld = st.row;
    return static_cast<const float*>(from) + it.sequence * st.batch + it.kv_head * st.head +
           (s.k0 + key) * st.row;
  }
  *ld = values ? round_up(depth, V::kWidth) : depth;
  for (int64_t j = 0; j < count; ++j) {
    int64_t outer = it.sequence, row = s.k0 + key + j;
    if (a.block_table) {
      outer = a.block_table[it.sequence * a.table_stride + row / a.page_size];
      row %= a.page_size;
    }
    const int64_t at = outer * st.batch + it.kv_head * st.head + row * st.row;
    const int64_t scale_at = outer * ss.batch + it.kv_head * ss.head + row * ss.row;
    float* to = buffer + j * *ld;
    if (a.kv_dtype == DType::kUInt8) {
      const uint32_t* pairs = (values ? a.v_pairs : a.k_pairs) + scale_at;
      for (int64_t d = 0; d < depth; d += V::kWidth)
        V::store(to + d, of_nibbles<V>(row_at(from, at, a.kv_dtype), pairs, d));
      continue;
    }
    const float scale = scales ? scales[scale_at] : 1.0f;
    V::load_row(row_at(from, at, a.kv_dtype), a.kv_dtype, scale, depth, to);
    for (int64_t d = depth; d < *ld; ++d) to[d] = 0.0f;
  }
  return buffer;
}

// scores[j][r] = sum over d of k[j][d] q[d][r], for N vectors of rows.
template <class V, int N>
void score_columns(const float* q, const float* k, int64_t ldk, int64_t keys, int64_t depth,
                   float* scores) {
  constexpr int kKeys = N == 4 ? 4 : N == 2 ? 6 : 8;
  int64_t j = 0;
  for (; j + kKeys <= keys; j += kKeys) {
    typename V::T acc[kKeys][N];
#pragma GCC unroll 8
    for (int i = 0; i < kKeys; ++i)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[i][n] = V::set(0.0f);
    const float* row = k + j * ldk;
    for (int64_t d = 0; d < depth; ++d) {
      typename V::T x[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) x[n] = V::load(q + d * kAttentionRows + n * V::kWidth);
#pragma GCC unroll 8
      for (int i = 0; i < kKeys; ++i) {
        const typename V::T y = V::set(row[i * ldk + d]);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc[i][n] = V::fma(x[n], y, acc[i][n]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kKeys; ++i)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n)
        V::store(scores + (j + i) * kAttentionRows + n * V::kWidth, acc[i][n]);
  }
  for (; j < keys; ++j) {
    typename V::T acc[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[n] = V::set(0.0f);
    for (int64_t d = 0; d < depth; ++d) {
      const typename V::T y = V::set(k[j * ldk + d]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n)
        acc[n] = V::fma(V::load(q + d * kAttentionRows + n * V::kWidth), y, acc[n]);
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) V::store(scores + j * kAttentionRows + n * V::kWidth, acc[n]);
  }
}

// sums[r][c] = sums[r][c] * keep[r] + sum over j of p[j][r] v[j][c], four rows, N vectors of c.
template <class V, int N>
void weigh_values(const float* p, const float* v, int64_t ldv, int64_t keys, const float* keep,
                  float* sums, int64_t ld) {
  typename V::T acc[4][N];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
      acc[r][n] = V::mul(V::set(keep[r]), V::load(sums + r * ld + n * V::kWidth));
  for (int64_t j = 0; j < keys; ++j) {
    typename V::T x[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) x[n] = V::load(v + j * ldv + n * V::kWidth);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const typename V::T w = V::set(p[j * kAttentionRows + r]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[r][n] = V::fma(w, x[n], acc[r][n]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) V::store(sums + r * ld + n * V::kWidth, acc[r][n]);
}

// The same for one row and any values: a weight of 0 takes nothing from a row of NaN or infinity,
// which stands behind a mask.
inline void weigh_seen_values(const float* p, const float* v, int64_t ldv, int64_t keys, float keep,
                              int64_t count, float* sums) {
  for (int64_t c = 0; c < count; ++c) sums[c] *= keep;
  for (int64_t j = 0; j < keys; ++j) {
    const float w = p[j * kAttentionRows];
    if (w != 0.0f)
      for (int64_t c = 0; c < count; ++c) sums[c] += w * v[j * ldv + c];
  }
}

inline bool all_finite(const float* v, int64_t ldv, int64_t keys, int64_t count) {
  uint32_t top = 0;
  for (int64_t j = 0; j < keys; ++j)
    for (int64_t c = 0; c < count; ++c) {
      uint32_t bits;
      memcpy(&bits, v + j * ldv + c, sizeof bits);
      bits &= 0x7fffffffu;
      top = bits > top ? bits : top;
    }
  return top < 0x7f800000u;
}

inline float bias_at(const AttentionArgs& a, int64_t i) {
  if (a.bias_dtype == DType::kFloat32) return static_cast<const float*>(a.bias)[i];
  const uint16_t h = static_cast<const uint16_t*>(a.bias)[i];
  return a.bias_dtype == DType::kFloat16 ? from_float16(h) : from_bfloat16(h);
}

// Scores of float rows: q kept transposed, k read where it lies or widened into `keys`.
template <class V>
struct FloatScores {
  float *q, *keys;
  // What rows of q are multiplied by on their way to put().
  static float row_scale(const AttentionArgs& a) { return a.scale; }
  // Row r of q, already times row_scale.
  void put(const AttentionArgs& a, int64_t r, const float* line) {
    for (int64_t d = 0; d < a.depth; ++d) q[d * kAttentionRows + r] = line[d];
  }
  void clear(const AttentionArgs& a, int64_t from, int64_t to) {
    for (int64_t d = 0; d < a.depth; ++d)
      for (int64_t r = from; r < to; ++r) q[d * kAttentionRows + r] = 0.0f;
  }
  void tile(const AttentionArgs& a, const AttentionItem& it, const Sequence& s, int64_t key,
            int64_t count, int64_t lanes, float* scores) {
    int64_t ldk;
    const float* k = rows_of<V>(a, it, s, false, key, count, keys, &ldk);
    int64_t r = 0;
    for (; r + 4 * V::kWidth <= lanes; r += 4 * V::kWidth)
      score_columns<V, 4>(q + r, k, ldk, count, a.depth, scores + r);
    for (; r + 2 * V::kWidth <= lanes; r += 2 * V::kWidth)
      score_columns<V, 2>(q + r, k, ldk, count, a.depth, scores + r);
    for (; r < lanes; r += V::kWidth)
      score_columns<V, 1>(q + r, k, ldk, count, a.depth, scores + r);
  }
};

// Scores: q of a block of rows, and its scores against a tile of keys as [key][row].
template <class V, class Scores>
void attention_rows(const AttentionArgs& a, const AttentionItem& it, Scores& source,
                    float* scratch) {
  using T = typename V::T;
  constexpr int64_t kR = kAttentionRows;
  constexpr float kNone = -INFINITY;
  const Sequence s = sequence_of(a, it.sequence);
  const int64_t group = a.heads / a.kv_heads, ld = round_up(a.v_depth, V::kWidth);
  const int64_t lanes = round_up(it.rows, V::kWidth);
  float* scores = scratch;
  float* sums = scores + kAttentionKeys * kR;
  float* values = sums + ld * kR;
  float* biases = values + kAttentionKeys * ld;
  float* line = biases + kAttentionKeys * kR;
  alignas(64) float top[kR], total[kR], keep[kR];
  alignas(64) int32_t first[kR], last[kR];  // the keys that a row sees
  int64_t bias_row[kR];

  int64_t lowest = INT64_MAX, highest = 0, common0 = 0, common1 = INT64_MAX;
  bool same_bias = true;
  for (int64_t r = 0; r < kR; ++r) top[r] = kNone, total[r] = 0, first[r] = last[r] = 0;
  for (int64_t r = 0; r < it.rows; ++r) {
    const int64_t i = (it.row0 + r) / group, h = it.kv_head * group + (it.row0 + r) % group;
    const int64_t position = i + s.sk - s.sq;
    int64_t lo = it.key0, hi = it.key1;
    if (a.causal && position + 1 < hi) hi = position + 1;
    if (a.window > 0 && position - a.window + 1 > lo) lo = position - a.window + 1;
    if (a.window > 0 && !a.causal && position + a.window < hi) hi = position + a.window;
    if (hi < lo) hi = lo = it.key0;
    first[r] = static_cast<int32_t>(lo), last[r] = static_cast<int32_t>(hi);
    if (hi > lo) lowest = lo < lowest ? lo : lowest, highest = hi > highest ? hi : highest;
    common0 = lo > common0 ? lo : common0, common1 = hi < common1 ? hi : common1;
    if (a.sinks && !it.partial && a.sinks[h] != kNone) top[r] = a.sinks[h], total[r] = 1.0f;
    V::load_row(row_at(a.q,
                       it.sequence * a.q_strides.batch + h * a.q_strides.head +
                           (s.q0 + i) * a.q_strides.row,
                       a.q_dtype),
                a.q_dtype, Scores::row_scale(a), a.depth, line);
    if (a.kv_dtype == DType::kUInt8) hadamard(line, a.depth);
    source.put(a, r, line);
    if (a.bias) {
      bias_row[r] = it.sequence * a.bias_strides[0] + h * a.bias_strides[1] + i * a.bias_strides[2];
      same_bias = same_bias && bias_row[r] == bias_row[0];
    }
  }
  source.clear(a, it.rows, lanes);
  memset(sums, 0, static_cast<size_t>(round_up(it.rows, 4) * ld) * sizeof(float));

  for (int64_t key = lowest; key < highest; key += kAttentionKeys) {
    const int64_t count = highest - key < kAttentionKeys ? highest - key : kAttentionKeys;
    source.tile(a, it, s, key, count, lanes, scores);
    int64_t r = 0, ldv;
    if (a.bias && !same_bias)
      for (r = 0; r < lanes; ++r)
        for (int64_t j = 0; j < count; ++j)
          biases[j * kR + r] =
              r < it.rows ? bias_at(a, bias_row[r] + (key + j) * a.bias_strides[3]) : 0.0f;
    else if (a.bias)
      for (int64_t j = 0; j < count; ++j)
        biases[j] = bias_at(a, bias_row[0] + (key + j) * a.bias_strides[3]);
    const bool masked = key < common0 || key + count > common1;
    for (r = 0; r < lanes; r += V::kWidth) {
      const T before = V::load(top + r);
      T peak = before;
      for (int64_t j = 0; j < count; ++j) {
        float* at = scores + j * kR + r;
        T x = V::load(at);
        if (a.softcap > 0 || a.bias || masked) {
          if (a.softcap > 0)
            x = V::mul(V::set(a.softcap), V::tanh(V::mul(x, V::set(1.0f / a.softcap))));
          if (a.bias) x = V::add(x, same_bias ? V::set(biases[j]) : V::load(biases + j * kR + r));
          if (masked) x = V::outside(static_cast<int32_t>(key + j), first + r, last + r, x, kNone);
          V::store(at, x);
        }
        peak = V::max(x, peak);
      }
      V::store(top + r, peak);
      const T base = V::finite_or_zero(peak);
      T sum = V::set(0.0f);
      for (int64_t j = 0; j < count; ++j) {
        const T e = V::exp(V::sub(V::load(scores + j * kR + r), base));
        V::store(scores + j * kR + r, e);
        sum = V::add(sum, e);
      }
      const T old = V::exp(V::sub(before, base));
      V::store(keep + r, old);
      V::store(total + r, V::fma(V::load(total + r), old, sum));
    }

    if constexpr (V::kPairs) {
      uint32_t* pairs = reinterpret_cast<uint32_t*>(values);
      const bool finite = V::pair_values(a, it, s, key, count, pairs, ld);
      if (finite || !(masked || a.bias)) {
        V::weigh_pairs(scores, pairs, count, it.rows, keep, sums, ld);
        continue;
      }
    }
    const float* v = rows_of<V>(a, it, s, true, key, count, values, &ldv);
    if ((masked || a.bias) && !all_finite(v, ldv, count, a.v_depth)) {
      for (r = 0; r < it.rows; ++r)
        weigh_seen_values(scores + r, v, ldv, count, keep[r], a.v_depth, sums + r * ld);
      continue;
    }
    for (r = 0; r < it.rows; r += 4) {
      int64_t c = 0;
      for (; c + V::kColumns * V::kWidth <= ld; c += V::kColumns * V::kWidth)
        weigh_values<V, V::kColumns>(scores + r, v + c, ldv, count, keep + r, sums + r * ld + c,
                                     ld);
      for (; c + 2 * V::kWidth <= ld; c += 2 * V::kWidth)
        weigh_values<V, 2>(scores + r, v + c, ldv, count, keep + r, sums + r * ld + c, ld);
      for (; c < ld; c += V::kWidth)
        weigh_values<V, 1>(scores + r, v + c, ldv, count, keep + r, sums + r * ld + c, ld);
    }
  }

  for (int64_t r = 0; r < it.rows; ++r) {
    float* sum = sums + r * ld;
    if (a.kv_dtype == DType::kUInt8) hadamard(sum, a.v_depth);
    if (it.partial) {
      float* to = it.partial + r * (a.v_depth + 2);
      to[0] = top[r], to[1] = total[r];
      memcpy(to + 2, sum, static_cast<size_t>(a.v_depth) * sizeof(float));
      continue;
    }
    const int64_t i = (it.row0 + r) / group, h = it.kv_head * group + (it.row0 + r) % group;
    const float factor = total[r] == 0.0f ? 0.0f : 1.0f / total[r];
    if (total[r] == 0.0f)  // a row that sees nothing, beside rows that see NaN
      memset(sum, 0, static_cast<size_t>(a.v_depth) * sizeof(float));
    V::store_row(
        sum, factor, a.v_depth,
        const_cast<char*>(row_at(a.out,
                                 it.sequence * a.out_strides.batch + h * a.out_strides.head +
                                     (s.q0 + i) * a.out_strides.row,
                                 a.out_dtype)),
        a.out_dtype);
    if (a.lse)
      a.lse[it.sequence * a.lse_strides.batch + h * a.lse_strides.head +
            (s.q0 + i) * a.lse_strides.row] = total[r] == 0.0f ? kNone : top[r] + logf(total[r]);
  }
}

template <class V>
void attention_rows(const AttentionArgs& a, const AttentionItem& it, float* scratch) {
  float* keys = scratch + a.depth * kAttentionRows;
  FloatScores<V> scores = {scratch, keys};
  attention_rows<V>(a, it, scores, keys + kAttentionKeys * a.depth);
}

}  // namespace
}  // namespace narrowcast
