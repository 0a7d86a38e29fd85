// Where tensors stop for dequantize_gguf and dequantize_int8: checks, the torch ops, the executor's
// steps.
#include "common/dense.h"
#include "common/stable.h"
#include "common/step.h"
#include "dequantize/dequantize_gguf.h"

namespace narrowcast {
namespace {

GgufType parse_type(const std::string& type) {
  for (int i = 0; i < static_cast<int>(std::size(kGgufLayouts)); ++i)
    if (type == kGgufLayouts[i].name) return static_cast<GgufType>(i);
  fail("dequantize_gguf",
       "type must be F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K or Q6_K, got '", type,
       "'");
}

DequantizeGgufArgs gguf_args(const TensorView& blocks, const std::string& type, DType out_dtype) {
  constexpr const char* op = "dequantize_gguf";
  const GgufType t = parse_type(type);
  const GgufLayout layout = kGgufLayouts[static_cast<int>(t)];
  NC_CHECK(blocks.dtype == DType::kUInt8 && blocks.rank >= 1, op,
           "blocks must be uint8 [..., bytes], got ", name(blocks.dtype), " ", shape(blocks));
  NC_CHECK(size(blocks, -1) % layout.bytes == 0, op, "blocks must have a multiple of ",
           layout.bytes, " bytes per row for type ", type, ", got ", size(blocks, -1));
  NC_CHECK(is_floating(out_dtype), op, "out_dtype must be float32, float16 or bfloat16, got ",
           name(out_dtype));
  return {static_cast<const uint8_t*>(blocks.data), nullptr, numel(blocks) / layout.bytes, t,
          out_dtype};
}

Tensor dequantize_gguf(const Tensor& blocks_in, const std::string& type, ScalarType out_dtype) {
  constexpr const char* op = "dequantize_gguf";
  gguf_args(view(blocks_in, op, "blocks"), type,
            dtype_of(out_dtype));  // before as_contiguous() copies
  const Tensor blocks = as_contiguous(blocks_in);
  const TensorView b = view(blocks, op, "blocks");
  DequantizeGgufArgs args = gguf_args(b, type, dtype_of(out_dtype));
  const GgufLayout layout = kGgufLayouts[static_cast<int>(args.type)];
  std::vector<int64_t> sizes(b.sizes, b.sizes + b.rank);
  sizes.back() = sizes.back() / layout.bytes * layout.elements;
  Tensor out = empty(sizes, args.out_dtype);
  args.out = out.mutable_data_ptr();
  dequantize_gguf_run(args);
  return out;
}

DequantizeInt8Args int8_args(const TensorView& q, const TensorView& scale,
                             const TensorView& zero_point, int64_t group_size, DType out_dtype) {
  constexpr const char* op = "dequantize_int8";
  NC_CHECK((q.dtype == DType::kInt8 || q.dtype == DType::kUInt8) && q.rank >= 1, op,
           "q must be int8 or uint8 [..., K], got ", name(q.dtype), " ", shape(q));
  const int64_t columns = size(q, -1), rows = columns ? numel(q) / columns : 0;
  NC_CHECK(group_size == 0 || (group_size > 0 && columns % group_size == 0), op,
           "group_size must be 0 (one scale per row) or divide K = ", columns, ", got ",
           group_size);
  const bool grouped = group_size > 0, per_tensor = scale.rank == 0;
  bool matches = scale.rank == q.rank - (grouped ? 0 : 1);
  for (int d = 0; matches && d < q.rank - 1; ++d) matches = scale.sizes[d] == q.sizes[d];
  if (matches && grouped) matches = size(scale, -1) == columns / group_size;
  NC_CHECK(scale.dtype == DType::kFloat32 && (matches || (per_tensor && !grouped)), op,
           "scale must be float32 of the shape of q without its last size, with K / group_size in "
           "its place "
           "(group_size > 0), or a scalar, got ",
           name(scale.dtype), " ", shape(scale), " for q ", shape(q));
  if (defined(zero_point)) {
    bool same = zero_point.dtype == DType::kInt32 && zero_point.rank == scale.rank;
    for (int d = 0; same && d < scale.rank; ++d) same = zero_point.sizes[d] == scale.sizes[d];
    NC_CHECK(same, op, "zero_point must be int32 of the shape of scale, ", shape(scale), ", got ",
             name(zero_point.dtype), " ", shape(zero_point));
  }
  NC_CHECK(is_floating(out_dtype), op, "out_dtype must be float32, float16 or bfloat16, got ",
           name(out_dtype));
  DequantizeInt8Args a = {};
  a.q = q.data;
  a.scale = static_cast<const float*>(scale.data);
  a.zero_point = static_cast<const int32_t*>(zero_point.data);
  a.rows = rows;
  a.columns = columns;
  a.group = grouped ? group_size : columns;
  a.scale_stride = per_tensor ? 0 : grouped ? columns / group_size : 1;
  a.is_unsigned = q.dtype == DType::kUInt8;
  a.out_dtype = out_dtype;
  return a;
}

Tensor dequantize_int8(const Tensor& q_in, const Tensor& scale_in,
                       const std::optional<Tensor>& zero_point_in, int64_t group_size,
                       ScalarType out_dtype) {
  constexpr const char* op = "dequantize_int8";
  const auto checked = [&](const Tensor& q, const Tensor& scale,
                           const std::optional<Tensor>& zero_point) {
    return int8_args(view(q, op, "q"), view(scale, op, "scale"), view(zero_point, op, "zero_point"),
                     group_size, dtype_of(out_dtype));
  };
  checked(q_in, scale_in, zero_point_in);  // before as_contiguous() copies
  const bool by_value = scale_in.dim() == 0 && is_dense(view(q_in, op, "q"));
  const Tensor q = by_value ? q_in : as_contiguous(q_in), scale = as_contiguous(scale_in);
  const std::optional<Tensor> zero_point =
      zero_point_in ? std::optional(as_contiguous(*zero_point_in)) : std::nullopt;
  DequantizeInt8Args args = checked(q, scale, zero_point);
  const TensorView v = view(q, op, "q");
  const std::vector<int64_t> sizes(v.sizes, v.sizes + v.rank);
  const std::vector<int64_t> strides(v.strides, v.strides + v.rank);
  Tensor out =
      by_value ? empty_strided(sizes, strides, args.out_dtype) : empty(sizes, args.out_dtype);
  args.out = out.mutable_data_ptr();
  dequantize_int8_run(args);
  return out;
}

void check_step_out(const TensorView& out, int64_t elements, const char* op) {
  NC_CHECK(numel(out) == elements, op, "out must have ", elements, " elements, got ", numel(out));
  NC_CHECK(is_contiguous(out), op, "out must be contiguous in a plan");
}

Step gguf_step(const StepSpec& s, PackCache&) {
  DequantizeGgufArgs args = gguf_args(s.inputs[0], s.text("type", ""), s.outputs[0].dtype);
  NC_CHECK(is_contiguous(s.inputs[0]), "dequantize_gguf", "blocks must be contiguous in a plan");
  check_step_out(s.outputs[0], args.count * kGgufLayouts[static_cast<int>(args.type)].elements,
                 "dequantize_gguf");
  args.out = s.outputs[0].data;
  return [args] { dequantize_gguf_run(args); };
}

Step int8_step(const StepSpec& s, PackCache&) {
  DequantizeInt8Args args =
      int8_args(s.inputs[0], s.inputs[1], s.inputs[2], s.integer("group_size"), s.outputs[0].dtype);
  if (s.inputs[1].rank == 0) {
    NC_CHECK(same_dense_layout(s.inputs[0], s.outputs[0]), "dequantize_int8",
             "q must be dense and laid out like the output");
  } else {
    for (const TensorView& input : s.inputs)
      NC_CHECK(!defined(input) || is_contiguous(input), "dequantize_int8",
               "inputs must be contiguous in a plan");
    check_step_out(s.outputs[0], numel(s.inputs[0]), "dequantize_int8");
  }
  args.out = s.outputs[0].data;
  return [args] { dequantize_int8_run(args); };
}

const RegisterStep dequantize_gguf_step("dequantize_gguf", gguf_step);
const RegisterStep dequantize_int8_step("dequantize_int8", int8_step);

}  // namespace
}  // namespace narrowcast

STABLE_TORCH_LIBRARY_IMPL(narrowcast, CPU, m) {
  m.impl("dequantize_gguf", TORCH_BOX(&narrowcast::dequantize_gguf));
  m.impl("dequantize_int8", TORCH_BOX(&narrowcast::dequantize_int8));
}
