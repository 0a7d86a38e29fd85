// Where tensors stop: argument checks, the torch op, the executor's step.
#include "common/rows.h"
#include "common/stable.h"
#include "common/step.h"
#include "rope/rope.h"

namespace narrowcast {
namespace {

constexpr const char* kOp = "rope";

RopeArgs rope_args(const TensorView& x, const TensorView& cos, const TensorView& sin,
                   const TensorView& positions, bool interleaved) {
  NC_CHECK(is_floating(x.dtype) && x.rank == 4, kOp,
           "x must be float32, float16 or bfloat16 [B, H, S, D], got ", name(x.dtype), " ",
           shape(x));
  NC_CHECK(is_floating(cos.dtype) && cos.rank == 2 && 2 * cos.sizes[1] <= x.sizes[3], kOp,
           "cos must be float32, float16 or bfloat16 [positions, R / 2] with R <= D = ", x.sizes[3],
           ", got ", name(cos.dtype), " ", shape(cos));
  NC_CHECK(sin.dtype == cos.dtype && sin.rank == 2 && sin.sizes[0] == cos.sizes[0] &&
               sin.sizes[1] == cos.sizes[1],
           kOp, "sin must have the dtype and shape of cos, ", name(cos.dtype), " ", shape(cos),
           ", got ", name(sin.dtype), " ", shape(sin));
  RopeArgs a{};
  if (defined(positions)) {
    const TensorView& p = positions;
    NC_CHECK((p.dtype == DType::kInt32 || p.dtype == DType::kInt64) &&
                 (p.rank == 1 || (p.rank == 2 && p.sizes[1] == x.sizes[2])) &&
                 p.sizes[0] == x.sizes[0],
             kOp, "positions must be int32 or int64 [B] or [B, S] with B = ", x.sizes[0],
             ", S = ", x.sizes[2], ", got ", name(p.dtype), " ", shape(p));
    a.positions = p.data, a.positions_dtype = p.dtype;
    a.explicit_positions = p.rank == 2;
    a.positions_batch = p.strides[0], a.positions_length = p.strides[1];
  }
  a.x = x.data, a.dtype = x.dtype;
  a.batch = x.sizes[0], a.heads = x.sizes[1], a.length = x.sizes[2], a.depth = x.sizes[3];
  a.stride_batch = x.strides[0], a.stride_head = x.strides[1], a.stride_length = x.strides[2];
  a.cos = cos.data, a.sin = sin.data, a.table_dtype = cos.dtype;
  a.table_rows = cos.sizes[0], a.half = cos.sizes[1];
  a.interleaved = interleaved;
  return a;
}

Tensor rope(const Tensor& x_in, const Tensor& cos_in, const Tensor& sin_in,
            const std::optional<Tensor>& positions, bool interleaved) {
  view(cos_in, kOp, "cos"), view(sin_in, kOp, "sin");  // before as_contiguous() copies
  const Tensor x = has_dense_rows(view(x_in, kOp, "x")) ? x_in : as_contiguous(x_in);
  const Tensor cos = as_contiguous(cos_in), sin = as_contiguous(sin_in);
  const TensorView v = view(x, kOp, "x");
  RopeArgs a = rope_args(v, view(cos, kOp, "cos"), view(sin, kOp, "sin"),
                         view(positions, kOp, "positions"), interleaved);
  Tensor out = empty(std::vector<int64_t>(v.sizes, v.sizes + v.rank), v.dtype);
  a.out = out.mutable_data_ptr();
  rope_run(a);
  return out;
}

const RegisterStep rope_step("rope", [](const StepSpec& s, PackCache&) -> Step {
  const TensorView &x = s.inputs[0], &cos = s.inputs[1], &sin = s.inputs[2];
  NC_CHECK(has_dense_rows(x) && is_contiguous(cos) && is_contiguous(sin), kOp,
           "x must have adjacent elements, cos and sin must be contiguous in a plan");
  RopeArgs a = rope_args(x, cos, sin, s.inputs[3], s.flag("interleaved"));
  a.out = s.outputs[0].data;
  return [a] { rope_run(a); };
});

}  // namespace
}  // namespace narrowcast

STABLE_TORCH_LIBRARY_IMPL(narrowcast, CPU, m) { m.impl("rope", TORCH_BOX(&narrowcast::rope)); }
