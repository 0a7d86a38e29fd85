// Where tensors stop: argument checks, the torch ops, the executor's steps.
#include "common/packed_header.h"
#include "common/scratch.h"
#include "common/step.h"
#include "linear_int8/linear_int8_checks.h"

namespace narrowcast {
namespace {

using namespace linear_int8_checks;

LinearDynamicInt8Args dynamic_args(const Operands& o, bool asymmetric, bool strict) {
  constexpr const char* op = "linear_dynamic_int8";
  NC_CHECK(is_floating(o.x.dtype), op, "x must be float32, float16 or bfloat16, got ",
           name(o.x.dtype));
  NC_CHECK(!asymmetric || o.group_size == 0, op, "asymmetric must be False when group_size is set");
  LinearDynamicInt8Args d;
  d.linear = common_args(op, o);
  d.x = o.x.data, d.x_dtype = o.x.dtype, d.ldx = d.linear.ldx;
  d.asymmetric = asymmetric, d.strict = strict;
  return d;
}

void run(LinearInt8Args a) {
  const ThreadScratch scratch(linear_int8_scratch(a.rows, a.depth, a.group));
  a.scratch = scratch.data();
  linear_int8_run(a);
}

void run(LinearDynamicInt8Args d) {
  const ThreadScratch scratch(
      linear_dynamic_int8_scratch(d.linear.rows, d.linear.depth, d.linear.group));
  d.linear.scratch = scratch.data();
  linear_dynamic_int8_run(d);
}

Tensor linear_int8(const Tensor& x, const Tensor& x_scale, const Tensor& w, const Tensor& w_scale,
                   const MaybeTensor& bias, std::string activation, const MaybeTensor& residual,
                   std::optional<ScalarType> out_dtype, const MaybeTensor& zero, int64_t group_size,
                   std::string post_activation) {
  constexpr const char* op = "linear_int8";
  Call c(op, "x_q", x, w, w_scale, bias, activation, residual, group_size, post_activation);
  const TensorView xs = c.packed(x_scale, op, "x_scale"), zp = c.packed(zero, op, "x_zero_point");
  c.o.out.dtype = out_dtype ? dtype_of(*out_dtype) : DType::kFloat32;
  LinearInt8Args a = quantised_args(op, c.o, xs, zp);
  check_out_floating(op, a.epilogue.out_dtype);
  Tensor out = empty(c.out_sizes(), a.epilogue.out_dtype);
  a.epilogue.out = out.mutable_data_ptr();
  run(a);
  return out;
}

void linear_int8_out(const Tensor& x, const Tensor& x_scale, const Tensor& w, const Tensor& w_scale,
                     const MaybeTensor& bias, std::string activation, const MaybeTensor& residual,
                     const MaybeTensor& zero, int64_t group_size, std::string post_activation,
                     Tensor out) {
  constexpr const char* op = "linear_int8";
  Call c(op, "x_q", x, w, w_scale, bias, activation, residual, group_size, post_activation);
  const TensorView xs = c.packed(x_scale, op, "x_scale"), zp = c.packed(zero, op, "x_zero_point");
  c.o.out = view(out, op, "out");
  check_out_floating(op, c.o.out.dtype);
  const LinearInt8Args a = quantised_args(op, c.o, xs, zp);
  NC_CHECK(!may_overlap(c.o.out, xs) && !may_overlap(c.o.out, zp), op,
           "out must not overlap another argument");
  c.check_apart(op);
  run(a);
}

Tensor linear_int8_requantize(const Tensor& x, const Tensor& x_scale, const Tensor& w,
                              const Tensor& w_scale, const MaybeTensor& bias,
                              std::string activation, const MaybeTensor& residual, double out_scale,
                              int64_t out_zero_point, ScalarType out_dtype, const MaybeTensor& zero,
                              int64_t group_size, std::string post_activation) {
  constexpr const char* op = "linear_int8_requantize";
  Call c(op, "x_q", x, w, w_scale, bias, activation, residual, group_size, post_activation);
  const TensorView xs = c.packed(x_scale, op, "x_scale"), zp = c.packed(zero, op, "x_zero_point");
  c.o.out.dtype = dtype_of(out_dtype);
  LinearInt8Args a = quantised_args(op, c.o, xs, zp);
  set_requantise(op, a, out_scale, out_zero_point);
  Tensor out = empty(c.out_sizes(), a.epilogue.out_dtype);
  a.epilogue.out = out.mutable_data_ptr();
  run(a);
  return out;
}

Tensor linear_dynamic_int8(const Tensor& x, const Tensor& w, const Tensor& w_scale,
                           const MaybeTensor& bias, std::string activation,
                           const MaybeTensor& residual, std::optional<ScalarType> out_dtype,
                           int64_t group_size, bool asymmetric, std::string post_activation,
                           bool strict) {
  constexpr const char* op = "linear_dynamic_int8";
  Call c(op, "x", x, w, w_scale, bias, activation, residual, group_size, post_activation);
  c.o.out.dtype = out_dtype ? dtype_of(*out_dtype) : c.o.x.dtype;
  LinearDynamicInt8Args d = dynamic_args(c.o, asymmetric, strict);
  check_out_floating(op, d.linear.epilogue.out_dtype);
  Tensor out = empty(c.out_sizes(), d.linear.epilogue.out_dtype);
  d.linear.epilogue.out = out.mutable_data_ptr();
  run(d);
  return out;
}

void linear_dynamic_int8_out(const Tensor& x, const Tensor& w, const Tensor& w_scale,
                             const MaybeTensor& bias, std::string activation,
                             const MaybeTensor& residual, int64_t group_size, bool asymmetric,
                             std::string post_activation, bool strict, Tensor out) {
  constexpr const char* op = "linear_dynamic_int8";
  Call c(op, "x", x, w, w_scale, bias, activation, residual, group_size, post_activation);
  c.o.out = view(out, op, "out");
  check_out_floating(op, c.o.out.dtype);
  const LinearDynamicInt8Args d = dynamic_args(c.o, asymmetric, strict);
  c.check_apart(op);
  run(d);
}

Tensor pack(const Tensor& w_in) {
  constexpr const char* op = "_linear_int8_pack";
  view(w_in, op, "w_q");
  const Tensor contiguous = as_contiguous(w_in);
  const TensorView w = view(contiguous, op, "w_q");
  NC_CHECK(w.dtype == DType::kInt8 && w.rank == 2, op, "w_q must be int8 [N, K], got ",
           name(w.dtype), " ", shape(w));
  const LinearInt8Kernel& kernel = linear_int8_kernel();
  const int64_t columns = w.sizes[0], depth = w.sizes[1];
  const PackedHeader header = packed_header(kernel.layout, columns, depth);
  const int64_t bytes = linear_int8_packed_bytes(kernel, columns, depth);
  Tensor packed = empty({static_cast<int64_t>(sizeof header) + bytes}, DType::kUInt8);
  uint8_t* p = static_cast<uint8_t*>(packed.mutable_data_ptr());
  std::memcpy(p, &header, sizeof header);
  std::memset(p + sizeof header, 0, bytes);
  linear_int8_pack(kernel, static_cast<const int8_t*>(w.data), depth, columns, depth,
                   p + sizeof header);
  return packed;
}

Tensor linear_dynamic_int8_packed(const Tensor& x, const Tensor& packed, int64_t out_features,
                                  const Tensor& w_scale, const MaybeTensor& bias,
                                  std::string activation, const MaybeTensor& residual,
                                  std::optional<ScalarType> out_dtype, int64_t group_size,
                                  bool asymmetric, std::string post_activation, bool strict) {
  constexpr const char* op = "linear_dynamic_int8";
  Call c(op, "x", x, {}, w_scale, bias, activation, residual, group_size, post_activation);
  NC_CHECK(out_features >= 0, op, "out_features must not be negative, got ", out_features);
  c.o.w.rank = 2, c.o.w.dtype = DType::kInt8;
  c.o.w.sizes[0] = out_features, c.o.w.sizes[1] = c.o.x.rank >= 1 ? size(c.o.x, -1) : 0;
  c.o.out.dtype = out_dtype ? dtype_of(*out_dtype) : c.o.x.dtype;
  LinearDynamicInt8Args d = dynamic_args(c.o, asymmetric, strict);
  check_out_floating(op, d.linear.epilogue.out_dtype);
  d.linear.kernel = &linear_int8_kernel();
  const int64_t depth = d.linear.depth;
  NC_CHECK(out_features <= packed.numel() && depth <= packed.numel(), op,
           "packed must be weights [", out_features, ", ", depth, "], got ", packed.numel(),
           " bytes");
  d.linear.packed =
      packed_panels(op, view(packed, op, "packed"), d.linear.kernel->layout, out_features, depth,
                    linear_int8_packed_bytes(*d.linear.kernel, out_features, depth));
  Tensor out = empty(c.out_sizes(), d.linear.epilogue.out_dtype);
  d.linear.epilogue.out = out.mutable_data_ptr();
  run(d);
  return out;
}

// Steps. Operands must lie as the kernels read them; constant weights are packed once per plan.

void check_step_operands(const char* op, const Operands& o) {
  NC_CHECK(has_even_rows(o.x) && has_even_rows(o.w) &&
               (!defined(o.residual) || has_even_rows(o.residual)),
           op, "x, w_q and residual must have adjacent elements and evenly spaced rows in a plan");
  NC_CHECK(is_contiguous(o.w_scale) && (!defined(o.bias) || is_contiguous(o.bias)), op,
           "w_scale and bias must be contiguous in a plan");
}

std::shared_ptr<void> pack_weights(LinearInt8Args& a, PackCache& cache) {
  a.kernel = &linear_int8_kernel();
  const LinearInt8Args& args = a;
  const std::string layout = std::string("linear_int8/") + a.kernel->layout + "/" +
                             std::to_string(a.columns) + "x" + std::to_string(a.depth) + "/" +
                             std::to_string(a.ldw);
  std::shared_ptr<void> buffer = cache.get(a.w, layout, [&args] {
    auto made = aligned_buffer(linear_int8_packed_bytes(*args.kernel, args.columns, args.depth));
    linear_int8_pack(*args.kernel, args.w, args.ldw, args.columns, args.depth,
                     static_cast<uint8_t*>(made.get()));
    return made;
  });
  a.packed = static_cast<const uint8_t*>(buffer.get());
  a.w = nullptr;
  return buffer;
}

Step quantised_step(const StepSpec& s, PackCache& cache, bool requantise) {
  const char* op = requantise ? "linear_int8_requantize" : "linear_int8";
  Operands o{s.inputs[0],
             s.inputs[2],
             s.inputs[3],
             s.inputs[4],
             s.inputs[5],
             s.outputs[0],
             s.text("activation"),
             s.text("post_activation"),
             s.integer("group_size")};
  check_step_operands(op, o);
  NC_CHECK(is_contiguous(s.inputs[1]) && (!defined(s.inputs[6]) || is_contiguous(s.inputs[6])), op,
           "x_scale and x_zero_point must be contiguous in a plan");
  LinearInt8Args a = quantised_args(op, o, s.inputs[1], s.inputs[6]);
  if (requantise)
    set_requantise(op, a, s.number("out_scale"), s.integer("out_zero_point"));
  else
    check_out_floating(op, a.epilogue.out_dtype);
  std::shared_ptr<void> packed;
  if (s.constant[2] && a.rows && a.columns) packed = pack_weights(a, cache);
  auto scratch = aligned_buffer(linear_int8_scratch(a.rows, a.depth, a.group));
  a.scratch = scratch.get();
  return [a, packed, scratch] { linear_int8_run(a); };
}

const RegisterStep linear_int8_step("linear_int8", [](const StepSpec& s, PackCache& cache) {
  return quantised_step(s, cache, false);
});
const RegisterStep linear_int8_requantize_step("linear_int8_requantize",
                                               [](const StepSpec& s, PackCache& cache) {
                                                 return quantised_step(s, cache, true);
                                               });
const RegisterStep linear_dynamic_int8_step(
    "linear_dynamic_int8", [](const StepSpec& s, PackCache& cache) -> Step {
      constexpr const char* op = "linear_dynamic_int8";
      Operands o{s.inputs[0],
                 s.inputs[1],
                 s.inputs[2],
                 s.inputs[3],
                 s.inputs[4],
                 s.outputs[0],
                 s.text("activation"),
                 s.text("post_activation"),
                 s.integer("group_size")};
      check_step_operands(op, o);
      LinearDynamicInt8Args d = dynamic_args(o, s.flag("asymmetric"), s.flag("strict"));
      check_out_floating(op, d.linear.epilogue.out_dtype);
      std::shared_ptr<void> packed;
      if (s.constant[1] && d.linear.rows && d.linear.columns)
        packed = pack_weights(d.linear, cache);
      auto scratch = aligned_buffer(
          linear_dynamic_int8_scratch(d.linear.rows, d.linear.depth, d.linear.group));
      d.linear.scratch = scratch.get();
      return [d, packed, scratch] { linear_dynamic_int8_run(d); };
    });

}  // namespace
}  // namespace narrowcast

STABLE_TORCH_LIBRARY_IMPL(narrowcast, CPU, m) {
  m.impl("linear_int8", TORCH_BOX(&narrowcast::linear_int8));
  m.impl("linear_int8.out", TORCH_BOX(&narrowcast::linear_int8_out));
  m.impl("linear_int8_requantize", TORCH_BOX(&narrowcast::linear_int8_requantize));
  m.impl("linear_dynamic_int8", TORCH_BOX(&narrowcast::linear_dynamic_int8));
  m.impl("_linear_int8_pack", TORCH_BOX(&narrowcast::pack));
  m.impl("_linear_dynamic_int8_packed", TORCH_BOX(&narrowcast::linear_dynamic_int8_packed));
  m.impl("linear_dynamic_int8.out", TORCH_BOX(&narrowcast::linear_dynamic_int8_out));
}
