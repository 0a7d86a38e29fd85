// Scalar float16 / bfloat16 conversions, round to nearest even. Internal linkage: safe in ISA
// files.
#pragma once
#include <cstdint>
#include <cstring>

namespace narrowcast {

static inline float float_from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
static inline uint32_t bits_from_float(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

static inline float from_bfloat16(uint16_t h) {
  return float_from_bits(static_cast<uint32_t>(h) << 16);
}

static inline uint16_t to_bfloat16(float x) {
  const uint32_t bits = bits_from_float(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u)
    return static_cast<uint16_t>((bits >> 16) | 0x40);  // NaN stays NaN
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

static inline float from_float16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Subnormals included: scale the 15 bits, read as a float exponent field, by 2^112.
  const float scaled = float_from_bits(magnitude << 13) * 5.192296858534828e33f;
  return float_from_bits(sign | bits_from_float(scaled));
}

static inline uint16_t to_float16(float x) {
  const uint32_t bits = bits_from_float(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // rounds to infinity
  if (magnitude < 0x38800000u) {                        // subnormal: let the adder round
    const float shifted = float_from_bits(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(bits_from_float(shifted) - 0x3f000000u);
  }
  magnitude += 0xc8000fffu + ((magnitude >> 13) & 1);  // rebias by -112 and round to even
  return sign | static_cast<uint16_t>(magnitude >> 13);
}

}  // namespace narrowcast
