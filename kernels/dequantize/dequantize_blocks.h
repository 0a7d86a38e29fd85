// The loops of dequantize_gguf and dequantize_int8, compiled once per instruction set: each kernel
// file includes this, and the compiler vectorises. They are bound by the store of the result, so
// intrinsics would gain nothing. Internal linkage throughout.
#pragma once
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "common/half.h"
#include "dequantize/dequantize_gguf.h"

namespace narrowcast {
namespace {

constexpr int kPiece = 256;  // elements per pass, converted through a buffer on the stack

inline float half_at(const uint8_t* p) {
  uint16_t h;
  memcpy(&h, p, sizeof h);
  return from_float16(h);
}

inline void store_piece(const float* x, int64_t count, void* out, int64_t first, DType dtype) {
  if (dtype == DType::kFloat32) {
    memcpy(static_cast<float*>(out) + first, x, count * sizeof(float));
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(out) + first;
  if (dtype == DType::kBFloat16) {
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = bits_from_float(x[i]);
      const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16,
                     nan = (bits >> 16) | 0x40;
      to[i] = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
    }
    return;
  }
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < count; ++i) to[i] = to_float16(x[i]);
}

inline void scale_codes(const int8_t* q, float d, float* y, int count) {
  for (int i = 0; i < count; ++i) y[i] = d * static_cast<float>(q[i]);
}
inline void scale_codes_plus(const int8_t* q, float d, float m, float* y, int count) {
  for (int i = 0; i < count; ++i) y[i] = d * static_cast<float>(q[i]) + m;
}
inline void scale_codes_minus(const int8_t* q, float d, float m, float* y, int count) {
  for (int i = 0; i < count; ++i) y[i] = d * static_cast<float>(q[i]) - m;
}

// The 32-element types. Low nibbles are elements 0..15, high ones 16..31; bit j of qh is bit 4 of
// element j.
inline void block_of_32(GgufType type, const uint8_t* b, float* y) {
  const bool five = type == GgufType::kQ5_0 || type == GgufType::kQ5_1;
  const bool has_min = type == GgufType::kQ4_1 || type == GgufType::kQ5_1;
  const float d = half_at(b);
  if (type == GgufType::kQ8_0) {
    int8_t q[32];
    memcpy(q, b + 2, 32);
    return scale_codes(q, d, y, 32);
  }
  const uint8_t* nibbles = b + (has_min ? 4 : 2) + (five ? 4 : 0);
  int8_t q[32];
  for (int j = 0; j < 16; ++j) q[j] = nibbles[j] & 15, q[j + 16] = nibbles[j] >> 4;
  if (five) {
    uint32_t high;
    memcpy(&high, nibbles - 4, sizeof high);
    for (int j = 0; j < 32; ++j) q[j] |= static_cast<int8_t>((high >> j & 1) << 4);
  }
  if (has_min) return scale_codes_plus(q, d, half_at(b + 2), y, 32);
  const int8_t centre = five ? 16 : 8;
  for (int j = 0; j < 32; ++j) q[j] -= centre;
  scale_codes(q, d, y, 32);
}

// Q4_K, Q5_K: chunk c of 64 elements takes 32 bytes; low nibbles are its first half, with scale
// pair 2c, high ones its second, with pair 2c + 1. Bits 2c and 2c + 1 of qh[l] are bit 4 of the two
// elements of byte l.
inline void block_k(bool five, const uint8_t* b, float* y) {
  const float d = half_at(b), dmin = half_at(b + 2);
  const uint8_t* s = b + 4;
  const uint8_t* high = b + 16;
  const uint8_t* nibbles = b + (five ? 48 : 16);
  for (int j = 0; j < 8; ++j) {
    const int scale = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | (s[j - 4] >> 6) << 4;
    const int minimum = j < 4 ? s[j + 4] & 63 : s[j + 4] >> 4 | (s[j] >> 6) << 4;
    const uint8_t* from = nibbles + j / 2 * 32;
    const int shift = j % 2 * 4;
    int8_t q[32];
    for (int l = 0; l < 32; ++l) q[l] = from[l] >> shift & 15;
    if (five)
      for (int l = 0; l < 32; ++l) q[l] |= (high[l] >> j & 1) << 4;
    scale_codes_minus(q, d * static_cast<float>(scale), dmin * static_cast<float>(minimum),
                      y + 32 * j, 32);
  }
}

// Q6_K: two halves of 128; each byte of ql holds elements l and l + 64 of its half, qh two more
// bits of four.
inline void block_q6(const uint8_t* b, float* y) {
  const float d = half_at(b + 208);
  for (int half = 0; half < 2; ++half) {
    const uint8_t* ql = b + half * 64;
    const uint8_t* qh = b + 128 + half * 32;
    const int8_t* s = reinterpret_cast<const int8_t*>(b) + 192 + half * 8;
    for (int part = 0; part < 4; ++part) {
      int8_t q[32];
      const uint8_t* low = ql + part % 2 * 32;
      for (int l = 0; l < 32; ++l)
        q[l] = static_cast<int8_t>(
            ((low[l] >> (part / 2 * 4) & 15) | (qh[l] >> (2 * part) & 3) << 4) - 32);
      float* to = y + half * 128 + part * 32;
      scale_codes(q, d * static_cast<float>(s[2 * part]), to, 16);
      scale_codes(q + 16, d * static_cast<float>(s[2 * part + 1]), to + 16, 16);
    }
  }
}

inline void plain_elements(GgufType type, const uint8_t* b, float* y, int count) {
  if (type == GgufType::kF32) memcpy(y, b, count * sizeof(float));
  if (type == GgufType::kF16)
    for (int i = 0; i < count; ++i) y[i] = half_at(b + 2 * i);
  if (type == GgufType::kBF16)
    for (int i = 0; i < count; ++i) {
      uint16_t h;
      memcpy(&h, b + 2 * i, sizeof h);
      y[i] = from_bfloat16(h);
    }
}

inline void gguf_blocks(GgufType type, const uint8_t* blocks, int64_t count, void* out,
                        DType out_dtype) {
  const GgufLayout layout = kGgufLayouts[static_cast<int>(type)];
  const int64_t per_piece = kPiece / layout.elements;
  float y[kPiece];
  for (int64_t i = 0; i < count; i += per_piece) {
    const int64_t here = count - i < per_piece ? count - i : per_piece;
    const uint8_t* b = blocks + i * layout.bytes;
    if (layout.elements == 1)
      plain_elements(type, b, y, static_cast<int>(here));
    else if (layout.elements == 32)
      for (int64_t j = 0; j < here; ++j) block_of_32(type, b + j * layout.bytes, y + 32 * j);
    else if (type == GgufType::kQ6_K)
      block_q6(b, y);
    else
      block_k(type == GgufType::kQ5_K, b, y);
    store_piece(y, here * layout.elements, out, i * layout.elements, out_dtype);
  }
}

template <class Code>
inline void int8_codes(const Code* q, int32_t zero_point, float scale, void* out, DType out_dtype,
                       int64_t count) {
  float y[kPiece];
  for (int64_t i = 0; i < count; i += kPiece) {
    const int64_t here = count - i < kPiece ? count - i : kPiece;
    for (int64_t j = 0; j < here; ++j) {
      const uint32_t difference =
          static_cast<uint32_t>(q[i + j]) - static_cast<uint32_t>(zero_point);
      y[j] = static_cast<float>(static_cast<int32_t>(difference)) * scale;
    }
    store_piece(y, here, out, i, out_dtype);
  }
}

}  // namespace
}  // namespace narrowcast

#define NC_DEQUANTIZE_KERNELS(variant)                                                             \
  namespace narrowcast {                                                                           \
  void dequantize_gguf_##variant(GgufType type, const uint8_t* blocks, int64_t count, void* out,   \
                                 DType out_dtype) {                                                \
    gguf_blocks(type, blocks, count, out, out_dtype);                                              \
  }                                                                                                \
  void dequantize_int8_##variant(const void* q, bool is_unsigned, int32_t zero_point, float scale, \
                                 void* out, DType out_dtype, int64_t count) {                      \
    if (is_unsigned)                                                                               \
      int8_codes(static_cast<const uint8_t*>(q), zero_point, scale, out, out_dtype, count);        \
    else                                                                                           \
      int8_codes(static_cast<const int8_t*>(q), zero_point, scale, out, out_dtype, count);         \
  }                                                                                                \
  }
