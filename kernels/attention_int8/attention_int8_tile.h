// Quantisation of q and k, and the scores that attention_tile.h asks for, at any vector width.
//
// V adds to the type of attention_tile.h: kFlip, the bits by which codes of q differ from int8, and
// int8_scores.
#pragma once
#include "attention/attention_tile.h"
#include "attention_int8/attention_int8.h"

namespace narrowcast {
namespace {

// x [count] to codes; returns the scale, NaN for a row that is not finite (its codes are 0).
inline float quantize_line(const float* x, int64_t count, int8_t* codes) {
  uint32_t top = 0;
  for (int64_t d = 0; d < count; ++d) {
    uint32_t bits;
    memcpy(&bits, x + d, sizeof bits);
    bits &= 0x7fffffffu;
    top = bits > top ? bits : top;
  }
  if (top >= 0x7f800000u) {
    memset(codes, 0, static_cast<size_t>(count));
    return NAN;
  }
  float scale;
  memcpy(&scale, &top, sizeof scale);
  scale /= 127.0f;
  if (scale < 1.17549435e-38f) scale = 1.0f;
  const float inverse = 1.0f / scale;
  for (int64_t d = 0; d < count; ++d) {
    // Adding 1.5 * 2^23 rounds to an integer, half to even, and leaves it in the low bits.
    const float shifted = x[d] * inverse + 12582912.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    codes[d] = static_cast<int8_t>(bits);
  }
  return scale;
}

template <class V>
void quantize_keys(const AttentionInt8Args& x, int64_t b, int64_t kv_head, float* line) {
  const AttentionArgs& a = x.attention;
  const Sequence s = sequence_of(a, b);
  const int64_t depth = attention_int8_depth(a.depth);
  const int64_t first = kv_head * attention_int8_key_rows(a) + (a.cu_k ? s.k0 : b * a.sk);
  const auto load = [&](int64_t j) {
    const int64_t at =
        b * a.k_strides.batch + kv_head * a.k_strides.head + (s.k0 + j) * a.k_strides.row;
    V::load_row(row_at(a.k, at, a.kv_dtype), a.kv_dtype, 1.0f, a.depth, line);
  };
  float* mean = x.means + (b * a.kv_heads + kv_head) * a.depth;
  for (int64_t d = 0; d < a.depth; ++d) mean[d] = 0.0f;
  for (int64_t j = 0; j < s.sk; ++j) {
    load(j);
    for (int64_t d = 0; d < a.depth; ++d) mean[d] += line[d] - line[d] == 0.0f ? line[d] : 0.0f;
  }
  for (int64_t d = 0; d < a.depth; ++d) {
    mean[d] /= static_cast<float>(s.sk);
    if (mean[d] - mean[d] != 0.0f) mean[d] = 0.0f;
  }
  for (int64_t j = 0; j < s.sk; ++j) {
    load(j);
    for (int64_t d = 0; d < a.depth; ++d) line[d] -= mean[d];
    int8_t* codes = x.codes + (first + j) * depth;
    x.scales[first + j] = quantize_line(line, a.depth, codes);
    for (int64_t d = a.depth; d < depth; ++d) codes[d] = 0;
    int32_t sum = 0;
    for (int64_t d = 0; d < a.depth; ++d) sum += codes[d];
    x.sums[first + j] = sum;
  }
}

// A block of q as codes [d / 4][row][4]: four neighbours of a row side by side.
template <class V>
struct Int8Scores {
  const AttentionInt8Args& x;
  uint8_t* q;
  int8_t* codes;  // one row
  int64_t kv_head, sequence, first;
  alignas(64) float factor[kAttentionRows], offset[kAttentionRows];

  static float row_scale(const AttentionArgs& a) { return a.scale; }
  void write(int64_t r) {
    const int64_t depth = attention_int8_depth(x.attention.depth);
    for (int64_t d = 0; d < depth; d += 4) {
      uint32_t four;
      memcpy(&four, codes + d, 4);
      four ^= V::kFlip;
      memcpy(q + d * kAttentionRows + r * 4, &four, 4);
    }
  }
  void put(const AttentionArgs& a, int64_t r, const float* line) {
    factor[r] = quantize_line(line, a.depth, codes);
    for (int64_t d = a.depth; d < attention_int8_depth(a.depth); ++d) codes[d] = 0;
    write(r);
    float sum = 0;
    if (a.softcap > 0 || a.sinks) {
      const float* mean = x.means + (sequence * a.kv_heads + kv_head) * a.depth;
      for (int64_t d = 0; d < a.depth; ++d) sum += line[d] * mean[d];
    }
    offset[r] = sum;
  }
  void clear(const AttentionArgs& a, int64_t from, int64_t to) {
    memset(codes, 0, static_cast<size_t>(attention_int8_depth(a.depth)));
    for (int64_t r = from; r < to; ++r) {
      factor[r] = offset[r] = 0.0f;
      write(r);
    }
  }
  void tile(const AttentionArgs& a, const AttentionItem&, const Sequence&, int64_t key,
            int64_t count, int64_t lanes, float* scores) {
    const int64_t depth = attention_int8_depth(a.depth), at = first + key;
    V::int8_scores(q, x.codes + at * depth, depth, count, lanes, x.scales + at, x.sums + at, factor,
                   offset, scores);
  }
};

template <class V>
void attention_int8_rows(const AttentionInt8Args& x, const AttentionItem& it, float* scratch) {
  const AttentionArgs& a = x.attention;
  const int64_t depth = attention_int8_depth(a.depth);
  uint8_t* q = reinterpret_cast<uint8_t*>(scratch);
  int8_t* codes = reinterpret_cast<int8_t*>(q + depth * kAttentionRows);
  const int64_t first =
      it.kv_head * attention_int8_key_rows(a) + (a.cu_k ? a.cu_k[it.sequence] : it.sequence * a.sk);
  Int8Scores<V> scores = {x, q, codes, it.kv_head, it.sequence, first, {}, {}};
  float* rest = scratch + (kAttentionRows + 1) * depth / 4;
  attention_rows<V>(a, it, scores, rest);
}

}  // namespace
}  // namespace narrowcast
