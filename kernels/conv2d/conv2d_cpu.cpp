// Where tensors stop: argument checks, the torch op, the executor's step.
#include "common/image.h"
#include "common/rows.h"
#include "common/stable.h"
#include "common/step.h"
#include "conv2d/conv2d.h"

namespace narrowcast {
namespace {

constexpr const char* kOp = "conv2d";
using Numbers = std::vector<int64_t>;

struct Operands {
  TensorView x, weight, bias, residual;
  Numbers stride, padding, dilation;
  int64_t groups;
  std::string activation, post_activation;
};

// Everything but the pointers to x, weights, residual and out.
Conv2dArgs conv2d_args(const Operands& o) {
  NC_CHECK(is_floating(o.x.dtype), kOp, "x must be float32, float16 or bfloat16 [N, C, H, W], got ",
           name(o.x.dtype), " ", shape(o.x));
  check_image(kOp, "x", o.x);
  const TensorView& w = o.weight;
  const int64_t channels = o.x.sizes[1];
  NC_CHECK(o.groups >= 1 && channels % o.groups == 0, kOp, "groups must divide C = ", channels,
           ", got ", o.groups);
  NC_CHECK(w.dtype == o.x.dtype && w.rank == 4 && w.sizes[1] == channels / o.groups &&
               w.sizes[2] >= 1 && w.sizes[3] >= 1 && w.sizes[0] % o.groups == 0 &&
               numel(w) <= int64_t{1} << 40 && w.sizes[0] <= int64_t{1} << 40,
           kOp, "weight must be ", name(o.x.dtype),
           " [O, C / groups, height, width] with C / groups = ", channels / o.groups,
           " and O a multiple of groups, got ", name(w.dtype), " ", shape(w));
  Conv2dArgs a;
  a.dtype = o.x.dtype, a.groups = o.groups;
  a.images = o.x.sizes[0], a.channels = channels, a.height = o.x.sizes[2], a.width = o.x.sizes[3];
  a.out_channels = w.sizes[0];
  a.window = make_window(kOp, {w.sizes[2], w.sizes[3]}, o.stride, o.padding, o.dilation, true);
  a.out_height = window_positions(kOp, a.window, 0, a.height, false, "weight");
  a.out_width = window_positions(kOp, a.window, 1, a.width, false, "weight");

  Epilogue& e = a.epilogue;
  e.activation = parse_activation(o.activation.c_str(), kOp, "activation");
  e.post_activation = parse_activation(o.post_activation.c_str(), kOp, "post_activation");
  e.ld_out = e.ld_residual = a.out_channels, e.out_dtype = a.dtype;
  if (defined(o.bias)) {
    NC_CHECK(is_floating(o.bias.dtype) && o.bias.rank == 1 && o.bias.sizes[0] == a.out_channels,
             kOp, "bias must be float32, float16 or bfloat16 [O] = [", a.out_channels, "], got ",
             name(o.bias.dtype), " ", shape(o.bias));
    e.bias = o.bias.data, e.bias_dtype = o.bias.dtype;
  }
  const TensorView& r = o.residual;
  NC_CHECK(!defined(r) || (is_floating(r.dtype) && r.rank == 4 && r.sizes[0] == a.images &&
                           r.sizes[1] == a.out_channels && r.sizes[2] == a.out_height &&
                           r.sizes[3] == a.out_width),
           kOp, "residual must be float32, float16 or bfloat16 of the output's shape [", a.images,
           ", ", a.out_channels, ", ", a.out_height, ", ", a.out_width, "], got ", name(r.dtype),
           " ", shape(r));
  if (defined(r)) e.residual_dtype = r.dtype;
  a.linear = &linear_kernel();
  return a;
}

Conv2dWeight weight_of(const TensorView& w) {
  return {w.data, {w.strides[0], w.strides[1], w.strides[2], w.strides[3]}};
}

Tensor conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
              Numbers stride, Numbers padding, Numbers dilation, int64_t groups,
              std::string activation, const std::optional<Tensor>& residual,
              std::string post_activation) {
  TensorView b = view(bias, kOp, "bias");
  std::optional<Tensor> kept;
  if (b.rank == 1 && !is_contiguous(b)) kept = as_contiguous(*bias), b = view(kept, kOp, "bias");
  const Operands o{view(x, kOp, "x"),
                   view(weight, kOp, "weight"),
                   b,
                   view(residual, kOp, "residual"),
                   stride,
                   padding,
                   dilation,
                   groups,
                   activation,
                   post_activation};
  Conv2dArgs a = conv2d_args(o);
  Tensor out = empty_channels_last({a.images, a.out_channels, a.out_height, a.out_width}, a.dtype);
  if (out.numel() == 0) return out;
  const ReadableImage image(o.x), added(o.residual);
  const ThreadScratch packed(conv2d_packed_bytes(a)), scratch(conv2d_scratch(a));
  conv2d_pack(a, weight_of(o.weight), packed.data());
  a.x = image.view().data, a.packed = packed.data(), a.scratch = scratch.data();
  a.epilogue.residual = added.view().data, a.epilogue.out = out.mutable_data_ptr();
  conv2d_run(a);
  return out;
}

const RegisterStep conv2d_step("conv2d", [](const StepSpec& s, PackCache& cache) -> Step {
  const TensorView& out = s.outputs[0];
  const Operands o{s.inputs[0],
                   s.inputs[1],
                   s.inputs[2],
                   s.inputs[3],
                   s.integers("stride"),
                   s.integers("padding"),
                   s.integers("dilation"),
                   s.integer("groups", 1),
                   s.text("activation"),
                   s.text("post_activation")};
  Conv2dArgs a = conv2d_args(o);
  NC_CHECK(!defined(o.bias) || is_contiguous(o.bias), kOp, "bias must be contiguous in a plan");
  NC_CHECK(out.rank == 4 && is_channels_last(out) && out.dtype == a.dtype &&
               out.sizes[0] == a.images && out.sizes[1] == a.out_channels &&
               out.sizes[2] == a.out_height && out.sizes[3] == a.out_width,
           kOp, "out must be channels-last ", name(a.dtype), " [", a.images, ", ", a.out_channels,
           ", ", a.out_height, ", ", a.out_width, "] in a plan, got ", name(out.dtype), " ",
           shape(out));
  const Conv2dWeight weight = weight_of(o.weight);
  const auto make = [&] {
    auto made = aligned_buffer(conv2d_packed_bytes(a));
    if (numel(o.weight)) conv2d_pack(a, weight, made.get());
    return made;
  };
  std::shared_ptr<void> packed;
  if (s.constant[1]) {
    std::string layout = std::string("conv2d/") + conv2d_layout(a) + "/" +
                         std::to_string(a.groups) + "/" + shape(o.weight);
    for (const int64_t stride : weight.strides) layout += "," + std::to_string(stride);
    packed = cache.get(weight.data, layout, make);
  } else {
    packed = make();
  }
  const auto scratch = aligned_buffer(conv2d_scratch(a));
  const StepImage image(o.x), added(o.residual);
  a.x = image.view().data, a.packed = packed.get(), a.scratch = scratch.get();
  a.epilogue.residual = added.view().data, a.epilogue.out = out.data;
  const bool repack = !s.constant[1] && numel(o.weight);
  return [a, packed, scratch, image, added, weight, repack] {
    image.refresh();
    added.refresh();
    if (repack) conv2d_pack(a, weight, packed.get());
    conv2d_run(a);
  };
});

}  // namespace
}  // namespace narrowcast

STABLE_TORCH_LIBRARY_IMPL(narrowcast, CPU, m) { m.impl("conv2d", TORCH_BOX(&narrowcast::conv2d)); }
