// conv2d_int8: exact int32 products of int8 weights and 8-bit images, epilogue fused.
//
//   acc[p, o] = sum over taps and channels of (x - x_zero_point) * w       (padding: zero point)
//   v = float(acc) * (x_scale * w_scale[o]) + bias[o]
//   y = post_activation(activation(v) + (residual - residual_zero_point) * residual_scale)
//   out = y as float32 / float16 / bfloat16, or
//         saturate(round_half_even(y * (1 / out_scale)) + out_zero_point)
//         to int8 (-127..127) or uint8 (0..255); NaN becomes out_zero_point
//
//   x         uint8 or int8, NHWC;  weights int8 [O, C / groups, KH, KW];  out NHWC
//   residual  int8, uint8 or a float dtype, NHWC like out
//
// Products and sums of the epilogue in this order, not fused: every kernel gives the same bits for
// none, relu, relu6 and hardswish. x of int8 is read as uint8 with 128 added to value and zero
// point.
#pragma once
#include <cstdint>

#include "common/activation.h"
#include "common/tensor_view.h"

namespace narrowcast {

struct ConvEpilogue {
  const float* scale;  // [O], x_scale * w_scale
  const float* bias;   // [O], zeros when there is none
  const void* residual = nullptr;
  void* out;
  float residual_scale = 1.0f, inverse_out_scale = 1.0f;
  int32_t residual_zero_point = 0, out_zero_point = 0;
  DType residual_dtype = DType::kUInt8, out_dtype = DType::kFloat32;
  Activation activation = Activation::kNone, post_activation = Activation::kNone;
  int64_t channels;  // O: distance of pixels in out and residual

  // Set by the run where codes can be made in integers: out and residual are codes, activations
  // none, relu or relu6, 1 / out_scale is positive and no value leaves int32. Then rounding is
  // monotone, so clamping the codes to [low, high] is the last activation and the saturation; the
  // activation before a residual is a clamp to [least, most].
  bool codes = false;
  int32_t low = 0, high = 0;
  float least = 0.0f, most = 0.0f;
};

// Some pixels times some panels of output channels.
struct ConvTile {
  const uint8_t* const* rows;  // rows[tap * pixels_per_tile + p]: `depth` bytes of the input
  int64_t taps, depth;         // depth: channels, rounded up to the kernel's depth_step
  const int8_t* weights;       // first panel; a panel is [tap][depth / step][panel channels][step]
  int64_t panel_bytes;
  const int32_t* init;            // -zero point * sum of weights, per output channel
  uint32_t flip;                  // 0x80808080 for int8 input, else 0
  int64_t first_pixel, pixels;    // output pixels; rows exist for all of a tile's pixels
  int64_t first_channel, panels;  // output channels
};

// One row of output pixels, 64 channels, each its own filter.
struct DepthwiseRow {
  const uint8_t* const* rows;  // [KH] rows of the input, or of zero points; channel 0 of pixel 0
  const uint8_t* zero_points;  // 64 of them or more
  const int8_t* weights;       // packed for these 64 channels
  const int32_t* init;
  void* scratch;  // kernel's own, depthwise_scratch bytes
  uint32_t flip;
  int64_t width, channels, kernel_height, kernel_width, stride, padding, dilation;
  int64_t out_width, first_pixel, first_channel, count;  // count <= 64 channels
};

struct Conv2dInt8Kernel {
  int panel;               // output channels in a panel
  int depth_step;          // input channels that lie together in a packed panel
  int max_panels;          // panels of one tile
  int pixels_per_tile[5];  // by panels of the tile, 1 .. max_panels
  void (*tile)(const ConvTile&, const ConvEpilogue&);
  // nullptr: depthwise layers run as any groups do
  void (*depthwise)(const DepthwiseRow&, const ConvEpilogue&);
  void (*pack_depthwise)(const int8_t* w, int64_t channels, int64_t kh, int64_t kw, int8_t* packed);
  int64_t (*depthwise_bytes)(int64_t channels, int64_t kh, int64_t kw);  // packed weights
  int64_t (*depthwise_scratch)(int64_t padded_width, int64_t kh);
};

struct Conv2dInt8Shape {
  int64_t batch, height, width, channels;
  int64_t out_channels, kernel_height, kernel_width;
  int64_t stride_h, stride_w, padding_h, padding_w, padding_right, dilation_h, dilation_w, groups;
  int64_t out_height, out_width;
};

// Weights packed for a kernel, with what the zero point and the scales make of them.
struct Conv2dInt8Weights {
  const Conv2dInt8Kernel* kernel;
  bool depthwise, grouped;  // grouped: neither one group nor depthwise
  const int8_t* packed;     // grouped: the canonical weights
  const int32_t* init;
  const float *scale, *bias;  // [O rounded up to 64]
  float largest = 0.0f;       // no |v| of the formula is larger; infinite when one is not finite
};

struct Conv2dInt8Args {
  Conv2dInt8Shape shape;
  Conv2dInt8Weights weights;
  ConvEpilogue epilogue;
  const uint8_t* x;
  bool x_signed;
  int32_t x_zero_point;
  void* scratch;  // conv2d_int8_scratch bytes
};

const Conv2dInt8Kernel& conv2d_int8_kernel();  // the one selected now
int64_t conv2d_int8_packed_bytes(const Conv2dInt8Kernel& kernel, const Conv2dInt8Shape& shape);
// Packs into 64-byte aligned memory of that size. w_scale, bias: float32, w_scale_count 1 or O.
Conv2dInt8Weights conv2d_int8_pack(const Conv2dInt8Kernel& kernel, const Conv2dInt8Shape& shape,
                                   const int8_t* w, const float* w_scale, int64_t w_scale_count,
                                   const float* bias, float x_scale, int32_t x_zero_point,
                                   bool x_signed, void* memory);
// The same description of memory that was packed before.
Conv2dInt8Weights conv2d_int8_weights(const Conv2dInt8Kernel& kernel, const Conv2dInt8Shape& shape,
                                      void* memory);
int64_t conv2d_int8_scratch(const Conv2dInt8Kernel& kernel, const Conv2dInt8Shape& shape);
void conv2d_int8_run(Conv2dInt8Args args);

#define KERNEL(name, isa) extern const Conv2dInt8Kernel conv2d_int8_##name;
#include "conv2d_int8/conv2d_int8.inc"
#undef KERNEL

// The scalar epilogue of one value, for the portable kernel and for grouped layers.
void conv2d_int8_finish(const ConvEpilogue& e, int32_t acc, int64_t pixel, int64_t channel);

}  // namespace narrowcast
