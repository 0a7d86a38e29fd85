// Where tensors stop: argument checks, the torch op, the executor's step.
#include "attention/attention_checks.h"
#include "common/stable.h"
#include "common/step.h"

namespace narrowcast {
namespace {

struct Operands {
  TensorView q, k, v, bias, cu_q, cu_k, sinks;
};

struct Options {
  bool has_scale, causal;
  double scale, softcap;
  int64_t window;
};

AttentionArgs attention_args(const char* op, const Operands& t, const Options& o) {
  const bool packed = defined(t.cu_q) || defined(t.cu_k);
  const int rank = packed ? 3 : 4;
  const char* form = packed ? "[T, H, D] (with cu_seqlens)" : "[B, H, S, D]";
  check_floating(op, "q", t.q, rank, form);
  check_floating(op, "k", t.k, rank, form);
  check_floating(op, "v", t.v, rank, form);
  NC_CHECK(t.k.dtype == t.q.dtype, op, "k must have the dtype of q, ", name(t.q.dtype), ", got ",
           name(t.k.dtype));
  NC_CHECK(t.v.dtype == t.q.dtype, op, "v must have the dtype of q, ", name(t.q.dtype), ", got ",
           name(t.v.dtype));
  const int head = 1, row = packed ? 0 : 2;
  AttentionArgs a = {};
  a.heads = t.q.sizes[head], a.kv_heads = t.k.sizes[head];
  a.sq = t.q.sizes[row], a.sk = t.k.sizes[row];
  a.depth = size(t.q, -1), a.v_depth = size(t.v, -1);
  NC_CHECK(size(t.k, -1) == a.depth && (packed || t.k.sizes[0] == t.q.sizes[0]), op,
           "k must have the batch and head size of q, ", shape(t.q), ", got ", shape(t.k));
  NC_CHECK(a.kv_heads > 0 ? a.heads % a.kv_heads == 0 : a.heads == 0, op,
           "k must have a number of heads that divides that of q, ", a.heads, ", got ", a.kv_heads);
  bool same = true;
  for (int d = 0; d < rank - 1; ++d) same = same && t.v.sizes[d] == t.k.sizes[d];
  NC_CHECK(same, op, "v must have the shape of k but for the last size, ", shape(t.k), ", got ",
           shape(t.v));
  NC_CHECK(a.sq < kMaxLength && a.sk < kMaxLength, op, "q and k must be shorter than 2^30, got ",
           a.sq, " and ", a.sk);
  for (const auto& [x, label] : {std::pair{&t.q, "q"}, {&t.k, "k"}, {&t.v, "v"}})
    NC_CHECK(last_is_dense(*x), op, label, " must have stride 1 in the last dimension, got ",
             stride(*x, -1));
  if (packed) {
    NC_CHECK(defined(t.cu_q) && defined(t.cu_k), op,
             "cu_seqlens_q and cu_seqlens_k must be given together");
    check_vector(op, "cu_seqlens_q", t.cu_q, DType::kInt32, -1);
    NC_CHECK(t.cu_q.sizes[0] >= 1, op, "cu_seqlens_q must be [B + 1], got [0]");
    check_vector(op, "cu_seqlens_k", t.cu_k, DType::kInt32, t.cu_q.sizes[0]);
    a.batch = t.cu_q.sizes[0] - 1;
    a.cu_q = static_cast<const int32_t*>(t.cu_q.data);
    a.cu_k = static_cast<const int32_t*>(t.cu_k.data);
    a.q_strides = {0, t.q.strides[1], t.q.strides[0]};
    a.k_strides = {0, t.k.strides[1], t.k.strides[0]};
    a.v_strides = {0, t.v.strides[1], t.v.strides[0]};
    a.out_strides = {0, a.v_depth, a.heads * a.v_depth};
    a.lse_strides = {0, 1, a.heads};
    NC_CHECK(!defined(t.bias), op, "bias must be absent with cu_seqlens, got ", shape(t.bias));
  } else {
    a.batch = t.q.sizes[0];
    a.q_strides = strides_of(t.q), a.k_strides = strides_of(t.k), a.v_strides = strides_of(t.v);
    a.out_strides = {a.heads * a.sq * a.v_depth, a.sq * a.v_depth, a.v_depth};
    a.lse_strides = {a.heads * a.sq, a.sq, 1};
  }
  if (defined(t.bias)) {
    const int64_t wanted[4] = {a.batch, a.heads, a.sq, a.sk};
    bool fits = is_floating(t.bias.dtype) && t.bias.rank <= 4;
    for (int d = 0; fits && d < t.bias.rank; ++d) {
      const int64_t n = size(t.bias, -1 - d);
      fits = n == 1 || n == wanted[3 - d];
      a.bias_strides[3 - d] = n == 1 ? 0 : stride(t.bias, -1 - d);
    }
    NC_CHECK(fits, op, "bias must be float32, float16 or bfloat16 and broadcast to [", a.batch,
             ", ", a.heads, ", ", a.sq, ", ", a.sk, "], got ", name(t.bias.dtype), " ",
             shape(t.bias));
    a.bias = t.bias.data, a.bias_dtype = t.bias.dtype;
  }
  if (defined(t.sinks)) {
    check_vector(op, "sinks", t.sinks, DType::kFloat32, a.heads);
    a.sinks = static_cast<const float*>(t.sinks.data);
  }
  a.q = t.q.data, a.k = t.k.data, a.v = t.v.data;
  a.q_dtype = a.kv_dtype = a.out_dtype = t.q.dtype;
  a.scale = checked_scale(op, o.has_scale, o.scale, o.softcap, o.window, a.depth);
  a.softcap = static_cast<float>(o.softcap);
  a.window = o.window, a.causal = o.causal;
  return a;
}

// What cu_seqlens hold is only known when they are read.
void check_lengths(const char* op, const AttentionArgs& a) {
  if (!a.cu_q) return;
  for (const auto& [cu, total, label] :
       {std::tuple{a.cu_q, a.sq, "cu_seqlens_q"}, {a.cu_k, a.sk, "cu_seqlens_k"}}) {
    NC_CHECK(cu[0] == 0 && cu[a.batch] == total, op, label, " must go from 0 to ", total, ", got ",
             cu[0], " to ", cu[a.batch]);
    for (int64_t b = 0; b < a.batch; ++b)
      NC_CHECK(cu[b] <= cu[b + 1], op, label, " must not decrease, got ", cu[b + 1], " after ",
               cu[b]);
  }
}

Tensor dense_rows(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  const int64_t n = t.dim();
  const bool dense = n == 0 || t.numel() == 0 || sizes[n - 1] == 1 || strides[n - 1] == 1;
  return dense ? t : torch::stable::contiguous(t);
}

std::optional<Tensor> contiguous_if(const std::optional<Tensor>& t) {
  return t ? std::optional(as_contiguous(*t)) : std::nullopt;
}

struct Call {
  const char* op;
  Tensor q, k, v;
  std::optional<Tensor> bias, cu_q, cu_k, sinks;
  Options options;

  Call(const char* op, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
       const std::optional<Tensor>& bias, std::optional<double> scale, bool causal, int64_t window,
       double softcap, const std::optional<Tensor>& cu_q_in, const std::optional<Tensor>& cu_k_in,
       const std::optional<Tensor>& sinks_in)
      : op(op),
        q((view(q_in, op, "q"), dense_rows(q_in))),
        k((view(k_in, op, "k"), dense_rows(k_in))),
        v((view(v_in, op, "v"), dense_rows(v_in))),
        bias(bias),
        cu_q((view(cu_q_in, op, "cu_seqlens_q"), contiguous_if(cu_q_in))),
        cu_k((view(cu_k_in, op, "cu_seqlens_k"), contiguous_if(cu_k_in))),
        sinks((view(sinks_in, op, "sinks"), contiguous_if(sinks_in))),
        options{scale.has_value(), causal, scale.value_or(0.0), softcap, window} {}

  AttentionArgs args() const {
    const AttentionArgs a = attention_args(
        op,
        {view(q, op, "q"), view(k, op, "k"), view(v, op, "v"), view(bias, op, "bias"),
         view(cu_q, op, "cu_seqlens_q"), view(cu_k, op, "cu_seqlens_k"), view(sinks, op, "sinks")},
        options);
    check_lengths(op, a);
    return a;
  }
  Tensor new_out(const AttentionArgs& a) const {
    std::vector<int64_t> sizes(q.sizes().begin(), q.sizes().end());
    sizes.back() = a.v_depth;
    return empty(sizes, a.out_dtype);
  }
};

#define NC_ATTENTION_PARAMETERS                                                        \
  const Tensor &q, const Tensor &k, const Tensor &v, const std::optional<Tensor>&bias, \
      std::optional<double> scale, bool causal, int64_t window, double softcap,        \
      const std::optional<Tensor>&cu_q, const std::optional<Tensor>&cu_k,              \
      const std::optional<Tensor>&sinks
#define NC_ATTENTION_ARGUMENTS q, k, v, bias, scale, causal, window, softcap, cu_q, cu_k, sinks

Tensor attention(NC_ATTENTION_PARAMETERS) {
  const Call call("attention", NC_ATTENTION_ARGUMENTS);
  AttentionArgs a = call.args();
  Tensor out = call.new_out(a);
  a.out = out.mutable_data_ptr();
  attention_run(a);
  return out;
}

void attention_out(NC_ATTENTION_PARAMETERS, Tensor out) {
  constexpr const char* op = "attention";
  const Call call(op, NC_ATTENTION_ARGUMENTS);
  AttentionArgs a = call.args();
  const TensorView to = view(out, op, "out");
  check_out(op, to, view(call.q, op, "q"), a.v_depth);
  for (const Tensor* t : {&q, &k, &v})
    NC_CHECK(!may_overlap(to, view(*t, op, "q")), op, "out must not overlap q, k or v");
  for (const auto* t : {&bias, &cu_q, &cu_k, &sinks})
    NC_CHECK(!may_overlap(to, view(*t, op, "bias")), op, "out must not overlap an input");
  a.out = to.data;
  attention_run(a);
}

std::tuple<Tensor, Tensor> attention_lse(NC_ATTENTION_PARAMETERS) {
  const Call call("attention_lse", NC_ATTENTION_ARGUMENTS);
  AttentionArgs a = call.args();
  Tensor out = call.new_out(a);
  const auto sizes = call.q.sizes();
  Tensor lse = empty(std::vector<int64_t>(sizes.begin(), sizes.end() - 1), DType::kFloat32);
  a.out = out.mutable_data_ptr();
  a.lse = static_cast<float*>(lse.mutable_data_ptr());
  attention_run(a);
  return {out, lse};
}

Step attention_step(const StepSpec& s, PackCache&) {
  const char* op = s.op == "attention_lse" ? "attention_lse" : "attention";
  const Options options = {s.attributes.count("scale") > 0, s.flag("causal"), s.number("scale"),
                           s.number("softcap"), s.integer("window")};
  AttentionArgs a = attention_args(
      op,
      {s.inputs[0], s.inputs[1], s.inputs[2], s.inputs[3], s.inputs[4], s.inputs[5], s.inputs[6]},
      options);
  check_out(op, s.outputs[0], s.inputs[0], a.v_depth);
  a.out = s.outputs[0].data;
  if (s.outputs.size() > 1) a.lse = static_cast<float*>(s.outputs[1].data);
  return [a, op] {
    check_lengths(op, a);
    attention_run(a);
  };
}

const RegisterStep attention_registered("attention", attention_step);
const RegisterStep attention_lse_registered("attention_lse", attention_step);

}  // namespace
}  // namespace narrowcast

STABLE_TORCH_LIBRARY_IMPL(narrowcast, CPU, m) {
  m.impl("attention", TORCH_BOX(&narrowcast::attention));
  m.impl("attention.out", TORCH_BOX(&narrowcast::attention_out));
  m.impl("attention_lse", TORCH_BOX(&narrowcast::attention_lse));
}
