// The CUDA side of conv2d_int8: the formula and the layouts of conv2d_int8.h with pointers into
// device memory, weights as they are given.
#pragma once
#include "common/launch.h"
#include "conv2d_int8/conv2d_int8.h"

namespace narrowcast {

struct Conv2dInt8CudaArgs {
  Conv2dInt8Shape shape;
  const uint8_t* x;             // NHWC
  const int8_t* w;              // [O, C / groups, KH, KW]
  const float *w_scale, *bias;  // [O] or one number (stride 0); [O] or nullptr
  const void* residual;         // NHWC, or nullptr
  void* out;                    // NHWC
  int64_t w_scale_stride;
  float x_scale, residual_scale, out_scale;  // out_scale: where out is of 8 bits
  int32_t x_zero_point, residual_zero_point, out_zero_point;
  bool x_signed;
  DType residual_dtype, out_dtype;
  Activation activation, post_activation;
};

// Bytes of device memory, 16-byte aligned, that a call needs.
int64_t conv2d_int8_sm80_scratch(const Conv2dInt8CudaArgs& args);
void conv2d_int8_sm80(const Conv2dInt8CudaArgs& args, void* scratch, Stream stream);

}  // namespace narrowcast
