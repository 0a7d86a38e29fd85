// linear with 512-bit FMA. Panels: [K][64] in the dtype of the weights; half precision is widened
// on load, and x is widened once per call by the run.
#include "common/transpose_avx512.h"
#include "linear/linear_tile_avx512.h"

namespace narrowcast {
namespace {

template <DType kDType>
void pack(const void* w, int64_t ldw, int columns, int64_t depth, void* panel) {
  for (int n = 0; n < kLinearPanel; n += 16)
    for (int64_t k = 0; k < depth; k += 16) {
      const int64_t left = depth - k;
      const __mmask16 mask = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
      __m512i r[16];
      for (int i = 0; i < 16; ++i)
        r[i] = _mm512_castps_si512(n + i < columns ? load16(w, (n + i) * ldw + k, kDType, mask)
                                                   : _mm512_setzero_ps());
      transpose16(r);
      for (int64_t i = 0; i < (left < 16 ? left : 16); ++i)
        store16(panel, (k + i) * kLinearPanel + n, kDType, 0xffff, _mm512_castsi512_ps(r[i]));
    }
}

// 16 dot products along K at once; one transposition adds up their lanes.
template <DType kDType>
void direct(const LinearArgs& a, int64_t n0, int64_t n1) {
  for (int64_t n = n0; n < n1; n += 16) {
    const int columns = n1 - n < 16 ? static_cast<int>(n1 - n) : 16;
    int64_t at[16];
    for (int i = 0; i < 16; ++i) at[i] = (n + (i < columns ? i : 0)) * a.ldw;
    for (int64_t m = 0; m < a.rows; ++m) {
      const float* x = static_cast<const float*>(a.x) + m * a.ldx;
      __m512 acc[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) acc[i] = _mm512_setzero_ps();
      int64_t k = 0;
      for (; k + 16 <= a.depth; k += 16) {
        const __m512 value = _mm512_loadu_ps(x + k);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
          acc[i] = _mm512_fmadd_ps(value, load16(a.w, at[i] + k, kDType, 0xffff), acc[i]);
      }
      if (k < a.depth) {
        const __mmask16 mask = static_cast<__mmask16>((1u << (a.depth - k)) - 1);
        const __m512 value = _mm512_maskz_loadu_ps(mask, x + k);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
          acc[i] = _mm512_fmadd_ps(value, load16(a.w, at[i] + k, kDType, mask), acc[i]);
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

constexpr LinearFormat kBFloat16 = {"bf16x64",
                                    DType::kFloat32,
                                    1,
                                    2,
                                    pack<DType::kBFloat16>,
                                    block<Widened<DType::kBFloat16>>,
                                    direct<DType::kBFloat16>};

}  // namespace

extern const LinearFormat linear_float32_avx512 = {"f32x64",
                                                   DType::kFloat32,
                                                   1,
                                                   4,
                                                   pack<DType::kFloat32>,
                                                   block<Widened<DType::kFloat32>>,
                                                   direct<DType::kFloat32>};
extern const LinearFormat linear_float16_avx512 = {"f16x64",
                                                   DType::kFloat32,
                                                   1,
                                                   2,
                                                   pack<DType::kFloat16>,
                                                   block<Widened<DType::kFloat16>>,
                                                   direct<DType::kFloat16>};
extern const LinearKernel linear_avx512 = {&linear_float32_avx512, &linear_float16_avx512,
                                           &kBFloat16};

}  // namespace narrowcast
