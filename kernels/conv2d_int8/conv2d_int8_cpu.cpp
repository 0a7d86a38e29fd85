// Where tensors stop: argument checks, the torch ops, the executor's step.
#include <cmath>

#include "common/image.h"
#include "common/rows.h"
#include "common/scratch.h"
#include "common/stable.h"
#include "common/step.h"
#include "conv2d_int8/conv2d_int8.h"

namespace narrowcast {
namespace {

constexpr const char* op = "conv2d_int8";

// The op's arguments; views of tensors that the caller keeps alive.
struct Call {
  TensorView x, w, w_scale, bias, residual, out;
  double x_scale, residual_scale, out_scale;
  int64_t x_zero_point, residual_zero_point, out_zero_point, groups;
  std::vector<int64_t> stride, padding, dilation;
  std::string activation, post_activation;
};

bool is_byte(DType t) { return t == DType::kInt8 || t == DType::kUInt8; }

bool zero_point_fits(DType t, int64_t z) {
  return t == DType::kInt8 ? z >= -128 && z <= 127 : z >= 0 && z <= 255;
}

float checked_scale(double scale, const char* argument) {
  const float s = static_cast<float>(scale);
  NC_CHECK(std::isfinite(s) && s != 0, op, argument, " must be finite and not 0, got ", scale);
  return s;
}

Conv2dInt8Shape shape_of(const Call& c) {
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
      make_window(op, {s.kernel_height, s.kernel_width}, c.stride, c.padding, c.dilation);
  s.stride_h = w.stride[0], s.stride_w = w.stride[1];
  s.padding_h = w.padding[0], s.padding_w = w.padding[1];
  s.dilation_h = w.dilation[0], s.dilation_w = w.dilation[1];
  s.out_height = window_positions(op, w, 0, s.height, false, "w_q");
  s.out_width = window_positions(op, w, 1, s.width, false, "w_q");
  return s;
}

void check_scales(const Call& c, const Conv2dInt8Shape& s) {
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

ConvEpilogue epilogue_of(const Call& c, const Conv2dInt8Shape& s) {
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

Conv2dInt8Weights pack(const Call& c, const Conv2dInt8Shape& s, const Conv2dInt8Kernel& kernel,
                       void* memory) {
  return conv2d_int8_pack(kernel, s, static_cast<const int8_t*>(c.w.data),
                          static_cast<const float*>(c.w_scale.data), numel(c.w_scale),
                          static_cast<const float*>(c.bias.data), static_cast<float>(c.x_scale),
                          static_cast<int32_t>(c.x_zero_point), c.x.dtype == DType::kInt8, memory);
}

Conv2dInt8Args args_of(const Call& c, const Conv2dInt8Shape& s, const Conv2dInt8Weights& weights,
                       void* scratch) {
  Conv2dInt8Args a;
  a.shape = s;
  a.weights = weights;
  a.epilogue = epilogue_of(c, s);
  a.epilogue.scale = weights.scale, a.epilogue.bias = weights.bias;
  a.epilogue.out = c.out.data;
  a.x = static_cast<const uint8_t*>(c.x.data);
  a.x_signed = c.x.dtype == DType::kInt8;
  a.x_zero_point = static_cast<int32_t>(c.x_zero_point);
  a.scratch = scratch;
  return a;
}

// Tensors kept alive for the length of a call, weights in the layout that kernels read.
struct Held {
  Tensor x, w, w_scale;
  std::optional<Tensor> bias, residual;
};

Call call_of(Held& h, double x_scale, int64_t x_zero_point, const std::vector<int64_t>& stride,
             const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
             int64_t groups, const std::string& activation, double residual_scale,
             int64_t residual_zero_point, const std::string& post_activation, double out_scale,
             int64_t out_zero_point) {
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

// After every check: images of other layouts are copied here.
void run(Call c, const Conv2dInt8Shape& s) {
  const Conv2dInt8Kernel& kernel = conv2d_int8_kernel();
  if (numel(c.out) == 0) return;
  const ReadableImage x(c.x), residual(c.residual);
  c.x = x.view(), c.residual = residual.view();
  const int64_t packed = conv2d_int8_packed_bytes(kernel, s);
  ThreadScratch memory(packed + conv2d_int8_scratch(kernel, s));
  const Conv2dInt8Weights weights = pack(c, s, kernel, memory.data());
  conv2d_int8_run(
      args_of(c, s, weights, static_cast<char*>(memory.data()) + (packed + 63) / 64 * 64));
}

Tensor conv2d_int8(const Tensor& x, double x_scale, int64_t x_zero_point, const Tensor& w,
                   const Tensor& w_scale, const std::optional<Tensor>& bias,
                   std::vector<int64_t> stride, std::vector<int64_t> padding,
                   std::vector<int64_t> dilation, int64_t groups, std::string activation,
                   const std::optional<Tensor>& residual, double residual_scale,
                   int64_t residual_zero_point, std::string post_activation, double out_scale,
                   int64_t out_zero_point, std::optional<ScalarType> out_dtype) {
  Held h{x, w, w_scale, bias, residual};
  Call c = call_of(h, x_scale, x_zero_point, stride, padding, dilation, groups, activation,
                   residual_scale, residual_zero_point, post_activation, out_scale, out_zero_point);
  c.out.dtype = out_dtype ? dtype_of(*out_dtype) : out_scale == 0 ? DType::kFloat32 : DType::kUInt8;
  const Conv2dInt8Shape s = shape_of(c);
  check_scales(c, s);
  epilogue_of(c, s);
  Tensor out =
      empty_channels_last({s.batch, s.out_channels, s.out_height, s.out_width}, c.out.dtype);
  c.out = view(out, op, "out");
  run(c, s);
  return out;
}

void check_out(const Call& c, const Conv2dInt8Shape& s) {
  const TensorView& o = c.out;
  NC_CHECK(o.rank == 4 && o.sizes[0] == s.batch && o.sizes[1] == s.out_channels &&
               o.sizes[2] == s.out_height && o.sizes[3] == s.out_width && is_channels_last(o),
           op, "out must be a channels-last tensor of shape [", s.batch, ", ", s.out_channels, ", ",
           s.out_height, ", ", s.out_width, "], got ", shape(o));
}

void conv2d_int8_out(const Tensor& x, double x_scale, int64_t x_zero_point, const Tensor& w,
                     const Tensor& w_scale, const std::optional<Tensor>& bias,
                     std::vector<int64_t> stride, std::vector<int64_t> padding,
                     std::vector<int64_t> dilation, int64_t groups, std::string activation,
                     const std::optional<Tensor>& residual, double residual_scale,
                     int64_t residual_zero_point, std::string post_activation, double out_scale,
                     int64_t out_zero_point, Tensor out) {
  Held h{x, w, w_scale, bias, residual};
  Call c = call_of(h, x_scale, x_zero_point, stride, padding, dilation, groups, activation,
                   residual_scale, residual_zero_point, post_activation, out_scale, out_zero_point);
  c.out = view(out, op, "out");
  const Conv2dInt8Shape s = shape_of(c);
  check_scales(c, s);
  check_out(c, s);
  for (const TensorView& input :
       {view(x, op, "x_q"), view(w, op, "w_q"), view(w_scale, op, "w_scale"),
        view(bias, op, "bias"), view(residual, op, "residual")})
    NC_CHECK(!may_overlap(c.out, input), op, "out must not overlap another argument");
  epilogue_of(c, s);
  run(c, s);
}

const RegisterStep conv2d_int8_step(
    "conv2d_int8", [](const StepSpec& spec, PackCache& cache) -> Step {
      Call c;
      c.x = spec.inputs[0], c.w = spec.inputs[1], c.w_scale = spec.inputs[2],
      c.bias = spec.inputs[3];
      c.residual = spec.inputs[4], c.out = spec.outputs[0];
      c.x_scale = spec.number("x_scale"), c.x_zero_point = spec.integer("x_zero_point");
      const auto pair = [&](const char* name, int64_t otherwise) {
        const std::vector<int64_t> given = spec.integers(name);
        return given.empty() ? std::vector<int64_t>{otherwise, otherwise} : given;
      };
      c.stride = pair("stride", 1), c.padding = pair("padding", 0),
      c.dilation = pair("dilation", 1);
      c.groups = spec.integer("groups", 1);
      c.activation = spec.text("activation"), c.post_activation = spec.text("post_activation");
      c.residual_scale = spec.number("residual_scale", 1.0);
      c.residual_zero_point = spec.integer("residual_zero_point");
      c.out_scale = spec.number("out_scale"), c.out_zero_point = spec.integer("out_zero_point");
      const Conv2dInt8Shape s = shape_of(c);
      check_scales(c, s);
      check_out(c, s);
      NC_CHECK(is_channels_last(c.x), op, "x_q must be channels-last in a step");
      NC_CHECK(!defined(c.residual) || is_channels_last(c.residual), op,
               "residual must be channels-last in a step");
      NC_CHECK(is_contiguous(c.w) && is_contiguous(c.w_scale) &&
                   (!defined(c.bias) || is_contiguous(c.bias)),
               op, "weights must be contiguous in a step");
      const Conv2dInt8Kernel& kernel = conv2d_int8_kernel();
      const auto make = [&] {
        std::shared_ptr<void> memory = aligned_buffer(conv2d_int8_packed_bytes(kernel, s));
        pack(c, s, kernel, memory.get());
        return memory;
      };
      bool constant =
          spec.constant[1] && spec.constant[2] && (!defined(c.bias) || spec.constant[3]);
      NC_CHECK(constant, op, "w_q, w_scale and bias must be constants in a step");
      std::ostringstream layout;
      layout << std::hexfloat << "conv2d_int8 " << &kernel << " " << c.x_scale << " "
             << c.x_zero_point << " " << static_cast<int>(c.x.dtype) << " " << s.groups << " "
             << c.bias.data;
      const std::shared_ptr<void> packed = cache.get(c.w.data, layout.str(), make);
      // Packing is deterministic: the same memory, described again without being written.
      const Conv2dInt8Weights weights = conv2d_int8_weights(kernel, s, packed.get());
      const std::shared_ptr<void> scratch = aligned_buffer(conv2d_int8_scratch(kernel, s));
      const Conv2dInt8Args args = args_of(c, s, weights, scratch.get());
      return [args, packed, scratch] { conv2d_int8_run(args); };
    });

}  // namespace
}  // namespace narrowcast

STABLE_TORCH_LIBRARY_IMPL(narrowcast, CPU, m) {
  m.impl("conv2d_int8", TORCH_BOX(&narrowcast::conv2d_int8));
  m.impl("conv2d_int8.out", TORCH_BOX(&narrowcast::conv2d_int8_out));
}
