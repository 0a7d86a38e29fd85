#include "attention/attention_wide_avx512bf16.h"

namespace narrowcast {
namespace {

// q as pairs [d / 2][row], keys read as pairs where they lie. The products of bfloat16 are exact in
// float32; the scale comes after them.
struct PairScores {
  uint32_t* q;
  uint16_t* line;  // one row of q
  uint16_t* keys;  // rows of an odd depth, with a zero at the end

  static float row_scale(const AttentionArgs&) { return 1.0f; }
  void write(const AttentionArgs& a, int64_t r) {
    for (int64_t d = 0; d < a.depth; d += 2)
      memcpy(q + d / 2 * kAttentionRows + r, line + d, sizeof(uint32_t));
  }
  void put(const AttentionArgs& a, int64_t r, const float* x) {
    for (int64_t d = 0; d < a.depth; ++d) line[d] = to_bfloat16(x[d]);
    if (a.depth % 2) line[a.depth] = 0;
    write(a, r);
  }
  void clear(const AttentionArgs& a, int64_t from, int64_t to) {
    memset(line, 0, static_cast<size_t>(a.depth + a.depth % 2) * sizeof *line);
    for (int64_t r = from; r < to; ++r) write(a, r);
  }

  template <int N, int K>
  static void block(const uint32_t* q, const uint16_t* k, int64_t ldk, int64_t depth, __m512 scale,
                    float* scores) {
    __m512 acc[K][N];
#pragma GCC unroll 8
    for (int i = 0; i < K; ++i)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[i][n] = _mm512_setzero_ps();
    for (int64_t d = 0; d < depth; d += 2) {
      __m512i x[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) x[n] = _mm512_loadu_si512(q + d / 2 * kAttentionRows + n * 16);
#pragma GCC unroll 8
      for (int i = 0; i < K; ++i) {
        int32_t two;
        memcpy(&two, k + i * ldk + d, sizeof two);
        const __m512i y = _mm512_set1_epi32(two);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc[i][n] = dot_pairs(acc[i][n], x[n], y);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < K; ++i)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n)
        _mm512_storeu_ps(scores + i * kAttentionRows + n * 16, _mm512_mul_ps(acc[i][n], scale));
  }

  template <int N>
  static void columns(const uint32_t* q, const uint16_t* k, int64_t ldk, int64_t count,
                      int64_t depth, __m512 scale, float* scores) {
    constexpr int kKeys = N == 4 ? 4 : 8;
    int64_t j = 0;
    for (; j + kKeys <= count; j += kKeys)
      block<N, kKeys>(q, k + j * ldk, ldk, depth, scale, scores + j * kAttentionRows);
    for (; j < count; ++j)
      block<N, 1>(q, k + j * ldk, ldk, depth, scale, scores + j * kAttentionRows);
  }

  void tile(const AttentionArgs& a, const AttentionItem& it, const Sequence& s, int64_t key,
            int64_t count, int64_t lanes, float* scores) {
    const uint16_t* k = static_cast<const uint16_t*>(a.k) + it.sequence * a.k_strides.batch +
                        it.kv_head * a.k_strides.head + (s.k0 + key) * a.k_strides.row;
    int64_t ldk = a.k_strides.row;
    if (a.depth % 2) {
      const int64_t ld = a.depth + 1;
      for (int64_t j = 0; j < count; ++j) {
        memcpy(keys + j * ld, k + j * ldk, static_cast<size_t>(a.depth) * sizeof *k);
        keys[j * ld + a.depth] = 0;
      }
      k = keys, ldk = ld;
    }
    const __m512 scale = _mm512_set1_ps(a.scale);
    int64_t r = 0;
    for (; r + 64 <= lanes; r += 64) columns<4>(q + r, k, ldk, count, a.depth, scale, scores + r);
    for (; r + 32 <= lanes; r += 32) columns<2>(q + r, k, ldk, count, a.depth, scale, scores + r);
    for (; r < lanes; r += 16) columns<1>(q + r, k, ldk, count, a.depth, scale, scores + r);
  }
};

}  // namespace

void attention_rows_avx512bf16(const AttentionArgs& args, const AttentionItem& item,
                               float* scratch) {
  if (args.kv_dtype != DType::kBFloat16) return attention_rows_avx512(args, item, scratch);
  const int64_t depth = args.depth + args.depth % 2;
  uint32_t* q = reinterpret_cast<uint32_t*>(scratch);
  uint16_t* line = reinterpret_cast<uint16_t*>(q + depth / 2 * kAttentionRows);
  PairScores scores = {q, line, line + depth};
  attention_rows<WidePairs>(args, item, scores,
                            scratch + (kAttentionRows + kAttentionKeys) * depth);
}

}  // namespace narrowcast
