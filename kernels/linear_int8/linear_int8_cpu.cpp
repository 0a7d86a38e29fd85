// Where tensors stop: argument checks, the torch ops, the executor's steps.
#include <cmath>

#include "common/packed_header.h"
#include "common/rows.h"
#include "common/scratch.h"
#include "common/stable.h"
#include "common/step.h"
#include "linear_int8/linear_int8.h"

namespace narrowcast {
namespace {

// What all the forms have in common; views of tensors that the caller keeps alive.
struct Operands {
  TensorView x, w, w_scale, bias, residual, out;
  std::string activation, post_activation;
  int64_t group_size = 0;
};

std::string rows_shape(const TensorView& x, int64_t last) {
  TensorView expected = x;
  expected.sizes[x.rank - 1] = last;
  return shape(expected);
}

bool same_leading(const TensorView& a, const TensorView& b) {
  if (a.rank != b.rank) return false;
  for (int d = 0; d + 1 < a.rank; ++d)
    if (a.sizes[d] != b.sizes[d]) return false;
  return true;
}

// Everything but x's values and scales.
LinearInt8Args common_args(const char* op, const Operands& o) {
  NC_CHECK(o.x.rank >= 1, op, "x must be [..., K], got ", shape(o.x));
  NC_CHECK(o.w.dtype == DType::kInt8 && o.w.rank == 2, op, "w_q must be int8 [N, K], got ",
           name(o.w.dtype), " ", shape(o.w));
  LinearInt8Args a;
  const Rows x = rows_of(o.x), w = rows_of(o.w);
  a.rows = x.rows, a.depth = x.columns, a.columns = w.rows, a.group = o.group_size;
  a.ldx = x.ld, a.ldw = w.ld;
  a.w = static_cast<const int8_t*>(o.w.data);
  NC_CHECK(w.columns == a.depth, op, "w_q must be [N, K] with K = ", a.depth, ", got ", shape(o.w));
  NC_CHECK(a.group == 0 || (a.group > 0 && a.group % 32 == 0 && a.depth % a.group == 0), op,
           "group_size must be 0 or a multiple of 32 that divides K = ", a.depth, ", got ",
           a.group);
  NC_CHECK(o.w_scale.dtype == DType::kFloat32 &&
               (numel(o.w_scale) == 1 || (o.w_scale.rank == 1 && o.w_scale.sizes[0] == a.columns)),
           op, "w_scale must be float32 [N] = [", a.columns, "] or one number, got ",
           name(o.w_scale.dtype), " ", shape(o.w_scale));
  a.w_scale = static_cast<const float*>(o.w_scale.data);
  a.w_scale_stride = numel(o.w_scale) == 1 ? 0 : 1;

  Epilogue& e = a.epilogue;
  e.activation = parse_activation(o.activation.c_str(), op, "activation");
  e.post_activation = parse_activation(o.post_activation.c_str(), op, "post_activation");
  if (defined(o.bias)) {
    NC_CHECK(is_floating(o.bias.dtype) && o.bias.rank == 1 && o.bias.sizes[0] == a.columns, op,
             "bias must be float32, float16 or bfloat16 [N] = [", a.columns, "], got ",
             name(o.bias.dtype), " ", shape(o.bias));
    e.bias = o.bias.data, e.bias_dtype = o.bias.dtype;
  }
  if (defined(o.residual)) {
    NC_CHECK(is_floating(o.residual.dtype) && same_leading(o.residual, o.x) &&
                 size(o.residual, -1) == a.columns,
             op, "residual must be float32, float16 or bfloat16 ", rows_shape(o.x, a.columns),
             ", got ", name(o.residual.dtype), " ", shape(o.residual));
    e.residual = o.residual.data, e.residual_dtype = o.residual.dtype;
    e.ld_residual = rows_of(o.residual).ld;
  }
  e.out = o.out.data, e.out_dtype = o.out.dtype, e.ld_out = a.columns;
  if (o.out.rank >= 0) {
    NC_CHECK(same_leading(o.out, o.x) && size(o.out, -1) == a.columns, op, "out must be ",
             rows_shape(o.x, a.columns), ", got ", shape(o.out));
    NC_CHECK(is_contiguous(o.out), op, "out must be contiguous");
    const bool in_place = defined(o.residual) && o.residual.data == o.out.data &&
                          o.residual.dtype == o.out.dtype &&
                          (a.rows <= 1 || e.ld_residual == a.columns);
    NC_CHECK(!may_overlap(o.out, o.x) && !may_overlap(o.out, o.w) &&
                 !may_overlap(o.out, o.w_scale) && !may_overlap(o.out, o.bias) &&
                 (in_place || !may_overlap(o.out, o.residual)),
             op, "out must not overlap another argument");
  }
  return a;
}

LinearInt8Args quantised_args(const char* op, const Operands& o, const TensorView& x_scale,
                              const TensorView& zero) {
  NC_CHECK(o.x.dtype == DType::kInt8, op, "x_q must be int8, got ", name(o.x.dtype));
  LinearInt8Args a = common_args(op, o);
  a.x = static_cast<const int8_t*>(o.x.data);
  const int64_t groups = a.group ? a.depth / a.group : 1;
  const std::string per_row = rows_shape(o.x, groups);
  NC_CHECK(x_scale.dtype == DType::kFloat32, op, "x_scale must be float32, got ",
           name(x_scale.dtype));
  if (a.group) {
    NC_CHECK(same_leading(x_scale, o.x) && size(x_scale, -1) == groups, op,
             "x_scale must be [..., K / group_size] = ", per_row, ", got ", shape(x_scale));
    a.x_scale_stride = groups;
  } else {
    // Per token the last dimension may be left out, as quantize_int8 does.
    TensorView tokens = o.x;
    tokens.rank -= 1;
    bool matches = x_scale.rank == tokens.rank;
    for (int d = 0; matches && d < tokens.rank; ++d) matches = x_scale.sizes[d] == tokens.sizes[d];
    matches = matches || (same_leading(x_scale, o.x) && size(x_scale, -1) == 1);
    NC_CHECK(matches || numel(x_scale) == 1, op, "x_scale must be ", shape(tokens),
             " (per token) or one number, got ", shape(x_scale));
    a.x_scale_stride = numel(x_scale) == 1 ? 0 : 1;
  }
  a.x_scale = static_cast<const float*>(x_scale.data);
  if (defined(zero)) {
    NC_CHECK(a.group == 0, op, "x_zero_point must be absent when group_size is set");
    NC_CHECK(zero.dtype == DType::kInt32 && numel(zero) == a.rows, op,
             "x_zero_point must be int32 with one value per token, got ", name(zero.dtype), " ",
             shape(zero));
    a.x_zero_point = static_cast<const int32_t*>(zero.data);
  }
  return a;
}

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

void check_out_floating(const char* op, DType dtype) {
  NC_CHECK(is_floating(dtype), op, "out_dtype must be float32, float16 or bfloat16, got ",
           name(dtype));
}

void set_requantise(const char* op, LinearInt8Args& a, double out_scale, int64_t out_zero_point) {
  const DType dtype = a.epilogue.out_dtype;
  NC_CHECK(dtype == DType::kInt8 || dtype == DType::kUInt8, op,
           "out_dtype must be int8 or uint8, got ", name(dtype));
  a.epilogue.out_scale = static_cast<float>(out_scale);
  NC_CHECK(std::isfinite(a.epilogue.out_scale) && a.epilogue.out_scale > 0, op,
           "out_scale must be positive and finite, got ", out_scale);
  const int64_t low = dtype == DType::kInt8 ? -128 : 0;
  NC_CHECK(out_zero_point >= low && out_zero_point <= low + 255, op,
           "out_zero_point must be within ", low, " and ", low + 255, ", got ", out_zero_point);
  a.epilogue.out_zero_point = static_cast<int32_t>(out_zero_point);
}

// The tensors of one eager call, brought into a form that the kernels read.
struct Call {
  std::vector<Tensor> kept;
  Operands o;
  TensorView x_scale, zero;

  TensorView matrix(const Tensor& t, const char* op, const char* argument) {
    const TensorView v = view(t, op, argument);
    if (has_even_rows(v) || v.rank < 1) return v;
    kept.push_back(torch::stable::contiguous(t));
    return view(kept.back(), op, argument);
  }
  TensorView packed(const std::optional<Tensor>& t, const char* op, const char* argument) {
    if (!t) return {};
    const TensorView v = view(*t, op, argument);
    if (is_contiguous(v)) return v;
    kept.push_back(torch::stable::contiguous(*t));
    return view(kept.back(), op, argument);
  }
  Call(const char* op, const char* x_name, const Tensor& x, const std::optional<Tensor>& w,
       const Tensor& w_scale, const std::optional<Tensor>& bias, const std::string& activation,
       const std::optional<Tensor>& residual, int64_t group_size,
       const std::string& post_activation) {
    o.x = matrix(x, op, x_name);
    if (w) o.w = matrix(*w, op, "w_q");
    o.w_scale = packed(w_scale, op, "w_scale");
    o.bias = packed(bias, op, "bias");
    if (residual) o.residual = matrix(*residual, op, "residual");
    o.activation = activation, o.post_activation = post_activation, o.group_size = group_size;
  }
  std::vector<int64_t> out_sizes() const {
    std::vector<int64_t> sizes(o.x.sizes, o.x.sizes + std::max(o.x.rank, 0));
    if (!sizes.empty()) sizes.back() = o.w.sizes[0];
    return sizes;
  }
};

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

using MaybeTensor = std::optional<Tensor>;

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
  run(quantised_args(op, c.o, xs, zp));
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
  run(dynamic_args(c.o, asymmetric, strict));
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
