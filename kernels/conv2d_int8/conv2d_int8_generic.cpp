// Portable C++: one output channel at a time.
#include "common/half.h"
#include "conv2d_int8/conv2d_int8.h"

namespace narrowcast {
namespace {

float residual_value(const ConvEpilogue& e, int64_t i) {
  switch (e.residual_dtype) {
    case DType::kInt8:
      return static_cast<float>(static_cast<const int8_t*>(e.residual)[i] - e.residual_zero_point);
    case DType::kUInt8:
      return static_cast<float>(static_cast<const uint8_t*>(e.residual)[i] - e.residual_zero_point);
    case DType::kFloat32:
      return static_cast<const float*>(e.residual)[i];
    case DType::kFloat16:
      return from_float16(static_cast<const uint16_t*>(e.residual)[i]);
    default:
      return from_bfloat16(static_cast<const uint16_t*>(e.residual)[i]);
  }
}

void tile(const ConvTile& t, const ConvEpilogue& e) {
  for (int64_t p = 0; p < t.pixels; ++p)
    for (int64_t o = t.first_channel; o < t.first_channel + t.panels && o < e.channels; ++o) {
      const int8_t* w = t.weights + (o - t.first_channel) * t.panel_bytes;
      int32_t acc = t.init[o];
      for (int64_t tap = 0; tap < t.taps; ++tap) {
        const uint8_t* x = t.rows[tap + p * t.taps];
        for (int64_t k = 0; k < t.depth; ++k)
          acc += static_cast<int32_t>(x[k] ^ (t.flip & 0xff)) * w[tap * t.depth + k];
      }
      conv2d_int8_finish(e, acc, t.first_pixel + p, o);
    }
}

}  // namespace

void conv2d_int8_finish(const ConvEpilogue& e, int32_t acc, int64_t pixel, int64_t channel) {
  float v = static_cast<float>(acc) * e.scale[channel];
  v = activate(e.activation, v + e.bias[channel]);
  const int64_t at = pixel * e.channels + channel;
  if (e.residual) {
    const float r = residual_value(e, at) * e.residual_scale;
    v = v + r;
  }
  v = activate(e.post_activation, v);
  switch (e.out_dtype) {
    case DType::kFloat32:
      static_cast<float*>(e.out)[at] = v;
      return;
    case DType::kFloat16:
      static_cast<uint16_t*>(e.out)[at] = to_float16(v);
      return;
    case DType::kBFloat16:
      static_cast<uint16_t*>(e.out)[at] = to_bfloat16(v);
      return;
    default:
      break;
  }
  v = v * e.inverse_out_scale;
  v = v != v ? 0.0f : v < -1024.0f ? -1024.0f : v > 1024.0f ? 1024.0f : v;
  int32_t q = static_cast<int32_t>(__builtin_rintf(v)) + e.out_zero_point;
  const int32_t low = e.out_dtype == DType::kInt8 ? -127 : 0;
  const int32_t high = e.out_dtype == DType::kInt8 ? 127 : 255;
  q = q < low ? low : q > high ? high : q;
  static_cast<uint8_t*>(e.out)[at] = static_cast<uint8_t>(q);
}

extern const Conv2dInt8Kernel conv2d_int8_generic = {
    1, 1, 4, {0, 1, 1, 1, 1}, tile, nullptr, nullptr, nullptr, nullptr};

}  // namespace narrowcast
