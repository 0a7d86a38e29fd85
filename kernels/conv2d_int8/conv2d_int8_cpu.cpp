// Where tensors stop: argument checks, the torch ops, the executor's step.
#include "common/image.h"
#include "common/rows.h"
#include "common/scratch.h"
#include "common/step.h"
#include "conv2d_int8/conv2d_int8_checks.h"

namespace narrowcast {
namespace {

using namespace conv2d_int8_checks;

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
