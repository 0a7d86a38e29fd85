// linear for bfloat16 with vdpbf16ps: two products per lane and step. Panel: [K / 2][64][2], K
// padded by zeros.
#include "common/transpose_avx512.h"
#include "linear/linear_tile_avx512.h"

namespace narrowcast {
namespace {

struct Pairs {
  static constexpr int64_t kDepth = 2, kPanelBytes = kLinearPanel * 4;
  static __m512 load(const char* w) { return _mm512_loadu_ps(w); }
  static __m512 broadcast(const char* x) { return broadcast_word(x); }
  static __m512 fma(__m512 x, __m512 w, __m512 acc) {
    return _mm512_dpbf16_ps(acc, (__m512bh)x, (__m512bh)w);
  }
};

void pack(const void* w, int64_t ldw, int columns, int64_t depth, void* panel) {
  const uint16_t* rows = static_cast<const uint16_t*>(w);
  const int64_t pairs = (depth + 1) / 2;
  for (int n = 0; n < kLinearPanel; n += 16)
    for (int64_t k = 0; k < depth; k += 32) {
      const int64_t left = depth - k;
      const __mmask32 mask = left >= 32 ? ~0u : (1u << left) - 1;
      __m512i r[16];
      for (int i = 0; i < 16; ++i)
        r[i] = n + i < columns ? _mm512_maskz_loadu_epi16(mask, rows + (n + i) * ldw + k)
                               : _mm512_setzero_si512();
      transpose16(r);
      for (int64_t i = 0; i < 16 && k / 2 + i < pairs; ++i)
        _mm512_storeu_si512(static_cast<uint32_t*>(panel) + (k / 2 + i) * kLinearPanel + n, r[i]);
    }
}

void direct(const LinearArgs& a, int64_t n0, int64_t n1) {
  const uint16_t* weights = static_cast<const uint16_t*>(a.w);
  for (int64_t n = n0; n < n1; n += 16) {
    const int columns = n1 - n < 16 ? static_cast<int>(n1 - n) : 16;
    const uint16_t* w[16];
    for (int i = 0; i < 16; ++i) w[i] = weights + (n + (i < columns ? i : 0)) * a.ldw;
    for (int64_t m = 0; m < a.rows; ++m) {
      const uint16_t* x = static_cast<const uint16_t*>(a.x) + m * a.ldx;
      __m512 acc[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) acc[i] = _mm512_setzero_ps();
      int64_t k = 0;
      for (; k + 32 <= a.depth; k += 32) {
        const __m512i value = _mm512_loadu_si512(x + k);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
          acc[i] =
              _mm512_dpbf16_ps(acc[i], (__m512bh)value, (__m512bh)_mm512_loadu_si512(w[i] + k));
      }
      if (k < a.depth) {
        const __mmask32 mask = (1u << (a.depth - k)) - 1;
        const __m512i value = _mm512_maskz_loadu_epi16(mask, x + k);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
          acc[i] = _mm512_dpbf16_ps(acc[i], (__m512bh)value,
                                    (__m512bh)_mm512_maskz_loadu_epi16(mask, w[i] + k));
      }
      __m512i lanes[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) lanes[i] = _mm512_castps_si512(acc[i]);
      transpose16(lanes);
      __m512 total = _mm512_castsi512_ps(lanes[0]);
#pragma GCC unroll 16
      for (int i = 1; i < 16; ++i) total = _mm512_add_ps(total, _mm512_castsi512_ps(lanes[i]));
      finish16(a.epilogue, total, m, n, static_cast<__mmask16>((1u << columns) - 1));
    }
  }
}

constexpr LinearFormat kBFloat16 = {
    "bf16 pairs x64", DType::kBFloat16, 2, 2, pack, block<Pairs>, direct};

}  // namespace

extern const LinearKernel linear_avx512bf16 = {&linear_float32_avx512, &linear_float16_avx512,
                                               &kBFloat16};

}  // namespace narrowcast
