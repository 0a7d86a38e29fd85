#include <immintrin.h>

#include "dequantize/dequantize.h"

namespace narrowcast {

void dequantize_group_avx512(const uint8_t* packed, int bits, float scale, float offset, float* out,
                             int64_t count) {
  const __m512 vscale = _mm512_set1_ps(scale), voffset = _mm512_set1_ps(offset);
  const __m128i low = _mm_set1_epi8(15);
  for (int64_t i = 0; i < count; i += 16) {
    const int64_t left = count - i;
    const __mmask16 mask = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
    __m512i codes;
    if (bits == 8) {
      codes = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, packed + i));
    } else {
      const __mmask16 bytes_mask =
          left >= 16 ? 0xff : static_cast<__mmask16>((1u << (left / 2)) - 1);
      const __m128i bytes = _mm_maskz_loadu_epi8(bytes_mask, packed + i / 2);
      const __m128i even = _mm_and_si128(bytes, low),
                    odd = _mm_and_si128(_mm_srli_epi16(bytes, 4), low);
      codes = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(even, odd));
    }
    const __m512 w = _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(codes), vscale), voffset);
    _mm512_mask_storeu_ps(out + i, mask, w);
  }
}

}  // namespace narrowcast
