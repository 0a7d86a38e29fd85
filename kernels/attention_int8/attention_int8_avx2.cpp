#include "attention_int8/attention_int8_tile.h"

#include "attention/attention_wide_avx2.h"

namespace narrowcast {
namespace {

struct Int8 : Wide {
  static constexpr uint32_t kFlip = 0;

  // Codes lie in -127 .. 127, so two products |k| * (+-q) stay below 2^15: vpmaddubsw is exact.
  template <int N, int K>
  static void block(const uint8_t* q, const int8_t* k, int64_t depth, const float* scales,
                    const float* factor, const float* offset, float* scores) {
    __m256i acc[K][N];
#pragma GCC unroll 4
    for (int i = 0; i < K; ++i)
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) acc[i][n] = _mm256_setzero_si256();
    const __m256i one = _mm256_set1_epi16(1);
    for (int64_t d = 0; d < depth; d += 4) {
      __m256i x[N];
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n)
        x[n] =
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + d * kAttentionRows + n * 32));
#pragma GCC unroll 4
      for (int i = 0; i < K; ++i) {
        int32_t four;
        memcpy(&four, k + i * depth + d, 4);
        const __m256i y = _mm256_set1_epi32(four), size = _mm256_abs_epi8(y);
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) {
          const __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(x[n], y));
          acc[i][n] = _mm256_add_epi32(acc[i][n], _mm256_madd_epi16(pairs, one));
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < K; ++i)
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n)
        store(scores + i * kAttentionRows + n * 8,
              fma(mul(_mm256_cvtepi32_ps(acc[i][n]), set(scales[i])), load(factor + n * 8),
                  load(offset + n * 8)));
  }

  template <int N>
  static void columns(const uint8_t* q, const int8_t* k, int64_t depth, int64_t keys,
                      const float* scales, const float* factor, const float* offset,
                      float* scores) {
    int64_t j = 0;
    for (; j + 4 <= keys; j += 4)
      block<N, 4>(q, k + j * depth, depth, scales + j, factor, offset, scores + j * kAttentionRows);
    for (; j < keys; ++j)
      block<N, 1>(q, k + j * depth, depth, scales + j, factor, offset, scores + j * kAttentionRows);
  }

  static void int8_scores(const uint8_t* q, const int8_t* k, int64_t depth, int64_t keys,
                          int64_t lanes, const float* scales, const int32_t*, const float* factor,
                          const float* offset, float* scores) {
    int64_t r = 0;
    for (; r + 16 <= lanes; r += 16)
      columns<2>(q + r * 4, k, depth, keys, scales, factor + r, offset + r, scores + r);
    for (; r < lanes; r += 8)
      columns<1>(q + r * 4, k, depth, keys, scales, factor + r, offset + r, scores + r);
  }
};

}  // namespace

const AttentionInt8Kernel attention_int8_avx2 = {quantize_keys<Int8>, attention_int8_rows<Int8>};

}  // namespace narrowcast
