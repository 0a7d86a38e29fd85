// Rows of a KV cache with two 4-bit codes a byte: the rotation, the codes' places, their grids.
//
// A row x [D], D = 32, 64, 128 or 256, is kept as y = x H / sqrt(D), H Sylvester's Hadamard matrix,
// which is its own inverse: products of two rotated rows are those of the rows. In groups of 32,
// y = code * step + minimum; step and minimum are bfloat16, side by side. Byte i of the 16 of a
// group holds element i in the low nibble and element i + 16 in the high one.
//
// Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024 (the cache).
#pragma once
#include <cstdint>

#include "common/half.h"

namespace narrowcast {

constexpr int64_t kNibbleGroup = 32;

inline bool has_nibble_rows(int64_t depth) {
  return depth == 32 || depth == 64 || depth == 128 || depth == 256;
}

namespace {  // compiled for each instruction set that includes it

// In place; n a power of two.
inline void hadamard(float* x, int64_t n) {
  for (int64_t step = 1; step < n; step *= 2)
    for (int64_t i = 0; i < n; i += 2 * step)
      for (int64_t j = i; j < i + step; ++j) {
        const float a = x[j], b = x[j + step];
        x[j] = a + b, x[j + step] = a - b;
      }
  const float factor = n == 32    ? 0.17677669529663687f
                       : n == 64  ? 0.125f
                       : n == 128 ? 0.08838834764831845f
                                  : 0.0625f;
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

// Of the pair of a group: its step and its minimum.
inline float step_of(uint32_t pair) { return float_from_bits(pair << 16); }
inline float minimum_of(uint32_t pair) { return float_from_bits(pair & 0xffff0000u); }

// The byte of a group that holds element d of a row, and where in it.
inline int64_t nibble_byte(int64_t d) { return d / 32 * 16 + d % 16; }
inline int nibble_shift(int64_t d) { return d % 32 < 16 ? 0 : 4; }

}  // namespace
}  // namespace narrowcast
