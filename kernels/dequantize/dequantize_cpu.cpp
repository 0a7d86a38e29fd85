// Where tensors stop: argument checks, the torch op, the executor's step.
#include "common/stable.h"
#include "common/step.h"
#include "dequantize/dequantize.h"

namespace narrowcast {
namespace {

DequantizeGroupsArgs groups_args(const TensorView& packed, const TensorView& scale,
                                 const TensorView& offset, int64_t group_size, int64_t bits,
                                 const TensorView& out) {
  constexpr const char* op = "dequantize_groups";
  NC_CHECK(bits == 4 || bits == 8, op, "bits must be 4 or 8, got ", bits);
  NC_CHECK(packed.rank == 2 && (packed.dtype == DType::kUInt8 || packed.dtype == DType::kInt8), op,
           "packed must be uint8 or int8 [N, K * bits / 8], got ", name(packed.dtype), " ",
           shape(packed));
  const int64_t rows = packed.sizes[0], columns = packed.sizes[1] * 8 / bits;
  NC_CHECK(group_size > 0 && columns % group_size == 0 && (bits == 8 || group_size % 2 == 0), op,
           "group_size must be positive, even for bits 4, and divide K = ", columns, ", got ",
           group_size);
  NC_CHECK(scale.dtype == DType::kFloat32 || scale.dtype == DType::kFloat16, op,
           "scale must be float32 or float16, got ", name(scale.dtype));
  NC_CHECK(scale.rank == 2 && scale.sizes[0] == rows && scale.sizes[1] == columns / group_size, op,
           "scale must be [N, K / group_size] = [", rows, ", ", columns / group_size, "], got ",
           shape(scale));
  NC_CHECK(!defined(offset) || (offset.dtype == scale.dtype && offset.rank == 2 &&
                                offset.sizes[0] == rows && offset.sizes[1] == scale.sizes[1]),
           op, "offset must have the shape and dtype of scale, ", name(scale.dtype), " ",
           shape(scale), ", got ", name(offset.dtype), " ", shape(offset));
  NC_CHECK(is_floating(out.dtype), op, "out_dtype must be float32, float16 or bfloat16, got ",
           name(out.dtype));
  return {static_cast<const uint8_t*>(packed.data),
          scale.data,
          offset.data,
          out.data,
          rows,
          columns,
          group_size,
          static_cast<int>(bits),
          scale.dtype,
          out.dtype};
}

Tensor dequantize_groups(const Tensor& packed_in, const Tensor& scale_in,
                         const std::optional<Tensor>& offset_in, int64_t group_size, int64_t bits,
                         ScalarType out_dtype) {
  constexpr const char* op = "dequantize_groups";
  view(packed_in, op, "packed");  // refuses another device before as_contiguous() copies
  const Tensor packed = as_contiguous(packed_in), scale = as_contiguous(scale_in);
  const std::optional<Tensor> offset =
      offset_in ? std::optional(as_contiguous(*offset_in)) : std::nullopt;
  TensorView out_view;
  out_view.dtype = dtype_of(out_dtype);
  DequantizeGroupsArgs args = groups_args(view(packed, op, "packed"), view(scale, op, "scale"),
                                          view(offset, op, "offset"), group_size, bits, out_view);
  Tensor out = empty({args.rows, args.columns}, out_view.dtype);
  args.out = out.mutable_data_ptr();
  dequantize_groups_run(args);
  return out;
}

const RegisterStep dequantize_groups_step("dequantize_groups",
                                          [](const StepSpec& s, PackCache&) -> Step {
                                            const auto args =
                                                groups_args(s.inputs[0], s.inputs[1], s.inputs[2],
                                                            s.integer("group_size"),
                                                            s.integer("bits"), s.outputs[0]);
                                            return [args] { dequantize_groups_run(args); };
                                          });

}  // namespace
}  // namespace narrowcast

STABLE_TORCH_LIBRARY_IMPL(narrowcast, CPU, m) {
  m.impl("dequantize_groups", TORCH_BOX(&narrowcast::dequantize_groups));
}
