// The epilogue shared by every GEMM of the library, applied to acc * scales in float32:
//
//   y = post_activation(activation(v + bias[n]) + residual[m, n]), stored as float32, float16 or
//   bfloat16, or requantised: saturate(round_half_even(y * (1 / out_scale)) + out_zero_point) to
//   int8
//   (-127..127) or uint8 (0..255); NaN becomes out_zero_point.
//
// Vector forms: epilogue_avx512.h, epilogue_avx2.h; scalar form: finish() here. Products and sums
// in this order and never fused, so the none / relu / relu6 epilogues agree bit for bit in all of
// them.
#pragma once
#include <cstdint>

#include "common/activation.h"
#include "common/half.h"
#include "common/tensor_view.h"

namespace narrowcast {

struct Epilogue {
  const void* bias = nullptr;      // [N]
  const void* residual = nullptr;  // [M, N], rows ld_residual elements apart (0: one row for all)
  void* out = nullptr;             // [M, N], rows ld_out elements apart
  int64_t ld_residual = 0, ld_out = 0;
  DType bias_dtype = DType::kFloat32, residual_dtype = DType::kFloat32, out_dtype = DType::kFloat32;
  Activation activation = Activation::kNone, post_activation = Activation::kNone;
  float out_scale = 1.0f;
  int32_t out_zero_point = 0;
};

static inline float load_float(const void* p, int64_t i, DType dtype) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(p)[i];
  const uint16_t h = static_cast<const uint16_t*>(p)[i];
  return dtype == DType::kFloat16 ? from_float16(h) : from_bfloat16(h);
}

static inline void store_float(void* p, int64_t i, DType dtype, float v) {
  if (dtype == DType::kFloat32)
    static_cast<float*>(p)[i] = v;
  else
    static_cast<uint16_t*>(p)[i] = dtype == DType::kFloat16 ? to_float16(v) : to_bfloat16(v);
}

static inline void finish(const Epilogue& e, float v, int64_t m, int64_t n) {
  if (e.bias) v = v + load_float(e.bias, n, e.bias_dtype);
  v = activate(e.activation, v);
  if (e.residual) v = v + load_float(e.residual, m * e.ld_residual + n, e.residual_dtype);
  v = activate(e.post_activation, v);
  const int64_t at = m * e.ld_out + n;
  if (e.out_dtype != DType::kInt8 && e.out_dtype != DType::kUInt8)
    return store_float(e.out, at, e.out_dtype, v);
  const float low = e.out_dtype == DType::kInt8 ? -127.0f : 0.0f,
              high = low + (low < 0 ? 254.0f : 255.0f);
  v = v * (1.0f / e.out_scale);
  v = v != v ? 0.0f : v;
  v = v < -1024.0f ? -1024.0f : v > 1024.0f ? 1024.0f : v;
  v = __builtin_rintf(v) + static_cast<float>(e.out_zero_point);
  v = v < low ? low : v > high ? high : v;
  if (low < 0)
    static_cast<int8_t*>(e.out)[at] = static_cast<int8_t>(v);
  else
    static_cast<uint8_t*>(e.out)[at] = static_cast<uint8_t>(v);
}

}  // namespace narrowcast
