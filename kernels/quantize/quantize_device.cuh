// The arithmetic of quantize.h on the device, for every kernel that quantises: the same bits.
#pragma once
#include "common/ptx.cuh"

namespace narrowcast {

constexpr float kSmallestNormal = 1.17549435e-38f;

__device__ __forceinline__ bool is_finite(float v) {
  return (ptx::bits_of_float(v) & 0x7f800000u) != 0x7f800000u;
}
__device__ __forceinline__ int32_t rounded(float v) {
  if (v != v) return 0;
  return static_cast<int32_t>(rintf(v < -1024.0f ? -1024.0f : v > 1024.0f ? 1024.0f : v));
}
__device__ __forceinline__ int32_t clamped(int32_t v, int32_t low, int32_t high) {
  return v < low ? low : v > high ? high : v;
}
// Of a row whose largest finite |x| is `top`.
__device__ __forceinline__ float symmetric_scale(float top) {
  const float scale = top / 127.0f;
  return scale >= kSmallestNormal ? scale : 1.0f;
}

}  // namespace narrowcast
