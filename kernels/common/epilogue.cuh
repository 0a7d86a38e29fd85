// The epilogue of common/epilogue.h on the device: the same formula in the same order, four
// neighbouring columns at a time.
#pragma once
#include "common/epilogue.h"
#include "common/ptx.cuh"

namespace narrowcast {

// The formulas of activation.cpp.
__device__ inline float activate_device(Activation activation, float x) {
  switch (activation) {
    case Activation::kNone:
      return x;
    case Activation::kRelu:
      return x < 0 ? 0.0f : x;
    case Activation::kRelu6:
      return x < 0 ? 0.0f : x > 6 ? 6.0f : x;
    case Activation::kHardswish: {
      const float gate = x + 3 < 0 ? 0.0f : x + 3 > 6 ? 6.0f : x + 3;
      return x * gate * (1.0f / 6.0f);
    }
    case Activation::kSilu:
      return x / (1.0f + expf(-x));
    case Activation::kGelu:
      return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case Activation::kGeluTanh:
      return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
  }
  return x;
}

__device__ __forceinline__ float load_float_device(const void* p, int64_t i, DType dtype) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(p)[i];
  const uint16_t h = static_cast<const uint16_t*>(p)[i];
  return dtype == DType::kFloat16 ? ptx::float_of_float16(h) : ptx::float_of_bfloat16(h);
}

// Requantised: 8 bits of int8 or uint8.
__device__ __forceinline__ uint8_t requantised(const Epilogue& e, float v) {
  const float low = e.out_dtype == DType::kInt8 ? -127.0f : 0.0f;
  const float high = low + (low < 0 ? 254.0f : 255.0f);
  v = v * (1.0f / e.out_scale);
  v = v != v ? 0.0f : v;
  v = v < -1024.0f ? -1024.0f : v > 1024.0f ? 1024.0f : v;
  v = rintf(v) + static_cast<float>(e.out_zero_point);
  v = v < low ? low : v > high ? high : v;
  return static_cast<uint8_t>(static_cast<int>(v));
}

// How many of four columns exist where `left` are left.
__device__ __forceinline__ int four_of(int64_t left) {
  return left < 4 ? static_cast<int>(left) : 4;
}

// Loops over v are unrolled so that it stays in registers. v[0..3] are acc * scales of columns n ..
// n + 3 of row m; `count` of them exist.
__device__ inline void finish_device(const Epilogue& e, float (&v)[4], int64_t m, int64_t n,
                                     int count) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i >= count) continue;
    if (e.bias) v[i] = v[i] + load_float_device(e.bias, n + i, e.bias_dtype);
    v[i] = activate_device(e.activation, v[i]);
    if (e.residual)
      v[i] = v[i] + load_float_device(e.residual, m * e.ld_residual + n + i, e.residual_dtype);
    v[i] = activate_device(e.post_activation, v[i]);
  }
  const int64_t at = m * e.ld_out + n;
  if (e.out_dtype == DType::kFloat32) {
    float* out = static_cast<float*>(e.out) + at;
    if (count == 4 && reinterpret_cast<uintptr_t>(out) % 16 == 0)
      ptx::store_global_128(out, {ptx::bits_of_float(v[0]), ptx::bits_of_float(v[1]),
                                  ptx::bits_of_float(v[2]), ptx::bits_of_float(v[3])});
    else
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (i < count) out[i] = v[i];
  } else if (e.out_dtype == DType::kFloat16 || e.out_dtype == DType::kBFloat16) {
    uint16_t* out = static_cast<uint16_t*>(e.out) + at;
    uint16_t h[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      h[i] = e.out_dtype == DType::kFloat16 ? ptx::float16_bits(v[i]) : ptx::bfloat16_bits(v[i]);
    if (count == 4 && reinterpret_cast<uintptr_t>(out) % 8 == 0)
      ptx::store_global_64(out, h[0] | static_cast<uint32_t>(h[1]) << 16,
                           h[2] | static_cast<uint32_t>(h[3]) << 16);
    else
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (i < count) out[i] = h[i];
  } else {
    uint8_t* out = static_cast<uint8_t*>(e.out) + at;
    uint32_t codes = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) codes |= static_cast<uint32_t>(requantised(e, v[i])) << i * 8;
    if (count == 4 && reinterpret_cast<uintptr_t>(out) % 4 == 0)
      *reinterpret_cast<uint32_t*>(out) = codes;
    else
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (i < count) out[i] = static_cast<uint8_t>(codes >> i * 8);
  }
}

}  // namespace narrowcast
