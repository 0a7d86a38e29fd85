"""W8A8 products: int8 activations times int8 weights, exact in int32, scales and epilogue fused.

torch.ops.narrowcast.linear_int8(x_q, x_scale, w_q, w_scale, bias, activation, residual, out_dtype,
                                 x_zero_point, *, group_size, post_activation)

    y = post_activation(activation(acc * x_scale * w_scale + bias) + residual)
    acc[..., n] = sum_k (x_q[..., k] - x_zero_point[...]) * w_q[n, k]

    x_q           int8 [..., K]
    x_scale       float32 [...] (per token), one number, or [..., K / group_size] when group_size > 0
    w_q, w_scale  int8 [N, K], float32 [N] or one number
    x_zero_point  int32, one per token; only with group_size 0
    bias          [N], residual [..., N]: float32, float16 or bfloat16
    group_size    0, or a multiple of 32 that divides K
    activation, post_activation: none, relu, relu6, hardswish, silu, gelu, gelu_tanh

linear_int8_requantize  the same, then int8 or uint8 by out_scale and out_zero_point.
linear_dynamic_int8     x in floating point, quantised inside as quantize_int8 (or, asymmetric,
                        quantize_int8_asymmetric) does; strict raises on NaN and infinities.
linear_int8.out, linear_dynamic_int8.out  write to a contiguous tensor that overlaps no input, except
                        that it may be the residual.

A wrong dtype, shape or option raises RuntimeError with the argument's name. Numerics: linear_int8.h.
Weights used more than once are best held by :class:`narrowcast.nn.LinearInt8`, which packs them once.
"""
