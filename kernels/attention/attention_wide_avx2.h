// The vector type that attention_tile.h asks for, for files compiled for avx2.
#pragma once
#include "attention/attention_tile.h"
#include "common/vec_avx2.h"

namespace narrowcast {
namespace {

struct Wide {
  using T = __m256;
  static constexpr bool kPairs = false;  // v as float32, not as pairs of bfloat16
  static constexpr int64_t kWidth = 8, kColumns = 2;
  static T set(float x) { return _mm256_set1_ps(x); }
  static T load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, T x) { _mm256_storeu_ps(p, x); }
  static T fma(T a, T b, T c) { return _mm256_fmadd_ps(a, b, c); }
  static T mul(T a, T b) { return _mm256_mul_ps(a, b); }
  static T add(T a, T b) { return _mm256_add_ps(a, b); }
  static T sub(T a, T b) { return _mm256_sub_ps(a, b); }
  static T max(T a, T b) { return _mm256_max_ps(a, b); }
  static T exp(T x) { return exp8(x); }
  static T tanh(T x) { return tanh8(x); }
  static T finite_or_zero(T x) {
    return _mm256_and_ps(x, _mm256_cmp_ps(x, set(-__builtin_inff()), _CMP_NEQ_UQ));
  }
  static T outside(int32_t key, const int32_t* first, const int32_t* last, T x, float none) {
    const __m256i j = _mm256_set1_epi32(key);
    const __m256i lo = _mm256_load_si256(reinterpret_cast<const __m256i*>(first));
    const __m256i hi = _mm256_load_si256(reinterpret_cast<const __m256i*>(last));
    const __m256i seen = _mm256_andnot_si256(_mm256_cmpgt_epi32(lo, j), _mm256_cmpgt_epi32(hi, j));
    return _mm256_blendv_ps(set(none), x, _mm256_castsi256_ps(seen));
  }
  [[gnu::always_inline]] static T widen(const char* p, int64_t i, DType dtype) {
    if (dtype != DType::kInt8) return load8(p, i, dtype);
    return _mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + i))));
  }
  static T widen_tail(const char* p, int64_t i, DType dtype, int64_t count) {
    alignas(32) char rest[32] = {};
    const int64_t size = bytes_of(dtype);
    memcpy(rest, p + i * size, static_cast<size_t>(count * size));
    return widen(rest, 0, dtype);
  }
  // Elements of 4 bits: byte i at p, shifted.
  [[gnu::always_inline]] static T nibbles(const char* p, int shift) {
    const __m256i bytes =
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m256i code = _mm256_srl_epi32(bytes, _mm_cvtsi32_si128(shift));
    return _mm256_cvtepi32_ps(_mm256_and_si256(code, _mm256_set1_epi32(15)));
  }
  // Lane i of the result: the sum of the 8 floats at p + 8 i.
  [[gnu::always_inline]] static T reduce(const float* p) {
    const auto pair = [&](int i) {
      return _mm256_hadd_ps(_mm256_load_ps(p + 8 * i), _mm256_load_ps(p + 8 * i + 8));
    };
    const T a = _mm256_hadd_ps(pair(0), pair(2)), b = _mm256_hadd_ps(pair(4), pair(6));
    return add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  }
  static void load_row(const char* p, DType dtype, float scale, int64_t count, float* to) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) store(to + i, mul(widen(p, i, dtype), set(scale)));
    if (i == count) return;
    store8_tail(to, i, DType::kFloat32, mul(widen_tail(p, i, dtype, count - i), set(scale)),
                count - i);
  }
  static void store_row(const float* x, float factor, int64_t count, char* to, DType dtype) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) store8(to, i, dtype, mul(load(x + i), set(factor)));
    if (i < count)
      store8_tail(to, i, dtype, mul(load8_tail(x, i, DType::kFloat32, count - i), set(factor)),
                  count - i);
  }
};

}  // namespace
}  // namespace narrowcast
