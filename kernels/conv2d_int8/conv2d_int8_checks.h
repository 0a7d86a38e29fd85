// The checks that every compiled backend of conv2d_int8 makes: tensors in, shapes and epilogues
// out.
#pragma once
#include <cmath>

#include "common/stable.h"
#include "common/window_checks.h"
#include "conv2d_int8/conv2d_int8.h"

namespace narrowcast::conv2d_int8_checks {

constexpr const char* op = "conv2d_int8";

// The op's arguments; views of tensors that the caller keeps alive.
struct Call {
  TensorView x, w, w_scale, bias, residual, out;
  double x_scale, residual_scale, out_scale;
  int64_t x_zero_point, residual_zero_point, out_zero_point, groups;
  std::vector<int64_t> stride, padding, dilation;
  std::string activation, post_activation;
};

inline bool is_byte(DType t) { return t == DType::kInt8 || t == DType::kUInt8; }

inline bool zero_point_fits(DType t, int64_t z) {
  return t == DType::kInt8 ? z >= -128 && z <= 127 : z >= 0 && z <= 255;
}

inline float checked_scale(double scale, const char* argument) {
  const float s = static_cast<float>(scale);
  NC_CHECK(std::isfinite(s) && s != 0, op, argument, " must be finite and not 0, got ", scale);
  return s;
}

inline Conv2dInt8Shape shape_of(const Call& c) {
  NC_CHECK(is_byte(c.x.dtype), op, "x_q must be uint8 or int8, got ", name(c.x.dtype));
  check_image(op, "x_q", c.x);
  NC_CHECK(c.w.rank == 4 && c.w.dtype == DType::kInt8, op,
           "w_q must be int8 [O, C / groups, KH, KW], got ", name(c.w.dtype), " ", shape(c.w));
  Conv2dInt8Shape s;
  s.batch = c.x.sizes[0], s.channels = c.x.sizes[1], s.height = c.x.sizes[2],
  s.width = c.x.sizes[3];
  s.out_channels = c.w.sizes[0], s.kernel_height = c.w.sizes[2], s.kernel_width = c.w.sizes[3];
  s.groups = c.groups;
  NC_CHECK(c.groups >= 1 && s.channels % c.groups == 0 && s.out_channels % c.groups == 0, op,
           "groups must divide the input channels ", s.channels, " and the output channels ",
           s.out_channels, ", got ", c.groups);
  NC_CHECK(s.channels >= 1 && c.w.sizes[1] == s.channels / c.groups, op, "w_q must be [O, ",
           s.channels / c.groups, ", KH, KW] for ", s.channels, " channels in ", c.groups,
           " groups, got ", shape(c.w));
  NC_CHECK(
      s.kernel_height >= 1 && s.kernel_width >= 1 && s.kernel_height <= 64 && s.kernel_width <= 64,
      op, "w_q must have kernel sizes from 1 to 64, got ", shape(c.w));
  NC_CHECK(c.w.sizes[1] * s.kernel_height * s.kernel_width <= 65536, op,
           "w_q must have at most 65536 weights per output channel (int32 sums), got ", shape(c.w));
  const Window w =
      make_window(op, {s.kernel_height, s.kernel_width}, c.stride, c.padding, c.dilation, true);
  s.stride_h = w.stride[0], s.stride_w = w.stride[1];
  s.padding_h = w.padding[0], s.padding_w = w.padding[1];
  s.padding_right = w.end[1];
  s.dilation_h = w.dilation[0], s.dilation_w = w.dilation[1];
  s.out_height = window_positions(op, w, 0, s.height, false, "w_q");
  s.out_width = window_positions(op, w, 1, s.width, false, "w_q");
  return s;
}

inline void check_scales(const Call& c, const Conv2dInt8Shape& s) {
  checked_scale(c.x_scale, "x_scale");
  NC_CHECK(zero_point_fits(c.x.dtype, c.x_zero_point), op,
           "x_zero_point must be a value of x_q's dtype ", name(c.x.dtype), ", got ",
           c.x_zero_point);
  NC_CHECK(
      c.w_scale.dtype == DType::kFloat32 &&
          (numel(c.w_scale) == 1 || (c.w_scale.rank == 1 && c.w_scale.sizes[0] == s.out_channels)),
      op, "w_scale must be float32 [O] = [", s.out_channels, "] or one number, got ",
      name(c.w_scale.dtype), " ", shape(c.w_scale));
  NC_CHECK(!defined(c.bias) || (c.bias.dtype == DType::kFloat32 && c.bias.rank == 1 &&
                                c.bias.sizes[0] == s.out_channels),
           op, "bias must be float32 [O] = [", s.out_channels, "], got ", name(c.bias.dtype), " ",
           shape(c.bias));
}

inline ConvEpilogue epilogue_of(const Call& c, const Conv2dInt8Shape& s) {
  ConvEpilogue e{};
  e.activation = parse_activation(c.activation.c_str(), op, "activation");
  e.post_activation = parse_activation(c.post_activation.c_str(), op, "post_activation");
  e.channels = s.out_channels;
  e.out_dtype = c.out.dtype;
  NC_CHECK(is_floating(e.out_dtype) || is_byte(e.out_dtype), op,
           "out_dtype must be float32, float16, bfloat16, int8 or uint8, got ", name(e.out_dtype));
  if (is_byte(e.out_dtype)) {
    NC_CHECK(c.out_scale != 0, op, "out_scale must be given for out_dtype ", name(e.out_dtype));
    e.inverse_out_scale = 1.0f / checked_scale(c.out_scale, "out_scale");
    NC_CHECK(std::isfinite(e.inverse_out_scale), op, "out_scale must be a normal number, got ",
             c.out_scale);
    NC_CHECK(zero_point_fits(e.out_dtype, c.out_zero_point), op,
             "out_zero_point must be a value of out_dtype ", name(e.out_dtype), ", got ",
             c.out_zero_point);
    e.out_zero_point = static_cast<int32_t>(c.out_zero_point);
  } else {
    NC_CHECK(c.out_scale == 0, op, "out_scale must be left out for out_dtype ", name(e.out_dtype),
             ", got ", c.out_scale);
  }
  if (defined(c.residual)) {
    const TensorView& r = c.residual;
    NC_CHECK(r.rank == 4 && r.sizes[0] == s.batch && r.sizes[1] == s.out_channels &&
                 r.sizes[2] == s.out_height && r.sizes[3] == s.out_width,
             op, "residual must have the shape of the output [", s.batch, ", ", s.out_channels,
             ", ", s.out_height, ", ", s.out_width, "], got ", shape(r));
    NC_CHECK(is_floating(r.dtype) || is_byte(r.dtype), op,
             "residual must be int8, uint8, float32, float16 or bfloat16, got ", name(r.dtype));
    e.residual = r.data, e.residual_dtype = r.dtype;
    e.residual_scale = checked_scale(c.residual_scale, "residual_scale");
    NC_CHECK(!is_byte(r.dtype) || zero_point_fits(r.dtype, c.residual_zero_point), op,
             "residual_zero_point must be a value of residual's dtype ", name(r.dtype), ", got ",
             c.residual_zero_point);
    e.residual_zero_point = is_byte(r.dtype) ? static_cast<int32_t>(c.residual_zero_point) : 0;
  }
  return e;
}

// Tensors kept alive for the length of a call, weights in the layout that kernels read.
struct Held {
  Tensor x, w, w_scale;
  std::optional<Tensor> bias, residual;
};

inline Call call_of(Held& h, double x_scale, int64_t x_zero_point,
                    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                    const std::vector<int64_t>& dilation, int64_t groups,
                    const std::string& activation, double residual_scale,
                    int64_t residual_zero_point, const std::string& post_activation,
                    double out_scale, int64_t out_zero_point) {
  view(h.w, op, "w_q"), view(h.w_scale, op, "w_scale"), view(h.bias, op, "bias");
  h.w = as_contiguous(h.w), h.w_scale = as_contiguous(h.w_scale);
  if (h.bias) h.bias = as_contiguous(*h.bias);
  Call c;
  c.x = view(h.x, op, "x_q"), c.w = view(h.w, op, "w_q"),
  c.w_scale = view(h.w_scale, op, "w_scale");
  c.bias = view(h.bias, op, "bias"), c.residual = view(h.residual, op, "residual");
  c.x_scale = x_scale, c.x_zero_point = x_zero_point;
  c.stride = stride, c.padding = padding, c.dilation = dilation, c.groups = groups;
  c.activation = activation, c.post_activation = post_activation;
  c.residual_scale = residual_scale, c.residual_zero_point = residual_zero_point;
  c.out_scale = out_scale, c.out_zero_point = out_zero_point;
  return c;
}

}  // namespace narrowcast::conv2d_int8_checks
