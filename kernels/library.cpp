// The catalogue: the schema of every op. The formula, shapes and errors of an op are in its room.
//
// Letters: M tokens, K input features, N output features; B batch, H heads, S length, D head size;
// images are logical NCHW with channels-last strides. Omitted out_dtype: the dtype of the
// activations.
#include "common/stable.h"

STABLE_TORCH_LIBRARY(narrowcast, m) {
  // quantize: x [..., K] -> q int8 [..., K], scale float32 [...] (per token) or [..., K /
  // group_size]
  m.def("quantize_int8(Tensor x, int group_size=0, bool strict=False) -> (Tensor q, Tensor scale)");
  m.def(
      "quantize_int8_asymmetric(Tensor x, bool strict=False) -> (Tensor q, Tensor scale, Tensor "
      "zero_point)");
  m.def(
      "quantize_int8_static(Tensor x, float scale, int zero_point=0, ScalarType dtype=int8, bool "
      "strict=False) -> Tensor");
  m.def("nan_count(bool reset=False) -> int");

  // dequantize
  m.def(
      "dequantize_int8(Tensor q, Tensor scale, Tensor? zero_point=None, int group_size=0, "
      "ScalarType out_dtype=float) -> Tensor");
  m.def(
      "dequantize_groups(Tensor packed, Tensor scale, Tensor? offset, int group_size, int bits, "
      "ScalarType out_dtype=float) -> Tensor");
  m.def("dequantize_gguf(Tensor blocks, str type, ScalarType out_dtype=float) -> Tensor");

  // linear: y = post_activation(activation(x W^T + bias) + residual)
  m.def(
      "linear(Tensor x, Tensor weight, Tensor? bias=None, str activation=\"none\", Tensor? "
      "residual=None, ScalarType? out_dtype=None, *, str post_activation=\"none\") -> Tensor");
  m.def(
      "linear.out(Tensor x, Tensor weight, Tensor? bias=None, str activation=\"none\", Tensor? "
      "residual=None, *, str post_activation=\"none\", Tensor(a!) out) -> ()");
  m.def(
      "linear_int8(Tensor x_q, Tensor x_scale, Tensor w_q, Tensor w_scale, Tensor? bias=None, str "
      "activation=\"none\", Tensor? residual=None, ScalarType? out_dtype=None, Tensor? "
      "x_zero_point=None, *, int group_size=0, str post_activation=\"none\") -> Tensor");
  m.def(
      "linear_int8.out(Tensor x_q, Tensor x_scale, Tensor w_q, Tensor w_scale, Tensor? bias=None, "
      "str activation=\"none\", Tensor? residual=None, Tensor? x_zero_point=None, *, int "
      "group_size=0, str post_activation=\"none\", Tensor(a!) out) -> ()");
  m.def(
      "linear_int8_requantize(Tensor x_q, Tensor x_scale, Tensor w_q, Tensor w_scale, Tensor? "
      "bias, str activation, Tensor? residual, float out_scale, int out_zero_point=0, ScalarType "
      "out_dtype=int8, Tensor? x_zero_point=None, *, int group_size=0, str "
      "post_activation=\"none\") -> Tensor");
  m.def(
      "linear_dynamic_int8(Tensor x, Tensor w_q, Tensor w_scale, Tensor? bias=None, str "
      "activation=\"none\", Tensor? residual=None, ScalarType? out_dtype=None, *, int "
      "group_size=0, bool asymmetric=False, str post_activation=\"none\", bool strict=False) -> "
      "Tensor");
  m.def(
      "linear_dynamic_int8.out(Tensor x, Tensor w_q, Tensor w_scale, Tensor? bias=None, str "
      "activation=\"none\", Tensor? residual=None, *, int group_size=0, bool asymmetric=False, str "
      "post_activation=\"none\", bool strict=False, Tensor(a!) out) -> ()");
  // Weights packed once for this CPU: what nc.nn.LinearInt8 and nc.nn.Linear call.
  m.def("_linear_pack(Tensor weight) -> Tensor");
  m.def(
      "_linear_packed(Tensor x, Tensor packed, int out_features, Tensor? bias=None, str "
      "activation=\"none\", Tensor? residual=None, ScalarType? out_dtype=None, *, str "
      "post_activation=\"none\") -> Tensor");
  m.def("_linear_int8_pack(Tensor w_q) -> Tensor");
  m.def(
      "_linear_dynamic_int8_packed(Tensor x, Tensor packed, int out_features, Tensor w_scale, "
      "Tensor? bias=None, str activation=\"none\", Tensor? residual=None, ScalarType? "
      "out_dtype=None, *, int group_size=0, bool asymmetric=False, str post_activation=\"none\", "
      "bool strict=False) -> Tensor");
  m.def(
      "linear_grouped(Tensor x, Tensor packed, Tensor scale, Tensor? offset, int group_size, int "
      "bits, Tensor? bias=None, str activation=\"none\", Tensor? residual=None, ScalarType? "
      "out_dtype=None, *, int activation_bits=16, str post_activation=\"none\") -> Tensor");
  m.def(
      "linear_grouped.out(Tensor x, Tensor packed, Tensor scale, Tensor? offset, int group_size, "
      "int bits, Tensor? bias=None, str activation=\"none\", Tensor? residual=None, *, int "
      "activation_bits=16, str post_activation=\"none\", Tensor(a!) out) -> ()");

  // weights of linear_grouped in this CPU's order (linear_grouped.h), made once and used many times
  m.def(
      "_linear_grouped_pack(Tensor packed, Tensor scale, Tensor? offset, int group_size, int bits) "
      "-> Tensor");
  m.def(
      "_linear_grouped_packed(Tensor x, Tensor panels, int n, int group_size, int bits, bool half, "
      "bool has_offset, Tensor? bias=None, str activation=\"none\", Tensor? residual=None, "
      "ScalarType? out_dtype=None, *, int activation_bits=16, str post_activation=\"none\") -> "
      "Tensor");

  // attention: q [B, Hq, Sq, D], k and v [B, Hkv, Sk, D] -> [B, Hq, Sq, D]; packed: [T, H, D] with
  // cu_seqlens
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? bias=None, float? scale=None, bool "
      "causal=False, int window=0, float softcap=0.0, Tensor? cu_seqlens_q=None, Tensor? "
      "cu_seqlens_k=None, Tensor? sinks=None) -> Tensor");
  m.def(
      "attention.out(Tensor q, Tensor k, Tensor v, Tensor? bias=None, float? scale=None, bool "
      "causal=False, int window=0, float softcap=0.0, Tensor? cu_seqlens_q=None, Tensor? "
      "cu_seqlens_k=None, Tensor? sinks=None, *, Tensor(a!) out) -> ()");
  m.def(
      "attention_lse(Tensor q, Tensor k, Tensor v, Tensor? bias=None, float? scale=None, bool "
      "causal=False, int window=0, float softcap=0.0, Tensor? cu_seqlens_q=None, Tensor? "
      "cu_seqlens_k=None, Tensor? sinks=None) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_int8(Tensor q, Tensor k, Tensor v, Tensor? bias=None, float? scale=None, bool "
      "causal=False, int window=0, float softcap=0.0, Tensor? cu_seqlens_q=None, Tensor? "
      "cu_seqlens_k=None, Tensor? sinks=None) -> Tensor");

  // KV cache: [B, Hkv, capacity, D], or pages [P, Hkv, page, D] with block_table int32 [B, pages].
  // INT8 caches carry scales [B, Hkv, capacity] (pages: [P, Hkv, page]), one per token and head;
  // uint8 caches [.., D / 2] hold rotated 4-bit codes, with bfloat16 grids [.., D / 16] as their
  // scales.
  m.def(
      "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? "
      "k_scale=None, Tensor? v_scale=None, float? scale=None, int window=0, float softcap=0.0, "
      "Tensor? block_table=None, Tensor? sinks=None) -> Tensor");
  m.def(
      "attention_decode.out(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? "
      "k_scale=None, Tensor? v_scale=None, float? scale=None, int window=0, float softcap=0.0, "
      "Tensor? block_table=None, Tensor? sinks=None, *, Tensor(a!) out) -> ()");
  m.def(
      "kv_append(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor start, "
      "Tensor(c!)? k_scale=None, Tensor(d!)? v_scale=None, Tensor? cos=None, Tensor? sin=None, "
      "bool interleaved=False, Tensor? block_table=None, Tensor? k_shift=None) -> ()");

  // convolution and pooling
  m.def(
      "conv2d(Tensor x, Tensor weight, Tensor? bias=None, int[2] stride=[1,1], int[2] "
      "padding=[0,0], int[2] dilation=[1,1], int groups=1, str activation=\"none\", Tensor? "
      "residual=None, str post_activation=\"none\") -> Tensor");
  m.def(
      "conv2d_int8(Tensor x_q, float x_scale, int x_zero_point, Tensor w_q, Tensor w_scale, "
      "Tensor? bias=None, int[2] stride=[1,1], int[2] padding=[0,0], int[2] dilation=[1,1], int "
      "groups=1, str activation=\"none\", Tensor? residual=None, float residual_scale=1.0, int "
      "residual_zero_point=0, str post_activation=\"none\", float out_scale=0.0, int "
      "out_zero_point=0, ScalarType? out_dtype=None) -> Tensor");
  m.def(
      "conv2d_int8.out(Tensor x_q, float x_scale, int x_zero_point, Tensor w_q, Tensor w_scale, "
      "Tensor? bias=None, int[2] stride=[1,1], int[2] padding=[0,0], int[2] dilation=[1,1], int "
      "groups=1, str activation=\"none\", Tensor? residual=None, float residual_scale=1.0, int "
      "residual_zero_point=0, str post_activation=\"none\", float out_scale=0.0, int "
      "out_zero_point=0, *, Tensor(a!) out) -> ()");
  m.def(
      "max_pool2d_int8(Tensor x_q, int[2] kernel_size, int[2] stride, int[2] padding=[0,0], int[2] "
      "dilation=[1,1], bool ceil_mode=False) -> Tensor");
  m.def(
      "avg_pool2d_int8(Tensor x_q, float x_scale, int x_zero_point, int[] kernel_size=[], int[] "
      "stride=[], int[2] padding=[0,0], float out_scale=0.0, int out_zero_point=0, ScalarType? "
      "out_dtype=None) -> Tensor");

  // norms over the last dimension; add_*: of x + residual, which is returned as well
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("rms_norm.out(Tensor x, Tensor weight, float eps, *, Tensor(a!) out) -> ()");
  m.def(
      "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor y, Tensor "
      "sum)");
  m.def(
      "rms_norm_int8(Tensor x, Tensor weight, float eps, int group_size=0) -> (Tensor q, Tensor "
      "scale)");
  m.def(
      "add_rms_norm_int8(Tensor x, Tensor residual, Tensor weight, float eps, int group_size=0) -> "
      "(Tensor q, Tensor scale, Tensor sum)");
  m.def("layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor");
  m.def(
      "layer_norm.out(Tensor x, Tensor? weight, Tensor? bias, float eps, *, Tensor(a!) out) -> ()");
  m.def(
      "add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps) -> "
      "(Tensor y, Tensor sum)");
  m.def(
      "layer_norm_int8(Tensor x, Tensor? weight, Tensor? bias, float eps, int group_size=0) -> "
      "(Tensor q, Tensor scale)");
  m.def(
      "add_layer_norm_int8(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, int "
      "group_size=0) -> (Tensor q, Tensor scale, Tensor y)");

  // rope: x [B, H, S, D], tables [positions, rotated / 2]; positions int32 or int64: [B] first, or
  // [B, S] each
  m.def(
      "rope(Tensor x, Tensor cos, Tensor sin, Tensor? positions=None, bool interleaved=False) -> "
      "Tensor");

  // gated activations: act(gate) * up
  m.def("silu_mul(Tensor gate, Tensor up) -> Tensor");
  m.def("silu_mul.out(Tensor gate, Tensor up, *, Tensor(a!) out) -> ()");
  m.def("silu_mul_int8(Tensor gate, Tensor up, int group_size=0) -> (Tensor q, Tensor scale)");
  m.def("gelu_mul(Tensor gate, Tensor up, str approximate=\"none\") -> Tensor");
  m.def("gelu_mul.out(Tensor gate, Tensor up, str approximate=\"none\", *, Tensor(a!) out) -> ()");
  m.def(
      "gelu_mul_int8(Tensor gate, Tensor up, str approximate=\"none\", int group_size=0) -> "
      "(Tensor q, Tensor scale)");

  // compiled CUDA kernels, which the public ops may choose; findings int64 [2]: NaNs, values not
  // finite
  m.def(
      "_quantize_int8_cuda(Tensor x, int group_size, Tensor(a!) findings) -> (Tensor q, Tensor "
      "scale)");
  m.def(
      "_quantize_int8_asymmetric_cuda(Tensor x, Tensor(a!) findings) -> (Tensor q, Tensor scale, "
      "Tensor zero_point)");
  m.def(
      "_quantize_int8_static_cuda(Tensor x, float scale, int zero_point, ScalarType dtype, "
      "Tensor(a!) findings) -> Tensor");
  m.def(
      "_linear_int8_cuda(Tensor x_q, Tensor x_scale, Tensor w_q, Tensor w_scale, Tensor? bias, str "
      "activation, Tensor? residual, ScalarType? out_dtype, Tensor? x_zero_point, int group_size, "
      "str post_activation) -> Tensor");
  m.def(
      "_linear_int8_requantize_cuda(Tensor x_q, Tensor x_scale, Tensor w_q, Tensor w_scale, "
      "Tensor? bias, str activation, Tensor? residual, float out_scale, int out_zero_point, "
      "ScalarType out_dtype, Tensor? x_zero_point, int group_size, str post_activation) -> Tensor");
  m.def(
      "_linear_grouped_cuda(Tensor x, Tensor packed, Tensor scale, Tensor? offset, int group_size, "
      "int bits, Tensor? bias, str activation, Tensor? residual, ScalarType? out_dtype, str "
      "post_activation) -> Tensor");
  m.def(
      "_attention_cuda(Tensor q, Tensor k, Tensor v, Tensor? bias, float? scale, bool causal, "
      "int window, float softcap, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? sinks) -> "
      "Tensor");
  m.def(
      "_attention_lse_cuda(Tensor q, Tensor k, Tensor v, Tensor? bias, float? scale, bool "
      "causal, int window, float softcap, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? "
      "sinks) -> (Tensor out, Tensor lse)");
  m.def(
      "_attention_int8_cuda(Tensor q, Tensor k, Tensor v, Tensor? bias, float? scale, bool causal, "
      "int window, float softcap, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? sinks) -> "
      "Tensor");
  m.def(
      "_attention_decode_cuda(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? "
      "k_scale, Tensor? v_scale, float? scale, int window, float softcap, Tensor? block_table, "
      "Tensor? sinks) -> Tensor");
  m.def(
      "_conv2d_int8_cuda(Tensor x_q, float x_scale, int x_zero_point, Tensor w_q, Tensor w_scale, "
      "Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, int groups, str activation, "
      "Tensor? residual, float residual_scale, int residual_zero_point, str post_activation, float "
      "out_scale, int out_zero_point, ScalarType? out_dtype) -> Tensor");
  m.def("_rms_norm_cuda(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def(
      "_add_rms_norm_cuda(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor y, "
      "Tensor "
      "sum)");
  m.def(
      "_rms_norm_int8_cuda(Tensor x, Tensor weight, float eps, int group_size, Tensor(a!) "
      "findings) "
      "-> (Tensor q, Tensor scale)");
  m.def(
      "_add_rms_norm_int8_cuda(Tensor x, Tensor residual, Tensor weight, float eps, int "
      "group_size, "
      "Tensor(a!) findings) -> (Tensor q, Tensor scale, Tensor sum)");
  m.def("_layer_norm_cuda(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor");
  m.def(
      "_add_layer_norm_cuda(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps) -> "
      "(Tensor y, Tensor sum)");
  m.def(
      "_layer_norm_int8_cuda(Tensor x, Tensor? weight, Tensor? bias, float eps, int group_size, "
      "Tensor(a!) findings) -> (Tensor q, Tensor scale)");
  m.def(
      "_add_layer_norm_int8_cuda(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float "
      "eps, "
      "int group_size, Tensor(a!) findings) -> (Tensor q, Tensor scale, Tensor y)");

  // the machinery: which kernels exist, and forcing one (tests and benchmarks)
  m.def("_op_variants(str op) -> str");
  m.def("_force_variant(str op, str variant) -> ()");
  m.def("_cap_isa(str isa) -> ()");
  m.def("_isa() -> str");
}
