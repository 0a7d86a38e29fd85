// Where tensors stop: argument checks, the torch ops, the executor's steps.
#include <algorithm>
#include <cmath>

#include "common/image.h"
#include "common/rows.h"
#include "common/stable.h"
#include "common/step.h"
#include "pool/pool.h"

namespace narrowcast {
namespace {

using Numbers = std::vector<int64_t>;

// Everything but the pointers.
PoolArgs pool_args(const char* op, const TensorView& x, const Window& window, bool ceil) {
  NC_CHECK(x.dtype == DType::kInt8 || x.dtype == DType::kUInt8, op,
           "x_q must be int8 or uint8 [N, C, H, W], got ", name(x.dtype), " ", shape(x));
  check_image(op, "x_q", x);
  for (int d = 0; d < 2; ++d)
    NC_CHECK(window.padding[d] <= window.kernel[d] / 2, op,
             "padding must be at most half of kernel_size, got ", window.padding[d], " for ",
             window.kernel[d]);
  PoolArgs a;
  a.images = x.sizes[0], a.channels = x.sizes[1], a.height = x.sizes[2], a.width = x.sizes[3];
  a.window = window;
  a.out_height = window_positions(op, window, 0, a.height, ceil);
  a.out_width = window_positions(op, window, 1, a.width, ceil);
  a.is_signed = x.dtype == DType::kInt8;
  a.epilogue.ld_out = a.channels;
  return a;
}

PoolArgs max_args(const TensorView& x, const Numbers& kernel, const Numbers& stride,
                  const Numbers& padding, const Numbers& dilation, bool ceil) {
  constexpr const char* op = "max_pool2d_int8";
  NC_CHECK(!kernel.empty(), op, "kernel_size must be 2 numbers, got none");
  NC_CHECK(!stride.empty(), op, "stride must be 2 numbers, got none");
  PoolArgs a = pool_args(op, x, make_window(op, kernel, stride, padding, dilation), ceil);
  a.is_max = true, a.epilogue.out_dtype = x.dtype;
  return a;
}

PoolArgs average_args(const TensorView& x, double x_scale, int64_t x_zero_point,
                      const Numbers& kernel, const Numbers& stride, const Numbers& padding,
                      double out_scale, int64_t out_zero_point, DType out_dtype) {
  constexpr const char* op = "avg_pool2d_int8";
  const bool global = kernel.empty();
  NC_CHECK(!global || stride.empty(), op, "stride must be empty when kernel_size is, got ",
           stride.size(), " numbers");
  if (global) check_image(op, "x_q", x);
  const Numbers whole = global ? Numbers{x.sizes[2], x.sizes[3]} : kernel;
  PoolArgs a =
      pool_args(op, x, make_window(op, whole, stride.empty() ? whole : stride, padding, {}), false);
  NC_CHECK(!global || (a.window.padding[0] == 0 && a.window.padding[1] == 0), op,
           "padding must be 0 when kernel_size is empty, got ", a.window.padding[0], " and ",
           a.window.padding[1]);
  NC_CHECK(std::min(a.window.kernel[0], a.height) <=
               kPoolMostTaps / std::min(a.window.kernel[1], a.width),
           op, "kernel_size must cover at most 2^22 pixels, got ", a.window.kernel[0], " x ",
           a.window.kernel[1]);
  const auto in_range = [](int64_t z, bool is_signed) {
    return is_signed ? z >= -128 && z <= 127 : z >= 0 && z <= 255;
  };
  NC_CHECK(in_range(x_zero_point, a.is_signed), op, "x_zero_point must be a code of x_q's dtype ",
           name(x.dtype), ", got ", x_zero_point);
  const float scale = static_cast<float>(out_scale);
  NC_CHECK(out_scale == 0 || (scale > 0 && std::isfinite(scale) && std::isfinite(1.0f / scale)), op,
           "out_scale must be 0 (float output), or positive and finite, and so its inverse, got ",
           out_scale);
  if (out_scale == 0)
    NC_CHECK(is_floating(out_dtype), op,
             "out_dtype must be float32, float16 or bfloat16 when out_scale is 0, got ",
             name(out_dtype));
  else
    NC_CHECK((out_dtype == DType::kInt8 || out_dtype == DType::kUInt8) &&
                 in_range(out_zero_point, out_dtype == DType::kInt8),
             op, "out_dtype must be uint8 or int8, and out_zero_point one of its codes, got ",
             name(out_dtype), " and ", out_zero_point);
  a.x_scale = static_cast<float>(x_scale), a.x_zero_point = static_cast<int32_t>(x_zero_point);
  a.epilogue.out_dtype = out_dtype;
  if (out_scale != 0) a.epilogue.out_scale = scale;
  a.epilogue.out_zero_point = static_cast<int32_t>(out_zero_point);
  return a;
}

Tensor run(PoolArgs a, const TensorView& x) {
  const ReadableImage image(x);
  Tensor out =
      empty_channels_last({a.images, a.channels, a.out_height, a.out_width}, a.epilogue.out_dtype);
  a.x = image.view().data, a.epilogue.out = out.mutable_data_ptr();
  pool_run(a);
  return out;
}

Tensor max_pool2d_int8(const Tensor& x, Numbers kernel, Numbers stride, Numbers padding,
                       Numbers dilation, bool ceil) {
  const TensorView v = view(x, "max_pool2d_int8", "x_q");
  return run(max_args(v, kernel, stride, padding, dilation, ceil), v);
}

Tensor avg_pool2d_int8(const Tensor& x, double x_scale, int64_t x_zero_point, Numbers kernel,
                       Numbers stride, Numbers padding, double out_scale, int64_t out_zero_point,
                       std::optional<ScalarType> out_dtype) {
  const TensorView v = view(x, "avg_pool2d_int8", "x_q");
  const DType dtype = out_dtype        ? dtype_of(*out_dtype)
                      : out_scale == 0 ? DType::kFloat32
                                       : DType::kUInt8;
  return run(average_args(v, x_scale, x_zero_point, kernel, stride, padding, out_scale,
                          out_zero_point, dtype),
             v);
}

Step step(const StepSpec& s, PoolArgs a) {
  const TensorView& out = s.outputs[0];
  NC_CHECK(out.rank == 4 && is_channels_last(out) && out.dtype == a.epilogue.out_dtype &&
               out.sizes[0] == a.images && out.sizes[1] == a.channels &&
               out.sizes[2] == a.out_height && out.sizes[3] == a.out_width,
           s.op.c_str(), "out must be channels-last ", name(a.epilogue.out_dtype), " [", a.images,
           ", ", a.channels, ", ", a.out_height, ", ", a.out_width, "] in a plan, got ",
           name(out.dtype), " ", shape(out));
  const StepImage image(s.inputs[0]);
  a.x = image.view().data, a.epilogue.out = out.data;
  return [a, image] {
    image.refresh();
    pool_run(a);
  };
}

const RegisterStep steps[] = {
    {"max_pool2d_int8",
     [](const StepSpec& s, PackCache&) -> Step {
       return step(s, max_args(s.inputs[0], s.integers("kernel_size"), s.integers("stride"),
                               s.integers("padding"), s.integers("dilation"), s.flag("ceil_mode")));
     }},
    {"avg_pool2d_int8",
     [](const StepSpec& s, PackCache&) -> Step {
       return step(
           s, average_args(s.inputs[0], s.number("x_scale"), s.integer("x_zero_point"),
                           s.integers("kernel_size"), s.integers("stride"), s.integers("padding"),
                           s.number("out_scale"), s.integer("out_zero_point"), s.outputs[0].dtype));
     }},
};

}  // namespace
}  // namespace narrowcast

STABLE_TORCH_LIBRARY_IMPL(narrowcast, CPU, m) {
  m.impl("max_pool2d_int8", TORCH_BOX(&narrowcast::max_pool2d_int8));
  m.impl("avg_pool2d_int8", TORCH_BOX(&narrowcast::avg_pool2d_int8));
}
