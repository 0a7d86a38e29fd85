"""Products in floating point with the epilogue fused.

torch.ops.narrowcast.linear(x, weight, bias, activation, residual, out_dtype, *, post_activation)

    y = post_activation(activation(x W^T + bias) + residual)

    x         float32, float16 or bfloat16 [..., K]
    weight    [N, K] of the same dtype
    bias      [N], residual [..., N]: float32, float16 or bfloat16
    out_dtype float32, float16 or bfloat16; that of x when left out
    activation, post_activation: none, relu, relu6, hardswish, silu, gelu, gelu_tanh

linear.out writes to a contiguous tensor that overlaps no input, except that it may be the residual.
Sums are float32 in every dtype. A wrong dtype, shape or option raises RuntimeError with the
argument's name. Numerics: linear.h.
"""
