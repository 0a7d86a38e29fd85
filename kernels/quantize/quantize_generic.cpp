#include "common/half.h"
#include "quantize/quantize.h"

namespace narrowcast {
namespace {

constexpr float kSmallestNormal = 1.17549435e-38f;

float load(const void* p, int64_t i, DType dtype) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(p)[i];
  const uint16_t h = static_cast<const uint16_t*>(p)[i];
  return dtype == DType::kFloat16 ? from_float16(h) : from_bfloat16(h);
}

bool is_finite(float v) { return (bits_from_float(v) & 0x7f800000u) != 0x7f800000u; }

// Clamped before the conversion to int, which has no defined result outside its range.
int32_t rounded(float v) {
  if (v != v) return 0;
  v = v < -1024.0f ? -1024.0f : v > 1024.0f ? 1024.0f : v;
  return static_cast<int32_t>(__builtin_rintf(v));
}

int32_t clamped(int32_t v, int32_t low, int32_t high) {
  return v < low ? low : v > high ? high : v;
}

void row(const void* x, DType dtype, int64_t count, bool asymmetric, int8_t* q, float* scale,
         int32_t* zero_point, QuantizeFindings* findings) {
  float low = 0.0f, high = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float v = load(x, i, dtype);
    if (!is_finite(v)) {
      findings->finite = false;
      findings->nan += v != v;
      continue;
    }
    low = v < low ? v : low;
    high = v > high ? v : high;
  }
  float s = asymmetric ? high / 255.0f - low / 255.0f : (-low > high ? -low : high) / 127.0f;
  if (!(s >= kSmallestNormal)) s = 1.0f;
  const float inverse = 1.0f / s;
  const int32_t zero = asymmetric ? rounded(-128.0f - low * inverse) : 0;
  *scale = s;
  if (asymmetric) *zero_point = zero;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t v = rounded(load(x, i, dtype) * inverse) + zero;
    q[i] = static_cast<int8_t>(clamped(v, asymmetric ? -128 : -127, 127));
  }
}

void by_scale(const void* x, DType dtype, int64_t count, float inverse_scale, int32_t zero_point,
              bool is_signed, void* q, QuantizeFindings* findings) {
  for (int64_t i = 0; i < count; ++i) {
    const float v = load(x, i, dtype);
    if (!is_finite(v)) {
      findings->finite = false;
      findings->nan += v != v;
    }
    const int32_t code = rounded(v * inverse_scale) + zero_point;
    if (is_signed)
      static_cast<int8_t*>(q)[i] = static_cast<int8_t>(clamped(code, -127, 127));
    else
      static_cast<uint8_t*>(q)[i] = static_cast<uint8_t>(clamped(code, 0, 255));
  }
}

}  // namespace

extern const QuantizeKernel quantize_generic = {row, by_scale};

}  // namespace narrowcast
