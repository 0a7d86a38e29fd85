// conv2d_int8 on CUDA: where tensors stop. The private op that the dispatcher may choose.
#include "common/stable_cuda.h"
#include "conv2d_int8/conv2d_int8_checks.h"
#include "conv2d_int8/conv2d_int8_cuda.h"

namespace narrowcast {
namespace {

using namespace conv2d_int8_checks;

Tensor channels_last(const Tensor& t) {
  return torch::stable::contiguous(t, torch::headeronly::MemoryFormat::ChannelsLast);
}

Tensor conv2d_int8(const Tensor& x, double x_scale, int64_t x_zero_point, const Tensor& w,
                   const Tensor& w_scale, const std::optional<Tensor>& bias,
                   std::vector<int64_t> stride, std::vector<int64_t> padding,
                   std::vector<int64_t> dilation, int64_t groups, std::string activation,
                   const std::optional<Tensor>& residual, double residual_scale,
                   int64_t residual_zero_point, std::string post_activation, double out_scale,
                   int64_t out_zero_point, std::optional<ScalarType> out_dtype) {
  const OnDeviceOf here(x, op, "x_q");
  Held h{x, w, w_scale, bias, residual};
  Call c = call_of(h, x_scale, x_zero_point, stride, padding, dilation, groups, activation,
                   residual_scale, residual_zero_point, post_activation, out_scale, out_zero_point);
  c.out.dtype = out_dtype ? dtype_of(*out_dtype) : out_scale == 0 ? DType::kFloat32 : DType::kUInt8;
  Conv2dInt8CudaArgs a = {};
  a.shape = shape_of(c);
  check_scales(c, a.shape);
  const ConvEpilogue e = epilogue_of(c, a.shape);

  // Checked before anything is copied.
  const Conv2dInt8Shape& s = a.shape;
  h.x = channels_last(h.x);
  if (h.residual) h.residual = channels_last(*h.residual);
  Tensor out =
      empty_channels_last({s.batch, s.out_channels, s.out_height, s.out_width}, e.out_dtype);
  a.x = static_cast<const uint8_t*>(view(h.x, op, "x_q").data);
  a.x_signed = c.x.dtype == DType::kInt8;
  a.x_scale = static_cast<float>(x_scale), a.x_zero_point = static_cast<int32_t>(x_zero_point);
  a.w = static_cast<const int8_t*>(c.w.data);
  a.w_scale = static_cast<const float*>(c.w_scale.data);
  a.w_scale_stride = numel(c.w_scale) == 1 ? 0 : 1;
  a.bias = static_cast<const float*>(c.bias.data);
  a.residual = view(h.residual, op, "residual").data;
  a.residual_dtype = e.residual_dtype, a.residual_scale = e.residual_scale;
  a.residual_zero_point = e.residual_zero_point;
  a.activation = e.activation, a.post_activation = e.post_activation;
  a.out_dtype = e.out_dtype, a.out_scale = static_cast<float>(out_scale);
  a.out_zero_point = e.out_zero_point, a.out = out.mutable_data_ptr();
  Tensor scratch = empty({conv2d_int8_sm80_scratch(a)}, DType::kUInt8);
  conv2d_int8_sm80(a, scratch.mutable_data_ptr(), here.stream());
  return out;
}

}  // namespace
}  // namespace narrowcast

STABLE_TORCH_LIBRARY_IMPL(narrowcast, CUDA, m) {
  m.impl("_conv2d_int8_cuda", TORCH_BOX(&narrowcast::conv2d_int8));
}
