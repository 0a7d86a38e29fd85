// What the instruction sets' files of this room share: the preparation of x and the packing of
// rows. Plain loops, compiled once per file with its flags. Internal linkage throughout.
#pragma once
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "common/half.h"
#include "linear_grouped/linear_grouped.h"

namespace narrowcast {
namespace {

constexpr int kMaxBlock = 128;

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

// Below the smallest normal float32 a scale becomes 1, as in the quantize room.
inline float scale_of(float absmax) {
  const float scale = absmax / 127.0f;
  return scale >= 1.17549435e-38f ? scale : 1.0f;
}

inline const void* advance(const void* p, DType dtype, int64_t count) {
  return static_cast<const uint8_t*>(p) + count * (dtype == DType::kFloat32 ? 4 : 2);
}

// (q >> shift) of a block as bytes, in the order of xq.
inline void interleave(const GroupedLayout& l, const int32_t* q, int shift, int8_t* to, int ld) {
  int8_t codes[kMaxBlock];
  for (int64_t i = 0; i < l.block; i += 8)
    for (int j = 0; j < 8; ++j) {
      const int from = l.bits == 8 ? j : 2 * (j & 3) + (j >> 2);
      codes[i + j] = static_cast<int8_t>(q[i + from] >> shift);
    }
  for (int64_t i = 0; i < l.block; i += 4) memcpy(to + i * ld, codes + i, 4);
}

inline void prepare8(const GroupedLayout& l, const void* x, DType dtype, int r,
                     const GroupedTile& t) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds half to even
  for (int64_t b = 0; b < l.k / l.block; ++b) {
    float v[kMaxBlock];
    int32_t q[kMaxBlock];
    widen(advance(x, dtype, b * l.block), dtype, l.block, v);
    const float scale = scale_of(finite_absmax(v, l.block)), inverse = 1.0f / scale;
    int32_t sum = 0;
    for (int64_t i = 0; i < l.block; ++i) {
      float y = v[i] * inverse;
      y = y != y ? 0.0f : y;
      y = y > 127.0f ? 127.0f : y < -127.0f ? -127.0f : y;
      q[i] = static_cast<int32_t>(y + kRound - kRound);
      sum += q[i];
    }
    interleave(l, q, 0, t.xq + b * l.block * t.ld + 4 * r, t.ld);
    const int64_t at = b * t.ld + r;
    t.xs[at] = scale;
    t.xsum[at] = scale * static_cast<float>(sum);
    t.start[at] = -(l.bits == 8 ? 128 : 8) * sum;
  }
}

constexpr float kMost16 = 32639.0f;  // 127 * 256 + 127

// The scale of a row of 16-bit codes; NaN for one that holds a NaN or an infinity.
inline float scale_of_row(uint32_t absmax_bits) {
  if (absmax_bits >= 0x7f800000u) return __builtin_nanf("");
  const float scale = float_from_bits(absmax_bits) / kMost16;
  return scale >= 1.17549435e-38f ? scale : 1.0f;
}

inline void prepare16(const GroupedLayout& l, const void* x, DType dtype, int r,
                      const GroupedTile& t) {
  constexpr float kRound = 12582912.0f;
  float v[kMaxBlock];
  uint32_t most = 0;
  for (int64_t b = 0; b < l.k / l.block; ++b) {
    widen(advance(x, dtype, b * l.block), dtype, l.block, v);
    for (int64_t i = 0; i < l.block; ++i) {
      const uint32_t bits = bits_from_float(v[i]) & 0x7fffffffu;
      most = bits > most ? bits : most;
    }
  }
  const float scale = scale_of_row(most), inverse = scale == scale ? 1.0f / scale : 0.0f;
  t.xs[r] = scale;
  for (int64_t b = 0; b < l.k / l.block; ++b) {
    int32_t q[kMaxBlock], upper[kMaxBlock], sum = 0;
    widen(advance(x, dtype, b * l.block), dtype, l.block, v);
    for (int64_t i = 0; i < l.block; ++i) {
      float y = v[i] * inverse;
      y = y > kMost16 ? kMost16 : y > -kMost16 ? y : -kMost16;
      q[i] = static_cast<int32_t>(y + kRound - kRound);
      upper[i] = q[i] + 128;
      sum += q[i];
    }
    interleave(l, upper, 8, t.xq + b * l.block * t.ld + 4 * r, t.ld);
    interleave(l, q, 0, t.xl + b * l.block * t.ld + 4 * r, t.ld);
    const int64_t at = b * t.ld + r;
    t.xsum[at] = static_cast<float>(sum);
    t.start[at] = -(l.bits == 8 ? 128 : 8) * sum;
  }
}

inline void prepare32(const GroupedLayout& l, const void* x, DType dtype, int r,
                      const GroupedTile& t) {
  for (int64_t b = 0; b < l.k / l.block; ++b) {
    float v[kMaxBlock], lane[16] = {};
    widen(advance(x, dtype, b * l.block), dtype, l.block, v);
    for (int64_t i = 0; i < l.block; i += 16)
      for (int j = 0; j < 16; ++j) lane[j] += v[i + j];
    float sum = 0;
    for (int j = 0; j < 16; ++j) sum += lane[j];
    t.xsum[b * t.ld + r] = sum;
    float* to = t.x + b * l.block * t.ld + r;
    for (int64_t i = 0; i < l.block; ++i) to[i * t.ld] = v[i];
  }
}

inline void pack_rows(const uint8_t* rows, int64_t row_bytes, int64_t dwords, uint32_t flip,
                      uint8_t* out) {
  for (int64_t d = 0; d < dwords; ++d)
    for (int r = 0; r < kGroupedPanel; ++r, out += 4) {
      uint32_t v;
      memcpy(&v, rows + r * row_bytes + 4 * d, 4);
      v ^= flip;
      memcpy(out, &v, 4);
    }
}

}  // namespace
}  // namespace narrowcast
