"""dequantize_gguf in Triton: a program takes a few blocks, as [blocks, parts of a block, elements of a part].

A part is what shares a scale, or a nibble's position. Layouts and formulas: dequantize_gguf.h. Blocks have odd sizes, so
their bytes are loaded one by one; neighbouring threads read neighbouring bytes. Bit-equal to every other backend.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import checks
from ..common.triton_util import ahead, launch

#: Type -> elements and bytes of a block.
_SIZES = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22),
    "Q5_1": (32, 24), "Q8_0": (32, 34), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
}  # fmt: skip
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@triton.jit
def _byte(at, inside):
    return tl.load(at, mask=inside, other=0).to(tl.int32)


@triton.jit
def _half(at, inside):
    bits = _byte(at, inside) | (_byte(at + 1, inside) << 8)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _blocks_of_32(
    blocks, out, count, BYTES: tl.constexpr, BITS: tl.constexpr, MINIMUM: tl.constexpr, TILE: tl.constexpr
):
    """Low nibbles are elements 0..15, high ones 16..31; bit e of four more bytes is bit 4 of element e."""
    block = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)[:, None, None]
    part = tl.arange(0, 2)[None, :, None]
    lane = tl.arange(0, 16)[None, None, :]
    element = part * 16 + lane
    inside = (block < count) & (element >= 0)
    start = blocks + block * BYTES
    d = _half(start, block < count)
    codes_at: tl.constexpr = BYTES - (32 if BITS == 8 else 16)
    if BITS == 8:
        code = _byte(start + codes_at + element, inside).to(tl.int8).to(tl.int32)
    else:
        code = _byte(start + codes_at + lane + 0 * part, inside) >> (part * 4) & 15
        if BITS == 5:
            high = _byte(start + (codes_at - 4) + element // 8, inside)
            code |= (high >> (element % 8) & 1) << 4
        if not MINIMUM:
            code -= 1 << (BITS - 1)
    w = d * code.to(tl.float32)
    if MINIMUM:
        w += _half(start + 2, block < count)
    tl.store(out + block * 32 + element, w.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _blocks_k(blocks, out, count, BYTES: tl.constexpr, FIVE: tl.constexpr, TILE: tl.constexpr):
    """Eight parts of 32, each with a 6-bit scale and minimum; parts 2 c and 2 c + 1 share 32 bytes of nibbles."""
    block = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)[:, None, None]
    part = tl.arange(0, 8)[None, :, None]
    lane = tl.arange(0, 32)[None, None, :]
    start = blocks + block * BYTES
    parts = (block < count) & (part >= 0)
    inside = parts & (lane >= 0)
    d, dmin = _half(start, block < count), _half(start + 2, block < count)
    pairs = start + 4
    own = _byte(pairs + part, parts)  # of part j: byte j
    other = _byte(pairs + tl.where(part < 4, part + 4, part - 4), parts)
    last = _byte(pairs + tl.where(part < 4, part, part + 4), parts)
    scale = tl.where(part < 4, own & 63, (last & 15) | (other >> 6) << 4)
    minimum = tl.where(part < 4, other & 63, (last >> 4) | (own >> 6) << 4)
    nibbles: tl.constexpr = 48 if FIVE else 16
    code = _byte(start + nibbles + part // 2 * 32 + lane, inside) >> (part % 2 * 4) & 15
    if FIVE:
        code |= (_byte(start + 16 + lane + 0 * part, inside) >> part & 1) << 4
    w = (d * scale.to(tl.float32)) * code.to(tl.float32) - dmin * minimum.to(tl.float32)
    tl.store(out + block * 256 + part * 32 + lane, w.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _blocks_q6(blocks, out, count, TILE: tl.constexpr):
    """Sixteen parts of 16 with an int8 scale; a byte of ql serves elements l and l + 64 of its half, one of qh four."""
    block = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)[:, None, None]
    part = tl.arange(0, 16)[None, :, None]
    lane = tl.arange(0, 16)[None, None, :]
    start = blocks + block * 210
    parts = (block < count) & (part >= 0)
    inside = parts & (lane >= 0)
    d = _half(start + 208, block < count)
    scale = _byte(start + 192 + part, parts).to(tl.int8).to(tl.float32)
    half, quarter, odd = part // 8, part % 8 // 2, part % 2
    low = _byte(start + half * 64 + quarter % 2 * 32 + odd * 16 + lane, inside) >> (quarter // 2 * 4) & 15
    high = _byte(start + 128 + half * 32 + odd * 16 + lane, inside) >> (quarter * 2) & 3
    code = (low | high << 4) - 32
    w = (d * scale) * code.to(tl.float32)
    tl.store(out + block * 256 + part * 16 + lane, w.to(out.dtype.element_ty), mask=inside)


_BITS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8}


def _plain(blocks: Tensor, type: str, out_dtype: torch.dtype) -> Tensor:
    kind = _PLAIN[type]
    if blocks.data_ptr() % kind.itemsize or blocks.storage_offset() % kind.itemsize:
        blocks = blocks.clone()
    return blocks.view(kind).to(out_dtype, copy=True)


def dequantize_gguf(blocks: Tensor, type: str, out_dtype: torch.dtype = torch.float32) -> Tensor:
    op = "dequantize_gguf"
    names = list(_SIZES)
    checks.require(type in _SIZES, op, f"type must be {', '.join(names[:-1])} or {names[-1]}, got '{type}'")
    elements, size = _SIZES[type]
    checks.require(
        blocks.dtype == torch.uint8 and blocks.dim() >= 1,
        op,
        f"blocks must be uint8 [..., bytes], got {checks.describe(blocks)}",
    )
    stored = blocks.shape[-1]
    checks.require(
        stored % size == 0,
        op,
        f"blocks must have a multiple of {size} bytes per row for type {type}, got {stored}",
    )
    checks.require_out_floating(op, out_dtype)
    blocks = blocks.contiguous()
    shape = (*blocks.shape[:-1], stored // size * elements)
    count = blocks.numel() // size
    if count == 0:
        return blocks.new_empty(shape, dtype=out_dtype)
    if type in _PLAIN:
        return _plain(blocks, type, out_dtype)
    out = blocks.new_empty(shape, dtype=out_dtype)
    if elements == 32:
        launch(
            _blocks_of_32, (triton.cdiv(count, 64),), blocks, out, count, on=blocks,
            BYTES=size, BITS=_BITS[type], MINIMUM=type.endswith("_1"), TILE=64,
        )  # fmt: skip
    elif type == "Q6_K":
        launch(_blocks_q6, (triton.cdiv(count, 8),), blocks, out, count, on=blocks, TILE=8)
    else:
        launch(
            _blocks_k, (triton.cdiv(count, 8),), blocks, out, count, on=blocks,
            BYTES=size, FIVE=type == "Q5_K", TILE=8,
        )  # fmt: skip
    return out


_POINTERS = {"blocks": "*u8", "out": "*fp16", "count": "i32"}
AOT = [
    *(
        ahead(
            _blocks_of_32,
            {**_POINTERS, "BYTES": _SIZES[t][1], "BITS": b, "MINIMUM": t[-1] == "1", "TILE": 64},
        )
        for t, b in _BITS.items()
    ),
    *(
        ahead(_blocks_k, {**_POINTERS, "BYTES": _SIZES[t][1], "FIVE": t == "Q5_K", "TILE": 8})
        for t in ("Q4_K", "Q5_K")
    ),
    ahead(_blocks_q6, {**_POINTERS, "TILE": 8}),
]
