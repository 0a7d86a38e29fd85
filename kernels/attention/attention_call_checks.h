// Tensors of an attention call on their way to AttentionArgs; for the files of the rooms that take
// attention's arguments and see tensors.
#pragma once
#include "attention/attention_checks.h"
#include "common/stable.h"

namespace narrowcast {

inline Tensor dense_rows(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  const int64_t n = t.dim();
  const bool dense = n == 0 || t.numel() == 0 || sizes[n - 1] == 1 || strides[n - 1] == 1;
  return dense ? t : torch::stable::contiguous(t);
}

inline std::optional<Tensor> contiguous_if(const std::optional<Tensor>& t) {
  return t ? std::optional(as_contiguous(*t)) : std::nullopt;
}

struct AttentionCall {
  const char* op;
  Tensor q, k, v;
  std::optional<Tensor> bias, cu_q, cu_k, sinks;
  AttentionOptions options;

  AttentionCall(const char* op, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                const std::optional<Tensor>& bias, std::optional<double> scale, bool causal,
                int64_t window, double softcap, const std::optional<Tensor>& cu_q_in,
                const std::optional<Tensor>& cu_k_in, const std::optional<Tensor>& sinks_in)
      : op(op),
        q((view(q_in, op, "q"), dense_rows(q_in))),
        k((view(k_in, op, "k"), dense_rows(k_in))),
        v((view(v_in, op, "v"), dense_rows(v_in))),
        bias(bias),
        cu_q((view(cu_q_in, op, "cu_seqlens_q"), contiguous_if(cu_q_in))),
        cu_k((view(cu_k_in, op, "cu_seqlens_k"), contiguous_if(cu_k_in))),
        sinks((view(sinks_in, op, "sinks"), contiguous_if(sinks_in))),
        options{scale.has_value(), causal, scale.value_or(0.0), softcap, window} {}

  // Where cu_seqlens can be read here and now.
  AttentionArgs args() const {
    const AttentionArgs a = device_args();
    check_lengths(op, a);
    return a;
  }
  // Where they lie in the memory of a device.
  AttentionArgs device_args() const {
    return attention_args(
        op,
        {view(q, op, "q"), view(k, op, "k"), view(v, op, "v"), view(bias, op, "bias"),
         view(cu_q, op, "cu_seqlens_q"), view(cu_k, op, "cu_seqlens_k"), view(sinks, op, "sinks")},
        options);
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

}  // namespace narrowcast
