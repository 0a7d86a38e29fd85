// Where tensors stop: argument checks, the torch ops, the executor's step.
#include "common/scratch.h"
#include "common/step.h"
#include "linear_grouped/linear_grouped_checks.h"

namespace narrowcast {
namespace {

using namespace linear_grouped_checks;

void run_with_scratch(const LinearGroupedArgs& args) {
  const ThreadScratch scratch(linear_grouped_scratch(args));
  linear_grouped_run(args, scratch.data());
}

void check_out(const TensorView& out, const std::vector<int64_t>& sizes,
               std::initializer_list<std::pair<const char*, TensorView>> inputs) {
  bool same = out.rank == static_cast<int>(sizes.size());
  for (int d = 0; same && d < out.rank; ++d) same = out.sizes[d] == sizes[d];
  TensorView expected;
  expected.rank = static_cast<int>(sizes.size());
  std::copy(sizes.begin(), sizes.end(), expected.sizes);
  NC_CHECK(same, kOp, "out must be ", shape(expected), ", got ", shape(out));
  NC_CHECK(is_contiguous(out), kOp, "out must be contiguous");
  for (const auto& [argument, input] : inputs)
    NC_CHECK(!may_overlap(out, input), kOp, "out must not share memory with ", argument);
}

// Shared by the two forms of the op; `out` is given or made.
Tensor linear(const Tensor& x_in, const Tensor& packed_in, const Tensor& scale_in,
              const std::optional<Tensor>& offset_in, int64_t group_size, int64_t bits,
              const std::optional<Tensor>& bias_in, const std::optional<Tensor>& residual_in,
              const Options& options, std::optional<ScalarType> out_dtype,
              const std::optional<Tensor>& out_in) {
  const TensorView x_view = view(x_in, kOp, "x"), out_view = view(out_in, kOp, "out");
  NC_CHECK(!defined(out_view) || is_floating(out_view.dtype), kOp,
           "out must be float32, float16 or bfloat16, got ", name(out_view.dtype));
  const DType dtype = defined(out_view) ? out_view.dtype
                      : out_dtype       ? dtype_of(*out_dtype)
                                        : x_view.dtype;
  const TensorView packed_view = view(packed_in, kOp, "packed"),
                   scale_view = view(scale_in, kOp, "scale"),
                   offset_view = view(offset_in, kOp, "offset"),
                   bias_view = view(bias_in, kOp, "bias"),
                   residual_view = view(residual_in, kOp, "residual");
  const GroupedLayout layout =
      weight_layout(packed_view, scale_view, offset_view, group_size, bits, kOp);
  checked_args(layout, x_view, bias_view, residual_view, options, dtype);
  const std::vector<int64_t> sizes = out_sizes(x_view, layout.n);
  if (defined(out_view))
    check_out(out_view, sizes,
              {{"x", x_view},
               {"packed", packed_view},
               {"scale", scale_view},
               {"offset", offset_view},
               {"bias", bias_view},
               {"residual", residual_view}});

  // Checked before anything is copied; the copies have the same shapes.
  const Tensor x = narrowcast::as_contiguous(x_in), packed = narrowcast::as_contiguous(packed_in),
               scale = narrowcast::as_contiguous(scale_in);
  const std::optional<Tensor> offset = as_contiguous(offset_in), bias = as_contiguous(bias_in),
                              residual = as_contiguous(residual_in);
  LinearGroupedArgs args = checked_args(layout, view(x, kOp, "x"), view(bias, kOp, "bias"),
                                        view(residual, kOp, "residual"), options, dtype);
  args.source = {static_cast<const uint8_t*>(view(packed, kOp, "packed").data),
                 view(scale, kOp, "scale").data, view(offset, kOp, "offset").data};
  Tensor out = out_in ? *out_in : empty(sizes, dtype);
  args.epilogue.out = out.mutable_data_ptr();
  run_with_scratch(args);
  return out;
}

Tensor linear_grouped(const Tensor& x, const Tensor& packed, const Tensor& scale,
                      const std::optional<Tensor>& offset, int64_t group_size, int64_t bits,
                      const std::optional<Tensor>& bias, const std::string& activation,
                      const std::optional<Tensor>& residual, std::optional<ScalarType> out_dtype,
                      int64_t activation_bits, const std::string& post_activation) {
  return linear(x, packed, scale, offset, group_size, bits, bias, residual,
                {activation_bits, activation.c_str(), post_activation.c_str()}, out_dtype,
                std::nullopt);
}

void linear_grouped_out(const Tensor& x, const Tensor& packed, const Tensor& scale,
                        const std::optional<Tensor>& offset, int64_t group_size, int64_t bits,
                        const std::optional<Tensor>& bias, const std::string& activation,
                        const std::optional<Tensor>& residual, int64_t activation_bits,
                        const std::string& post_activation, Tensor out) {
  linear(x, packed, scale, offset, group_size, bits, bias, residual,
         {activation_bits, activation.c_str(), post_activation.c_str()}, std::nullopt, out);
}

Tensor linear_grouped_pack(const Tensor& packed_in, const Tensor& scale_in,
                           const std::optional<Tensor>& offset_in, int64_t group_size,
                           int64_t bits) {
  constexpr const char* op = "_linear_grouped_pack";
  const GroupedLayout layout =
      weight_layout(view(packed_in, op, "packed"), view(scale_in, op, "scale"),
                    view(offset_in, op, "offset"), group_size, bits, op);
  const Tensor packed = narrowcast::as_contiguous(packed_in),
               scale = narrowcast::as_contiguous(scale_in);
  const std::optional<Tensor> offset = as_contiguous(offset_in);
  Tensor out = empty({grouped_packed_bytes(layout)}, DType::kUInt8);
  grouped_pack_all(layout,
                   {static_cast<const uint8_t*>(view(packed, op, "packed").data),
                    view(scale, op, "scale").data, view(offset, op, "offset").data},
                   static_cast<uint8_t*>(out.mutable_data_ptr()));
  return out;
}

Tensor linear_grouped_packed(const Tensor& x_in, const Tensor& panels, int64_t n,
                             int64_t group_size, int64_t bits, bool half, bool has_offset,
                             const std::optional<Tensor>& bias_in, const std::string& activation,
                             const std::optional<Tensor>& residual_in,
                             std::optional<ScalarType> out_dtype, int64_t activation_bits,
                             const std::string& post_activation) {
  const TensorView x_view = view(x_in, kOp, "x"), panels_view = view(panels, kOp, "panels");
  NC_CHECK(x_view.rank >= 1, kOp, "x must be [..., K], got ", shape(x_view));
  const int64_t k = size(x_view, -1);
  NC_CHECK(bits == 4 || bits == 8, kOp, "bits must be 4 or 8, got ", bits);
  NC_CHECK(n >= 0 && n <= int64_t{1} << 40, kOp, "n must be 0 or more, got ", n);
  NC_CHECK(group_size > 0 && group_size % 32 == 0 && k % group_size == 0, kOp,
           "group_size must be a multiple of 32 that divides K = ", k, ", got ", group_size);
  NC_CHECK(k <= int64_t{1} << 20, kOp, "x must have K <= 1048576, got ", k);
  const GroupedLayout layout =
      grouped_layout(n, k, group_size, static_cast<int>(bits), half, has_offset);
  NC_CHECK(panels_view.dtype == DType::kUInt8 && panels_view.rank == 1 &&
               is_contiguous(panels_view) && panels_view.sizes[0] == grouped_packed_bytes(layout),
           kOp, "panels must be contiguous uint8 [", grouped_packed_bytes(layout), "], got ",
           name(panels_view.dtype), " ", shape(panels_view));
  const Options options = {activation_bits, activation.c_str(), post_activation.c_str()};
  const DType dtype = out_dtype ? dtype_of(*out_dtype) : x_view.dtype;
  checked_args(layout, x_view, view(bias_in, kOp, "bias"), view(residual_in, kOp, "residual"),
               options, dtype);
  const Tensor x = narrowcast::as_contiguous(x_in);
  const std::optional<Tensor> bias = as_contiguous(bias_in), residual = as_contiguous(residual_in);
  LinearGroupedArgs args = checked_args(layout, view(x, kOp, "x"), view(bias, kOp, "bias"),
                                        view(residual, kOp, "residual"), options, dtype);
  args.panels = static_cast<const uint8_t*>(panels_view.data);
  Tensor out = empty(out_sizes(x_view, n), dtype);
  args.epilogue.out = out.mutable_data_ptr();
  run_with_scratch(args);
  return out;
}

Step make_step(const StepSpec& s, PackCache& cache) {
  for (const TensorView& input : s.inputs)
    NC_CHECK(!defined(input) || is_contiguous(input), kOp, "inputs must be contiguous in a plan");
  const TensorView &x = s.inputs[0], &packed = s.inputs[1], &scale = s.inputs[2],
                   &offset = s.inputs[3];
  const GroupedLayout layout =
      weight_layout(packed, scale, offset, s.integer("group_size"), s.integer("bits"), kOp);
  const std::string activation = s.text("activation"), post_activation = s.text("post_activation");
  LinearGroupedArgs args =
      checked_args(layout, x, s.inputs[4], s.inputs[5],
                   {s.integer("activation_bits", 16), activation.c_str(), post_activation.c_str()},
                   s.outputs[0].dtype);
  check_out(s.outputs[0], out_sizes(x, layout.n), {});
  const GroupedSource source = {static_cast<const uint8_t*>(packed.data), scale.data, offset.data};
  const auto buffer = [&] { return aligned_buffer(grouped_packed_bytes(layout)); };
  const bool constant = s.constant[1] && s.constant[2] && (!defined(offset) || s.constant[3]);
  std::ostringstream key;
  key << kOp << ' ' << layout.n << ' ' << layout.k << ' ' << layout.group << ' ' << layout.bits
      << ' ' << layout.half << ' ' << scale.data << ' ' << offset.data;
  const std::shared_ptr<void> panels =
      constant ? cache.get(packed.data, key.str(),
                           [&] {
                             const std::shared_ptr<void> made = buffer();
                             grouped_pack_all(layout, source, static_cast<uint8_t*>(made.get()));
                             return made;
                           })
               : buffer();
  args.panels = static_cast<uint8_t*>(panels.get());
  args.epilogue.out = s.outputs[0].data;
  const std::shared_ptr<void> scratch = aligned_buffer(linear_grouped_scratch(args));
  return [args, source, constant, panels, scratch] {
    if (!constant) grouped_pack_all(args.layout, source, static_cast<uint8_t*>(panels.get()));
    linear_grouped_run(args, scratch.get());
  };
}

const RegisterStep linear_grouped_step("linear_grouped", make_step);

}  // namespace
}  // namespace narrowcast

STABLE_TORCH_LIBRARY_IMPL(narrowcast, CPU, m) {
  m.impl("linear_grouped", TORCH_BOX(&narrowcast::linear_grouped));
  m.impl("linear_grouped.out", TORCH_BOX(&narrowcast::linear_grouped_out));
  m.impl("_linear_grouped_pack", TORCH_BOX(&narrowcast::linear_grouped_pack));
  m.impl("_linear_grouped_packed", TORCH_BOX(&narrowcast::linear_grouped_packed));
}
