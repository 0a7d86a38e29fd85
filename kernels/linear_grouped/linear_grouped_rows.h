// What every instruction set's file of this room shares: widening, summing and quantising rows of
// x. Plain loops, compiled once per file with its flags. Internal linkage throughout.
#pragma once
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "common/half.h"
#include "linear_grouped/linear_grouped.h"

namespace narrowcast {
namespace {

inline void widen(const void* x, DType dtype, int64_t count, float* out) {
  if (dtype == DType::kFloat32) {
    memcpy(out, x, count * sizeof(float));
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(x);
  if (dtype == DType::kBFloat16) {
    for (int64_t i = 0; i < count; ++i) out[i] = from_bfloat16(from[i]);
    return;
  }
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(out + i,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
  for (; i < count; ++i) out[i] = from_float16(from[i]);
}

inline void sum_blocks(const float* x, int64_t block, int64_t blocks, float* xsum) {
  for (int64_t b = 0; b < blocks; ++b) {
    float lane[16] = {};
    for (int64_t i = 0; i < block; i += 16)
      for (int j = 0; j < 16; ++j) lane[j] += x[b * block + i + j];
    float sum = 0;
    for (int j = 0; j < 16; ++j) sum += lane[j];
    xsum[b] = sum;
  }
}

// The largest finite magnitude of a block.
inline float finite_absmax(const float* x, int64_t block) {
  uint32_t most = 0;
  for (int64_t i = 0; i < block; ++i) {
    const uint32_t bits = bits_from_float(x[i]) & 0x7fffffffu;
    const uint32_t finite = bits < 0x7f800000u ? bits : 0;
    most = finite > most ? finite : most;
  }
  return float_from_bits(most);
}

inline void quantize_row(const GroupedLayout& l, const float* x, int8_t* xq, float* xs, float* xsum,
                         int32_t* start) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds half to even
  for (int64_t b = 0; b < l.k / l.block; ++b, x += l.block, xq += l.block) {
    const float most = finite_absmax(x, l.block), scale = most == 0.0f ? 1.0f : most / 127.0f;
    int32_t sum = 0;
    int32_t q[128];
    for (int64_t i = 0; i < l.block; ++i) {
      float v = x[i] / scale;
      v = v != v ? 0.0f : v;
      v = v > 127.0f ? 127.0f : v < -127.0f ? -127.0f : v;
      q[i] = static_cast<int32_t>(v + kRound - kRound);
      sum += q[i];
    }
    if (l.bits == 8) {
      for (int64_t i = 0; i < l.block; ++i) xq[i] = static_cast<int8_t>(q[i]);
    } else {
      for (int64_t i = 0; i < l.block; i += 8)
        for (int j = 0; j < 4; ++j) {
          xq[i + j] = static_cast<int8_t>(q[i + 2 * j]);
          xq[i + 4 + j] = static_cast<int8_t>(q[i + 2 * j + 1]);
        }
    }
    xs[b] = scale;
    xsum[b] = scale * static_cast<float>(sum);
    start[b] = -(l.bits == 8 ? 128 : 8) * sum;
  }
}

}  // namespace
}  // namespace narrowcast
