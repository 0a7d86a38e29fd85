"""rope in Triton: one program for a few vectors (formula: rope.h).

A position outside the tables makes its vectors NaN: an error would have to wait for the GPU. Bound by memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import checks
from ..common.triton_util import ahead, launch, next_power_of_2


@triton.jit
def _rope(
    x, out, cos, sin, positions, vectors, heads, length, depth, half, table_rows,
    stride_batch, stride_head, stride_length, positions_batch, positions_length,
    EACH: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    """EACH: positions [B, S] rather than the first of each sequence. REST: columns that pass through, rounded up."""
    vector = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    in_vectors = vector < vectors
    step = vector % length
    batch = vector // length // heads
    source = x + batch * stride_batch + vector // length % heads * stride_head + step * stride_length
    target = out + vector * depth
    position = step
    if positions is not None:
        at = positions + batch * positions_batch
        if EACH:
            position = tl.load(at + step * positions_length, mask=in_vectors, other=0).to(tl.int64)
        else:
            position += tl.load(at, mask=in_vectors, other=0).to(tl.int64)
    i = tl.arange(0, HALF)[None, :]
    inside = in_vectors[:, None] & (i < half)
    known = inside & ((position >= 0) & (position < table_rows))[:, None]
    entry = position[:, None] * half + i
    c = tl.load(cos + entry, mask=known, other=float("nan")).to(tl.float32)
    s = tl.load(sin + entry, mask=known, other=float("nan")).to(tl.float32)
    if INTERLEAVED:
        first, second = 2 * i, 2 * i + 1
    else:
        first, second = i, i + half
    a = tl.load(source[:, None] + first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source[:, None] + second, mask=inside, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    tl.store(target[:, None] + first, (a * c - b * s).to(kind), mask=inside)
    tl.store(target[:, None] + second, (b * c + a * s).to(kind), mask=inside)
    if REST > 0:
        column = 2 * half + tl.arange(0, REST)[None, :]
        rest = in_vectors[:, None] & (column < depth)
        tl.store(target[:, None] + column, tl.load(source[:, None] + column, mask=rest), mask=rest)


def _check(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> None:
    op = "rope"
    checks.require(
        x.dtype in checks.FLOATING and x.dim() == 4,
        op,
        f"x must be float32, float16 or bfloat16 [B, H, S, D], got {checks.describe(x)}",
    )
    batch, _, length, depth = x.shape
    checks.require(
        cos.dtype in checks.FLOATING and cos.dim() == 2 and 2 * cos.shape[1] <= depth,
        op,
        f"cos must be float32, float16 or bfloat16 [positions, R / 2] with R <= D = {depth}, got {checks.describe(cos)}",
    )
    checks.require(
        sin.dtype == cos.dtype and sin.shape == cos.shape,
        op,
        f"sin must have the dtype and shape of cos, {checks.describe(cos)}, got {checks.describe(sin)}",
    )
    for argument, t in (("cos", cos), ("sin", sin), ("positions", positions)):
        if t is not None:
            checks.require_device(op, argument, t, x.device)
    if positions is None:
        checks.require(
            length <= cos.shape[0],
            op,
            f"cos must have a row for each of the {length} positions of x, got {cos.shape[0]}",
        )
        return
    checks.require(
        positions.dtype in (torch.int32, torch.int64)
        and tuple(positions.shape) in ((batch,), (batch, length)),
        op,
        f"positions must be int32 or int64 [B] or [B, S] with B = {batch}, S = {length}, "
        f"got {checks.describe(positions)}",
    )


def rope(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, interleaved: bool = False
) -> Tensor:
    _check(x, cos, sin, positions)
    out = x.new_empty(x.shape)
    if x.numel() == 0:
        return out
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    _, heads, length, depth = x.shape
    half, vectors = cos.shape[1], x.numel() // depth
    block = next_power_of_2(max(half, 1))
    per_program = max(1, min(32, 1024 // block))
    launch(
        _rope, (triton.cdiv(vectors, per_program),),
        x, out, cos, sin, positions, vectors, heads, length, depth, half, cos.shape[0],
        x.stride(0), x.stride(1), x.stride(2),
        positions.stride(0) if positions is not None else 0,
        positions.stride(1) if positions is not None and positions.dim() == 2 else 0,
        on=x, EACH=positions is not None and positions.dim() == 2, INTERLEAVED=interleaved,
        ROWS=per_program, HALF=block, REST=next_power_of_2(depth - 2 * half) if depth > 2 * half else 0,
    )  # fmt: skip
    return out


def _ahead(dtype: str, half: int, positions: str | None, interleaved: bool = False, rest: int = 0):
    arguments = {
        "x": dtype, "out": dtype, "cos": "*fp32", "sin": "*fp32", "positions": positions, "vectors": "i32",
        "heads": "i32", "length": "i32", "depth": "i32:16", "half": "i32:16", "table_rows": "i32",
        "stride_batch": "i32:16", "stride_head": "i32:16", "stride_length": "i32:16",
        "positions_batch": "i32", "positions_length": "i32", "EACH": positions == "*i64",
        "INTERLEAVED": interleaved, "ROWS": 1024 // half, "HALF": half, "REST": rest,
    }  # fmt: skip
    return ahead(_rope, arguments, wide_loads=not interleaved)


AOT = [
    _ahead("*fp16", 64, "*i32"),
    _ahead("*bf16", 32, "*i64", rest=64),
    _ahead("*fp16", 64, None, interleaved=True),
]
