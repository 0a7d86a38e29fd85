// The loops of both pools, written once over the widths of bytes and of sums that the flags of the
// including file allow. Internal linkage throughout.
#pragma once
#include <string.h>

#include "pool/pool.h"
#if defined(__AVX512F__)
#include "common/epilogue_avx512.h"
#elif defined(__AVX2__)
#include "common/epilogue_avx2.h"
#endif

namespace narrowcast {
namespace {

// Bytes: vectors of codes. Sums: vectors of int32. `count` lanes are read; the rest are unused.
#if defined(__AVX512F__)
struct Bytes {
  using T = __m512i;
  static constexpr int64_t kWidth = 64;
  static __mmask64 mask(int64_t count) { return count >= 64 ? ~0ull : (1ull << count) - 1; }
  static T set(uint8_t v) { return _mm512_set1_epi8(static_cast<char>(v)); }
  static T load(const uint8_t* p, int64_t count) { return _mm512_maskz_loadu_epi8(mask(count), p); }
  static void store(uint8_t* p, T v, int64_t count) { _mm512_mask_storeu_epi8(p, mask(count), v); }
  template <bool kSigned>
  static T max(T a, T b) {
    return kSigned ? _mm512_max_epi8(a, b) : _mm512_max_epu8(a, b);
  }
};
struct Sums {
  using T = __m512i;
  static constexpr int64_t kWidth = 16;
  static T set(int32_t v) { return _mm512_set1_epi32(v); }
  template <bool kSigned>
  static T add(T sum, const uint8_t* p, int64_t count) {
    const __m128i b = _mm_maskz_loadu_epi8(mask16(count), p);
    return _mm512_add_epi32(sum, kSigned ? _mm512_cvtepi8_epi32(b) : _mm512_cvtepu8_epi32(b));
  }
  static void finish(const Epilogue& e, T sum, float scale, int64_t m, int64_t n, int64_t count) {
    const __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(scale));
    finish16(e, v, m, n, mask16(count));
  }
};
#elif defined(__AVX2__)
struct Bytes {
  using T = __m256i;
  static constexpr int64_t kWidth = 32;
  static T set(uint8_t v) { return _mm256_set1_epi8(static_cast<char>(v)); }
  static T load(const uint8_t* p, int64_t count) {
    if (count >= 32) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    alignas(32) uint8_t buffer[32] = {};
    memcpy(buffer, p, static_cast<size_t>(count));
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(buffer));
  }
  static void store(uint8_t* p, T v, int64_t count) {
    if (count >= 32) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
    alignas(32) uint8_t buffer[32];
    _mm256_store_si256(reinterpret_cast<__m256i*>(buffer), v);
    memcpy(p, buffer, static_cast<size_t>(count));
  }
  template <bool kSigned>
  static T max(T a, T b) {
    return kSigned ? _mm256_max_epi8(a, b) : _mm256_max_epu8(a, b);
  }
};
struct Sums {
  using T = __m256i;
  static constexpr int64_t kWidth = 8;
  static T set(int32_t v) { return _mm256_set1_epi32(v); }
  template <bool kSigned>
  static T add(T sum, const uint8_t* p, int64_t count) {
    uint64_t bytes = 0;
    memcpy(&bytes, p, static_cast<size_t>(count < 8 ? count : 8));
    const __m128i b = _mm_cvtsi64_si128(static_cast<int64_t>(bytes));
    return _mm256_add_epi32(sum, kSigned ? _mm256_cvtepi8_epi32(b) : _mm256_cvtepu8_epi32(b));
  }
  static void finish(const Epilogue& e, T sum, float scale, int64_t m, int64_t n, int64_t count) {
    finish8(e, _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(scale)), m, n, count);
  }
};
#else
struct Bytes {
  using T = uint8_t;
  static constexpr int64_t kWidth = 1;
  static T set(uint8_t v) { return v; }
  static T load(const uint8_t* p, int64_t) { return *p; }
  static void store(uint8_t* p, T v, int64_t) { *p = v; }
  template <bool kSigned>
  static T max(T a, T b) {
    return (kSigned ? static_cast<int8_t>(a) < static_cast<int8_t>(b) : a < b) ? b : a;
  }
};
struct Sums {
  using T = int32_t;
  static constexpr int64_t kWidth = 1;
  static T set(int32_t v) { return v; }
  template <bool kSigned>
  static T add(T sum, const uint8_t* p, int64_t) {
    return sum + (kSigned ? static_cast<int8_t>(*p) : static_cast<int32_t>(*p));
  }
  static void finish(const Epilogue& e, T sum, float scale, int64_t m, int64_t n, int64_t) {
    narrowcast::finish(e, static_cast<float>(sum) * scale, m, n);
  }
};
#endif

// body(first tap's pixel, taps down, taps across, output pixel) for every window of one row.
template <class Body>
inline void over_windows(const PoolArgs& a, int64_t row, Body&& body) {
  const int64_t image = row / a.out_height;
  const Taps down = taps_inside(a.window, 0, row % a.out_height, a.height);
  const int64_t y = down.origin + down.first * a.window.dilation[0];
  const uint8_t* x = static_cast<const uint8_t*>(a.x);
  for (int64_t at = 0; at < a.out_width; ++at) {
    const Taps across = taps_inside(a.window, 1, at, a.width);
    const int64_t rows = down.last - down.first, columns = across.last - across.first;
    // The address of a window without taps is not formed.
    const int64_t pixel =
        rows > 0 && columns > 0
            ? (image * a.height + y) * a.width + across.origin + across.first * a.window.dilation[1]
            : 0;
    body(x + pixel * a.channels, rows > 0 && columns > 0 ? rows : 0, columns,
         row * a.out_width + at);
  }
}

template <bool kSigned>
void max_row(const PoolArgs& a, int64_t row, int64_t c0, int64_t c1) {
  const int64_t down = a.window.dilation[0] * a.width * a.channels,
                across = a.window.dilation[1] * a.channels;
  uint8_t* out = static_cast<uint8_t*>(a.epilogue.out);
  over_windows(a, row, [&](const uint8_t* x, int64_t rows, int64_t columns, int64_t m) {
    for (int64_t c = c0; c < c1; c += Bytes::kWidth) {
      Bytes::T best = Bytes::set(kSigned ? 0x80 : 0);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j)
          best = Bytes::template max<kSigned>(best,
                                              Bytes::load(x + i * down + j * across + c, c1 - c));
      Bytes::store(out + m * a.channels + c, best, c1 - c);
    }
  });
}

template <bool kSigned>
void average_row(const PoolArgs& a, int64_t row, int64_t c0, int64_t c1) {
  const int64_t down = a.window.dilation[0] * a.width * a.channels,
                across = a.window.dilation[1] * a.channels;
  over_windows(a, row, [&](const uint8_t* x, int64_t rows, int64_t columns, int64_t m) {
    const int64_t count = rows > 0 ? rows * columns : 0;
    const float scale = a.x_scale / static_cast<float>(count > 0 ? count : 1);
    for (int64_t c = c0; c < c1; c += Sums::kWidth) {
      Sums::T sum = Sums::set(static_cast<int32_t>(-count * a.x_zero_point));
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j)
          sum = Sums::template add<kSigned>(sum, x + i * down + j * across + c, c1 - c);
      Sums::finish(a.epilogue, sum, scale, m, c, c1 - c);
    }
  });
}

void max_any(const PoolArgs& a, int64_t row, int64_t c0, int64_t c1) {
  a.is_signed ? max_row<true>(a, row, c0, c1) : max_row<false>(a, row, c0, c1);
}
void average_any(const PoolArgs& a, int64_t row, int64_t c0, int64_t c1) {
  a.is_signed ? average_row<true>(a, row, c0, c1) : average_row<false>(a, row, c0, c1);
}

}  // namespace
}  // namespace narrowcast

#define NC_POOL_KERNEL(name)                                      \
  namespace narrowcast {                                          \
  extern const PoolKernel pool_##name = {&max_any, &average_any}; \
  }
