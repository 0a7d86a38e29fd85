#include <immintrin.h>

#include "dequantize/dequantize.h"

namespace narrowcast {

void dequantize_group_avx2(const uint8_t* packed, int bits, float scale, float offset, float* out,
                           int64_t count) {
  const __m256 vscale = _mm256_set1_ps(scale), voffset = _mm256_set1_ps(offset);
  int64_t i = 0;
  if (bits == 8) {
    for (; i + 8 <= count; i += 8) {
      const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + i));
      const __m256 q = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
      _mm256_storeu_ps(out + i, _mm256_add_ps(_mm256_mul_ps(q, vscale), voffset));
    }
  } else {
    const __m128i low = _mm_set1_epi8(15);
    for (; i + 16 <= count; i += 16) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + i / 2));
      const __m128i even = _mm_and_si128(bytes, low),
                    odd = _mm_and_si128(_mm_srli_epi16(bytes, 4), low);
      const __m128i codes = _mm_unpacklo_epi8(even, odd);
      const __m256 q0 = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(codes));
      const __m256 q1 = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(codes, 8)));
      _mm256_storeu_ps(out + i, _mm256_add_ps(_mm256_mul_ps(q0, vscale), voffset));
      _mm256_storeu_ps(out + i + 8, _mm256_add_ps(_mm256_mul_ps(q1, vscale), voffset));
    }
  }
  if (i < count)
    dequantize_group_generic(packed + i * bits / 8, bits, scale, offset, out + i, count - i);
}

}  // namespace narrowcast
