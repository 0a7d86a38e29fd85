"""linear on GPUs: a persistent grid walks large tiles in strips that share their operands in L2.

The contract is linear.h. Products of float32 are float32 products, or three TF32 ones where
``torch.set_float32_matmul_precision`` asks for less than "highest".
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.checks import FLOATING, describe, name, require, require_activation, require_device, rows_of
from ..common.triton_tiles import float32_precision, gemm_config, gemm_configs, shape_class
from ..common.triton_util import ahead, finish, launch, multiprocessors, tile_of, tuned


@triton.jit
def _linear(
    x, w, bias, residual, out, M, N, K, ldx, ldw, ld_residual,
    ACTIVATION: tl.constexpr, POST_ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        ks = tl.arange(0, BLOCK_K)
        # Rows past the end are read as the last one and never stored: no masks in the loop.
        x_at = x + tl.minimum(m, M - 1)[:, None] * ldx + ks[None, :]
        w_at = w + tl.minimum(n, N - 1).to(tl.int64)[:, None] * ldw + ks[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            if EVEN_K:
                a = tl.load(x_at + k)
                b = tl.load(w_at + k)
            else:
                a = tl.load(x_at + k, mask=ks[None, :] < K - k, other=0.0)
                b = tl.load(w_at + k, mask=ks[None, :] < K - k, other=0.0)
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
        finish(
            acc, m, n, m < M, n < N, bias, residual, out, ld_residual, N, 1.0, 0, ACTIVATION, POST_ACTIVATION
        )  # fmt: skip


def check_epilogue(op, x, n, bias, activation, residual, out_dtype, post_activation) -> None:
    """What the linears of floating results share; x [..., K] and N are right."""
    require(
        bias is None or (bias.dtype in FLOATING and tuple(bias.shape) == (n,)), op,
        f"bias must be float32, float16 or bfloat16 [N] = [{n}], got {describe(bias)}",
    )  # fmt: skip
    shape = (*x.shape[:-1], n)
    require(
        residual is None or (residual.dtype in FLOATING and tuple(residual.shape) == shape), op,
        f"residual must be float32, float16 or bfloat16 {list(shape)}, got {describe(residual)}",
    )  # fmt: skip
    require(
        out_dtype in FLOATING, op, f"out_dtype must be float32, float16 or bfloat16, got {name(out_dtype)}"
    )
    require_activation(op, "activation", activation)
    require_activation(op, "post_activation", post_activation)
    for argument, t in (("bias", bias), ("residual", residual)):
        if t is not None:
            require_device(op, argument, t, x.device)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none",
    residual: Tensor | None = None, out_dtype: torch.dtype | None = None, *, post_activation: str = "none",
) -> Tensor:  # fmt: skip
    """``post_activation(activation(x W^T + bias) + residual)``: the room's page has shapes and errors."""
    op = "linear"
    require(
        x.dtype in FLOATING and x.dim() >= 1, op,
        f"x must be float32, float16 or bfloat16 [..., K], got {describe(x)}",
    )  # fmt: skip
    k = x.shape[-1]
    require(
        weight.dtype == x.dtype and weight.dim() == 2 and weight.shape[1] == k, op,
        f"weight must be {name(x.dtype)} [N, K] with K = {k} like x, got {describe(weight)}",
    )  # fmt: skip
    require_device(op, "weight", weight, x.device)
    n, out_dtype = weight.shape[0], out_dtype or x.dtype
    check_epilogue(op, x, n, bias, activation, residual, out_dtype, post_activation)
    out = x.new_empty((*x.shape[:-1], n), dtype=out_dtype)
    if out.numel() == 0:
        return out
    rows, w = rows_of(x), rows_of(weight)
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else rows_of(residual)
    m, size = rows.shape[0], x.element_size()

    def run(config):
        tiles = triton.cdiv(m, config["BLOCK_M"]) * triton.cdiv(n, config["BLOCK_N"])
        # Small tiles wait for memory: several of them to a multiprocessor.
        programs = min(tiles, multiprocessors(x)) if config["BLOCK_M"] >= 64 else tiles
        launch(
            _linear, (programs,),
            rows, w, bias, residual, out, m, n, k, rows.stride(0), w.stride(0),
            0 if residual is None else residual.stride(0),
            activation, post_activation, float32_precision(x.dtype), k % config["BLOCK_K"] == 0,
            on=x, enable_fp_fusion=True, **config.options(),
        )  # fmt: skip

    configs = gemm_configs(m, n, k, size, size, out.element_size(), x)
    tuned(_linear, (x.dtype, *shape_class(m, n, k)), configs, run, x)
    return out


def _ahead(dtype: str, config, even: bool = True, precision: str = "ieee", tensor_cores: bool = True):
    return ahead(
        _linear,
        {
            "x": f"*{dtype}", "w": f"*{dtype}", "bias": f"*{dtype}", "residual": f"*{dtype}", "out": f"*{dtype}",
            "M": "i32", "N": "i32:16", "K": "i32:16" if even else "i32", "ldx": "i32:16", "ldw": "i32:16",
            "ld_residual": "i32:16", "ACTIVATION": "gelu", "POST_ACTIVATION": "none", "PRECISION": precision,
            "EVEN_K": even,
        },
        config, tensor_cores=tensor_cores, fp_fusion=True,
    )  # fmt: skip


AOT = [
    _ahead("fp16", gemm_config(128, 128, 64, 8, 2, 2)),
    _ahead("bf16", gemm_config(16, 64, 128, 4, 2, 2)),
    _ahead("fp16", gemm_config(64, 64, 64, 4, 2, 2), even=False),
    _ahead("fp32", gemm_config(64, 64, 32, 4, 4, 4), tensor_cores=False),
    _ahead("fp32", gemm_config(64, 64, 32, 4, 4, 4), precision="tf32x3"),
]
