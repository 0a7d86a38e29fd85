// conv2d: y[n, o, i, j] = epilogue(sum over c, u, v of w[o, c, u, v] * x[n, c', i', j'])
//   with c' = channel c of o's group and (i', j') = (i, j) * stride - padding + (u, v) * dilation;
//   taps outside the image count as 0.
//
//   x, out, residual  NHWC; x and w float32, float16 or bfloat16.
//   packed            the weights, by conv2d_pack.
//   epilogue          bias, activations, residual, output: common/epilogue.h, a pixel is a row.
//
// Four forms: 1x1 without stride or padding is `linear` over pixels; depthwise (groups = channels
// = outputs) has a kernel here, and so have few channels where the CPU has AVX-512; everything else
// gathers the taps of some pixels into rows and takes linear's kernels, group by group.
//
// Numerics: those of linear (linear.h); depthwise in float32, fused, in the order of the taps.
#pragma once
#include "common/window.h"
#include "linear/linear.h"

namespace narrowcast {

struct Conv2dArgs {
  const void* x = nullptr;
  const void* packed = nullptr;
  Epilogue epilogue;
  DType dtype = DType::kFloat32;  // of x and the weights
  int64_t images = 0, channels = 0, height = 0, width = 0;
  int64_t out_channels = 0, out_height = 0, out_width = 0, groups = 1;
  Window window;
  const LinearKernel* linear = nullptr;  // what the weights are packed for
  void* scratch = nullptr;               // conv2d_scratch() bytes, 64-byte aligned
};

// The weights where they lie: [O, C / groups, height, width].
struct Conv2dWeight {
  const void* data;
  int64_t strides[4];
};

bool conv2d_is_depthwise(const Conv2dArgs& args);
bool conv2d_is_pointwise(const Conv2dArgs& args);
const char* conv2d_layout(const Conv2dArgs& args);  // equal names: equal packed bytes
int64_t conv2d_packed_bytes(const Conv2dArgs& args);
void conv2d_pack(const Conv2dArgs& args, const Conv2dWeight& weight, void* packed);
int64_t conv2d_scratch(const Conv2dArgs& args);
void conv2d_run(const Conv2dArgs& args);

constexpr int64_t kDepthwiseStep = 16;  // depthwise weights: float32 [taps][C up to a multiple]

struct Conv2dKernel {
  // One output row of [images * out_height].
  void (*depthwise)(const Conv2dArgs& args, int64_t row);
  // Taps of the pixels [p0, p1) in group g, one row per pixel, `ld` elements of `to_dtype` apart
  // and 0 from height * width * C / groups on.
  void (*gather)(const Conv2dArgs& args, int64_t group, int64_t p0, int64_t p1, DType to_dtype,
                 void* to, int64_t ld);
  // One output row, without gathering, of a float32 convolution in one group whose taps across lie
  // side by side and whose weights are packed as linear_float32_avx512 does; or nullptr.
  void (*direct)(const Conv2dArgs& args, int64_t row) = nullptr;
};
#define KERNEL(name, isa) extern const Conv2dKernel conv2d_##name;
#include "conv2d/conv2d.inc"
#undef KERNEL

}  // namespace narrowcast
