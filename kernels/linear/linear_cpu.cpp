// Where tensors stop: argument checks, the torch ops, the executor's step.
#include "common/packed_header.h"
#include "common/rows.h"
#include "common/scratch.h"
#include "common/stable.h"
#include "common/step.h"
#include "linear/linear.h"

namespace narrowcast {
namespace {

constexpr const char* kOp = "linear";

struct Operands {
  TensorView x, w, bias, residual, out;
  std::string activation, post_activation;
};

bool is_rows_of(const TensorView& t, const TensorView& x, int64_t columns) {
  if (t.rank != x.rank) return false;
  for (int d = 0; d + 1 < x.rank; ++d)
    if (t.sizes[d] != x.sizes[d]) return false;
  return size(t, -1) == columns;
}

LinearArgs linear_args(const Operands& o) {
  NC_CHECK(is_floating(o.x.dtype) && o.x.rank >= 1, kOp,
           "x must be float32, float16 or bfloat16 [..., K], got ", name(o.x.dtype), " ",
           shape(o.x));
  NC_CHECK(o.w.dtype == o.x.dtype && o.w.rank == 2 && o.w.sizes[1] == size(o.x, -1), kOp,
           "weight must be ", name(o.x.dtype), " [N, K] with K = ", size(o.x, -1), " like x, got ",
           name(o.w.dtype), " ", shape(o.w));
  LinearArgs a;
  const Rows x = rows_of(o.x), w = rows_of(o.w);
  a.x = o.x.data, a.w = o.w.data, a.dtype = o.x.dtype;
  a.rows = x.rows, a.depth = x.columns, a.columns = w.rows, a.ldx = x.ld, a.ldw = w.ld;
  TensorView expected = o.x;
  expected.sizes[o.x.rank - 1] = a.columns;

  Epilogue& e = a.epilogue;
  e.activation = parse_activation(o.activation.c_str(), kOp, "activation");
  e.post_activation = parse_activation(o.post_activation.c_str(), kOp, "post_activation");
  if (defined(o.bias)) {
    NC_CHECK(is_floating(o.bias.dtype) && o.bias.rank == 1 && o.bias.sizes[0] == a.columns, kOp,
             "bias must be float32, float16 or bfloat16 [N] = [", a.columns, "], got ",
             name(o.bias.dtype), " ", shape(o.bias));
    e.bias = o.bias.data, e.bias_dtype = o.bias.dtype;
  }
  if (defined(o.residual)) {
    NC_CHECK(is_floating(o.residual.dtype) && is_rows_of(o.residual, o.x, a.columns), kOp,
             "residual must be float32, float16 or bfloat16 ", shape(expected), ", got ",
             name(o.residual.dtype), " ", shape(o.residual));
    e.residual = o.residual.data, e.residual_dtype = o.residual.dtype,
    e.ld_residual = rows_of(o.residual).ld;
  }
  NC_CHECK(is_floating(o.out.dtype), kOp, "out_dtype must be float32, float16 or bfloat16, got ",
           name(o.out.dtype));
  e.out = o.out.data, e.out_dtype = o.out.dtype, e.ld_out = a.columns;
  if (defined(o.out)) {
    NC_CHECK(is_rows_of(o.out, o.x, a.columns), kOp, "out must be ", shape(expected), ", got ",
             shape(o.out));
    NC_CHECK(is_contiguous(o.out), kOp, "out must be contiguous");
    const bool in_place = defined(o.residual) && o.residual.data == o.out.data &&
                          o.residual.dtype == o.out.dtype &&
                          (a.rows <= 1 || e.ld_residual == a.columns);
    NC_CHECK(!may_overlap(o.out, o.x) && !may_overlap(o.out, o.w) && !may_overlap(o.out, o.bias) &&
                 (in_place || !may_overlap(o.out, o.residual)),
             kOp, "out must not overlap another argument");
  }
  return a;
}

// The tensors of one eager call, brought into a form that the kernels read.
struct Call {
  std::vector<Tensor> kept;
  std::vector<TensorView> copied;  // what `kept` was copied from
  Operands o;

  TensorView readable(const Tensor& t, const char* argument, bool packed) {
    const TensorView v = view(t, kOp, argument);
    if (v.rank < 1 || (packed ? is_contiguous(v) : has_even_rows(v))) return v;
    copied.push_back(v);
    kept.push_back(torch::stable::contiguous(t));
    return view(kept.back(), kOp, argument);
  }
  Call(const Tensor& x, const std::optional<Tensor>& w, const std::optional<Tensor>& bias,
       const std::string& activation, const std::optional<Tensor>& residual,
       const std::string& post_activation) {
    o.x = readable(x, "x", false);
    if (w) o.w = readable(*w, "weight", false);
    if (bias) o.bias = readable(*bias, "bias", true);
    if (residual) o.residual = readable(*residual, "residual", false);
    o.activation = activation, o.post_activation = post_activation;
  }
};

void run(LinearArgs a) {
  const ThreadScratch scratch(linear_scratch(a.rows, a.depth));
  a.scratch = scratch.data();
  linear_run(a);
}

Tensor linear(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias,
              std::string activation, const std::optional<Tensor>& residual,
              std::optional<ScalarType> out_dtype, std::string post_activation) {
  Call c(x, w, bias, activation, residual, post_activation);
  c.o.out.dtype = out_dtype ? dtype_of(*out_dtype) : c.o.x.dtype;
  LinearArgs a = linear_args(c.o);
  std::vector<int64_t> sizes(c.o.x.sizes, c.o.x.sizes + c.o.x.rank);
  sizes.back() = a.columns;
  Tensor out = empty(sizes, a.epilogue.out_dtype);
  a.epilogue.out = out.mutable_data_ptr();
  run(a);
  return out;
}

void linear_out(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias,
                std::string activation, const std::optional<Tensor>& residual,
                std::string post_activation, Tensor out) {
  Call c(x, w, bias, activation, residual, post_activation);
  c.o.out = view(out, kOp, "out");
  const LinearArgs a = linear_args(c.o);
  for (const TensorView& source : c.copied)
    NC_CHECK(!may_overlap(c.o.out, source), kOp, "out must not overlap another argument");
  run(a);
}

Tensor pack_weight(const Tensor& weight) {
  constexpr const char* op = "_linear_pack";
  view(weight, op, "weight");
  const Tensor contiguous = as_contiguous(weight);
  const TensorView w = view(contiguous, op, "weight");
  NC_CHECK(is_floating(w.dtype) && w.rank == 2, op,
           "weight must be float32, float16 or bfloat16 [N, K], got ", name(w.dtype), " ",
           shape(w));
  const LinearFormat& format = linear_format(linear_kernel(), w.dtype);
  const int64_t columns = w.sizes[0], depth = w.sizes[1];
  const PackedHeader header = packed_header(format.layout, columns, depth);
  const int64_t bytes = linear_packed_bytes(format, columns, depth);
  Tensor packed = empty({static_cast<int64_t>(sizeof header) + bytes}, DType::kUInt8);
  uint8_t* p = static_cast<uint8_t*>(packed.mutable_data_ptr());
  std::memcpy(p, &header, sizeof header);
  linear_pack(format, w.data, w.dtype, depth, columns, depth, p + sizeof header);
  return packed;
}

Tensor linear_of_packed(const Tensor& x, const Tensor& packed, int64_t out_features,
                        const std::optional<Tensor>& bias, std::string activation,
                        const std::optional<Tensor>& residual, std::optional<ScalarType> out_dtype,
                        std::string post_activation) {
  Call c(x, {}, bias, activation, residual, post_activation);
  NC_CHECK(out_features >= 0, kOp, "out_features must not be negative, got ", out_features);
  c.o.w.rank = 2, c.o.w.dtype = c.o.x.dtype;
  c.o.w.sizes[0] = out_features, c.o.w.sizes[1] = c.o.x.rank >= 1 ? size(c.o.x, -1) : 0;
  c.o.out.dtype = out_dtype ? dtype_of(*out_dtype) : c.o.x.dtype;
  LinearArgs a = linear_args(c.o);
  a.kernel = &linear_kernel();
  const LinearFormat& format = linear_format(*a.kernel, a.dtype);
  NC_CHECK(out_features <= packed.numel() && a.depth <= packed.numel(), kOp,
           "packed must be weights [", out_features, ", ", a.depth, "], got ", packed.numel(),
           " bytes");
  a.packed = packed_panels(kOp, view(packed, kOp, "packed"), format.layout, out_features, a.depth,
                           linear_packed_bytes(format, out_features, a.depth));
  std::vector<int64_t> sizes(c.o.x.sizes, c.o.x.sizes + c.o.x.rank);
  sizes.back() = a.columns;
  Tensor out = empty(sizes, a.epilogue.out_dtype);
  a.epilogue.out = out.mutable_data_ptr();
  run(a);
  return out;
}

const RegisterStep linear_step("linear", [](const StepSpec& s, PackCache& cache) -> Step {
  Operands o{s.inputs[0],
             s.inputs[1],
             s.inputs[2],
             s.inputs[3],
             s.outputs[0],
             s.text("activation"),
             s.text("post_activation")};
  NC_CHECK(
      has_even_rows(o.x) && has_even_rows(o.w) &&
          (!defined(o.residual) || has_even_rows(o.residual)) &&
          (!defined(o.bias) || is_contiguous(o.bias)),
      kOp,
      "x, weight, residual and bias must have adjacent elements and evenly spaced rows in a plan");
  LinearArgs a = linear_args(o);
  a.kernel = &linear_kernel();
  std::shared_ptr<void> packed;
  if (s.constant[1] && a.rows && a.columns) {
    const LinearFormat& format = linear_format(*a.kernel, a.dtype);
    const std::string layout = std::string("linear/") + format.layout + "/" +
                               std::to_string(a.columns) + "x" + std::to_string(a.depth) + "/" +
                               std::to_string(a.ldw);
    packed = cache.get(a.w, layout, [&] {
      auto made = aligned_buffer(linear_packed_bytes(format, a.columns, a.depth));
      linear_pack(format, a.w, a.dtype, a.ldw, a.columns, a.depth, made.get());
      return made;
    });
    a.packed = packed.get(), a.w = nullptr;
  }
  auto scratch = aligned_buffer(linear_scratch(a.rows, a.depth));
  a.scratch = scratch.get();
  return [a, packed, scratch] { linear_run(a); };
});

}  // namespace
}  // namespace narrowcast

STABLE_TORCH_LIBRARY_IMPL(narrowcast, CPU, m) {
  m.impl("linear", TORCH_BOX(&narrowcast::linear));
  m.impl("_linear_pack", TORCH_BOX(&narrowcast::pack_weight));
  m.impl("_linear_packed", TORCH_BOX(&narrowcast::linear_of_packed));
  m.impl("linear.out", TORCH_BOX(&narrowcast::linear_out));
}
