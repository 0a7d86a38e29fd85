// linear_grouped on CUDA: where tensors stop. The private op that the dispatcher may choose, for
// activation_bits 16.
#include "common/stable_cuda.h"
#include "linear_grouped/linear_grouped_checks.h"
#include "linear_grouped/linear_grouped_cuda.h"

namespace narrowcast {
namespace {

using namespace linear_grouped_checks;

Tensor linear_grouped(const Tensor& x_in, const Tensor& packed_in, const Tensor& scale_in,
                      const std::optional<Tensor>& offset_in, int64_t group_size, int64_t bits,
                      const std::optional<Tensor>& bias_in, std::string activation,
                      const std::optional<Tensor>& residual_in, std::optional<ScalarType> out_dtype,
                      std::string post_activation) {
  const OnDeviceOf here(x_in, kOp, "x");
  const TensorView x_view = view(x_in, kOp, "x");
  const DType dtype = out_dtype ? dtype_of(*out_dtype) : x_view.dtype;
  const GroupedLayout layout =
      weight_layout(view(packed_in, kOp, "packed"), view(scale_in, kOp, "scale"),
                    view(offset_in, kOp, "offset"), group_size, bits, kOp);
  const Options options = {16, activation.c_str(), post_activation.c_str()};
  checked_args(layout, x_view, view(bias_in, kOp, "bias"), view(residual_in, kOp, "residual"),
               options, dtype);

  // Checked before anything is copied; the copies have the same shapes.
  const Tensor x = as_aligned(x_in), packed = as_aligned(packed_in),
               scale = narrowcast::as_contiguous(scale_in);
  const std::optional<Tensor> offset = as_contiguous(offset_in), bias = as_contiguous(bias_in),
                              residual = as_contiguous(residual_in);
  LinearGroupedArgs args = checked_args(layout, view(x, kOp, "x"), view(bias, kOp, "bias"),
                                        view(residual, kOp, "residual"), options, dtype);
  args.source = {static_cast<const uint8_t*>(view(packed, kOp, "packed").data),
                 view(scale, kOp, "scale").data, view(offset, kOp, "offset").data};
  Tensor out = empty(out_sizes(x_view, layout.n), dtype);
  args.epilogue.out = out.mutable_data_ptr();
  const int64_t count = linear_grouped_sm80_partials(args);
  Tensor partials = empty({count}, DType::kFloat32);
  linear_grouped_sm80(args, count ? static_cast<float*>(partials.mutable_data_ptr()) : nullptr,
                      here.stream());
  return out;
}

}  // namespace
}  // namespace narrowcast

STABLE_TORCH_LIBRARY_IMPL(narrowcast, CUDA, m) {
  m.impl("_linear_grouped_cuda", TORCH_BOX(&narrowcast::linear_grouped));
}
