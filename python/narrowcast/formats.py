"""Quantised weights as tensors: the one place that knows how they are packed.

:class:`GroupedWeight` is the canonical layout of ``dequantize_groups`` and ``linear_grouped``;
:class:`Int8Weight` that of ``linear_int8``. Both are rows of output features, so that layers merge
and rows permute without unpacking. :func:`from_gguf` reads the GGUF block types, all of which map onto
the first one exactly; ``importers/quantized`` reads the formats of other tools.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ArgumentError, FormatError, UnsupportedError

#: GGUF type: (elements, bytes) of one block.
GGUF_BLOCKS = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}

#: GGUF types that :func:`from_gguf` takes over bit for bit: (bits here, group size).
GGUF_GROUPED = {
    "Q4_0": (4, 32),
    "Q4_1": (4, 32),
    "Q5_0": (8, 32),
    "Q5_1": (8, 32),
    "Q8_0": (8, 32),
    "Q4_K": (4, 32),
    "Q5_K": (8, 32),
    "Q6_K": (8, 16),
}

_SCALE_DTYPES = (torch.float32, torch.float16)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ArgumentError(message)


def _text(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"


def pack_int4(codes: Tensor) -> Tensor:
    """uint8 codes 0..15 [..., K] -> [..., K / 2], the low nibble at even k. K must be even."""
    _require(codes.dtype == torch.uint8, f"codes must be uint8, got {_text(codes)}")
    _require(codes.shape[-1] % 2 == 0, f"codes must have an even last size, got {_text(codes)}")
    return (codes[..., ::2] & 15) | (codes[..., 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """uint8 [..., K / 2] -> codes 0..15, uint8 [..., K]. Inverse of :func:`pack_int4`."""
    _require(packed.dtype == torch.uint8, f"packed must be uint8, got {_text(packed)}")
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


@dataclass(frozen=True, eq=False)
class GroupedWeight:
    """A matrix [N, K] in int4 or int8 with a scale, and optionally an offset, per group along K.

    ``w[n, k] = q[n, k] * scale[n, k // group_size] + offset[n, k // group_size]``; without offset,
    int4 codes are centred on 8 and int8 codes on 0.

    bits: 4 or 8.
    group_size: divides K; even for 4 bits.
    packed: uint8 [N, K * bits / 8]; 4 bits: low nibble at even k; 8 bits: int8 viewed as uint8.
    scale: float32 or float16 [N, K / group_size], any sign.
    offset: like scale, in real units (a GGUF minimum, or -zero * scale), or None.
    columns: int64 [K], a permutation, or None: what is kept at k belongs to the input ``columns[k]`` (files whose
        groups are scattered over the inputs); a layer then takes ``x[..., columns]``.
    """

    bits: int
    group_size: int
    packed: Tensor
    scale: Tensor
    offset: Tensor | None = None
    columns: Tensor | None = None

    def __post_init__(self) -> None:
        packed, scale, offset = self.packed, self.scale, self.offset
        _require(self.bits in (4, 8), f"bits must be 4 or 8, got {self.bits}")
        _require(
            packed.dtype == torch.uint8 and packed.dim() == 2,
            f"packed must be uint8 [N, K * bits / 8], got {_text(packed)}",
        )
        n, k = self.shape
        _require(
            self.group_size > 0 and k % self.group_size == 0 and (self.bits == 8 or self.group_size % 2 == 0),
            f"group_size must be positive, even for 4 bits, and divide K = {k}, got {self.group_size}",
        )
        expected = (n, k // self.group_size)
        _require(
            scale.dtype in _SCALE_DTYPES and tuple(scale.shape) == expected,
            f"scale must be float32 or float16 {list(expected)}, got {_text(scale)}",
        )
        _require(
            offset is None or (offset.dtype == scale.dtype and offset.shape == scale.shape),
            "offset must have the dtype and shape of scale, "
            f"{_text(scale)}, got {'' if offset is None else _text(offset)}",
        )
        columns = self.columns
        if columns is not None:
            _require(
                columns.dtype == torch.int64 and tuple(columns.shape) == (k,),
                f"columns must be int64 [{k}], got {_text(columns)}",
            )
            _require(
                torch.equal(columns.sort().values, torch.arange(k, device=columns.device)),
                "columns must be a permutation",
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.packed.shape[0], self.packed.shape[1] * 8 // self.bits

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, offsets and columns."""
        parts = (self.packed, self.scale, self.offset, self.columns)
        return sum(t.nbytes for t in parts if t is not None)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K] in float32, float16 or bfloat16, in the order of the inputs."""
        values = torch.ops.narrowcast.dequantize_groups(
            self.packed, self.scale, self.offset, self.group_size, self.bits, dtype
        )
        return values if self.columns is None else values[:, torch.argsort(self.columns)]

    def codes(self) -> Tensor:
        """The integers, in the order they are kept in: uint8 0..15 for 4 bits, int8 for 8 bits; [N, K]."""
        return unpack_int4(self.packed) if self.bits == 4 else self.packed.view(torch.int8)

    def rows(self, index: Tensor | slice) -> GroupedWeight:
        """The rows that ``index`` (an integer or bool tensor, or a slice) selects, in its order."""
        offset = None if self.offset is None else self.offset[index]
        return GroupedWeight(
            self.bits, self.group_size, self.packed[index], self.scale[index], offset, self.columns
        )

    def to(self, device: torch.device | str) -> GroupedWeight:
        """The same weight on another device."""
        offset = None if self.offset is None else self.offset.to(device)
        columns = None if self.columns is None else self.columns.to(device)
        return GroupedWeight(
            self.bits, self.group_size, self.packed.to(device), self.scale.to(device), offset, columns
        )

    @staticmethod
    def concatenate(parts: Sequence[GroupedWeight]) -> GroupedWeight:
        """Stacks layers that share their input: [N1 + N2 + ..., K].

        Values stay the same bit for bit. A part without offset gets its implied one when another
        part has one; float16 scales become float32 when the parts differ.

        Raises ArgumentError when bits, group size, K or columns differ.
        """
        _require(len(parts) > 0, "parts must not be empty")
        first = parts[0]
        for p in parts[1:]:
            same = (p.bits, p.group_size, p.shape[1]) == (
                first.bits,
                first.group_size,
                first.shape[1],
            )
            _require(
                same,
                f"parts must share bits, group_size and K = ({first.bits}, {first.group_size}, "
                f"{first.shape[1]}), got ({p.bits}, {p.group_size}, {p.shape[1]})",
            )
            _require(p.same_columns(first), "parts must share columns")
        dtypes = {p.scale.dtype for p in parts}
        with_offset = any(p.offset is not None for p in parts)
        if with_offset and first.bits == 4 and any(p.offset is None for p in parts):
            dtypes.add(torch.float32)  # -8 * scale can leave the range of float16
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32

        def offset(p: GroupedWeight) -> Tensor:
            if p.offset is not None:
                return p.offset.to(dtype)
            scale = p.scale.to(dtype)
            return -8 * scale if p.bits == 4 else torch.zeros_like(scale)

        return GroupedWeight(
            first.bits,
            first.group_size,
            torch.cat([p.packed for p in parts]),
            torch.cat([p.scale.to(dtype) for p in parts]),
            torch.cat([offset(p) for p in parts]) if with_offset else None,
            first.columns,
        )

    def same_columns(self, other: GroupedWeight) -> bool:
        """Whether both take their inputs in one order."""
        if self.columns is None or other.columns is None:
            return self.columns is other.columns
        return torch.equal(self.columns, other.columns)


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """A matrix [N, K] in int8 with one scale per row: ``w[n, k] = q[n, k] * scale[n]``.

    q: int8 [N, K].
    scale: float32 [N].
    """

    q: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        q, scale = self.q, self.scale
        _require(q.dtype == torch.int8 and q.dim() == 2, f"q must be int8 [N, K], got {_text(q)}")
        _require(
            scale.dtype == torch.float32 and tuple(scale.shape) == (q.shape[0],),
            f"scale must be float32 [{q.shape[0]}], got {_text(scale)}",
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.q.shape[0], self.q.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.q.nbytes + self.scale.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K] in float32, float16 or bfloat16."""
        return (self.q.float() * self.scale[:, None]).to(dtype)

    def rows(self, index: Tensor | slice) -> Int8Weight:
        """The rows that ``index`` (an integer or bool tensor, or a slice) selects, in its order."""
        return Int8Weight(self.q[index], self.scale[index])

    def to(self, device: torch.device | str) -> Int8Weight:
        """The same weight on another device."""
        return Int8Weight(self.q.to(device), self.scale.to(device))

    @staticmethod
    def concatenate(parts: Sequence[Int8Weight]) -> Int8Weight:
        """Stacks layers that share their input: [N1 + N2 + ..., K]. Raises when K differs."""
        _require(len(parts) > 0, "parts must not be empty")
        k = parts[0].shape[1]
        for p in parts:
            _require(p.shape[1] == k, f"parts must share K = {k}, got {p.shape[1]}")
        return Int8Weight(torch.cat([p.q for p in parts]), torch.cat([p.scale for p in parts]))


def gguf_columns(blocks: Tensor, type: str) -> int:
    """Elements in a row of GGUF blocks. Raises FormatError when a block is cut off."""
    if type not in GGUF_BLOCKS:
        raise UnsupportedError(f"type must be one of {', '.join(GGUF_BLOCKS)}, got {type!r}")
    elements, size = GGUF_BLOCKS[type]
    if blocks.dtype != torch.uint8 or blocks.dim() == 0:
        raise ArgumentError(f"blocks must be uint8 [..., bytes], got {_text(blocks)}")
    if blocks.shape[-1] % size:
        raise FormatError(f"a {type} row must be a multiple of {size} bytes, got {blocks.shape[-1]}")
    return blocks.shape[-1] // size * elements


def from_gguf(blocks: Tensor, type: str) -> GroupedWeight:
    """Takes GGUF blocks over without rounding anything.

    blocks: uint8 [N, bytes of a row].
    type: a key of ``GGUF_GROUPED``. Q4_0, Q4_1 and Q8_0 keep their bytes and float16 scales; codes of 5 and 6
        bits take 8. The scale of a group in a block of 256 (d * sc, dmin * m) becomes a float32, which holds it
        exactly.

    Raises UnsupportedError for another type, FormatError for a truncated row.
    Layout: ggml-common.h of ggml.
    """
    if type not in GGUF_GROUPED:
        raise UnsupportedError(
            f"type must be one of {', '.join(GGUF_GROUPED)} to be exact, got {type!r}; "
            "dequantize_gguf reads the others"
        )
    if blocks.dim() != 2:
        raise ArgumentError(f"blocks must be uint8 [N, bytes], got {_text(blocks)}")
    columns = gguf_columns(blocks, type)
    n, (elements, size) = blocks.shape[0], GGUF_BLOCKS[type]
    read = _gguf_32 if elements == 32 else _gguf_256
    codes, scale, minimum = read(blocks.reshape(n, columns // elements, size), type)
    bits, group = GGUF_GROUPED[type]
    packed = pack_int4(codes.flatten(1)) if bits == 4 else codes.flatten(1).view(torch.uint8)
    offset = None if minimum is None else minimum.flatten(1)
    return GroupedWeight(bits, group, packed.contiguous(), scale.flatten(1), offset)


def _half(b: Tensor, first: int) -> Tensor:
    return b[..., first : first + 2].contiguous().view(torch.float16)


def _gguf_32(b: Tensor, type: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes [..., 32], scale [..., 1] and minimum: d, perhaps m, perhaps 32 fifth bits, codes."""
    scale, minimum = _half(b, 0), _half(b, 2) if type.endswith("_1") else None
    if type == "Q8_0":
        return b[..., 2:], scale, None
    # Elements 0..15 lie in the low nibbles, 16..31 in the high ones.
    codes = torch.cat((b[..., -16:] & 15, b[..., -16:] >> 4), dim=-1)
    if type.startswith("Q5"):
        fifth = b[..., -20:-16, None] >> torch.arange(8, dtype=torch.uint8)
        codes = codes | (fifth.flatten(-2) & 1) << 4
        if minimum is None:
            codes = codes - 16  # wraps around: two's complement
    return codes, scale, minimum


def _gguf_256(b: Tensor, type: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes [..., 256], scales and minima of their groups [..., 8 or 16]."""
    if type == "Q6_K":
        low, high = b[..., :128].unflatten(-1, (2, 64)), b[..., 128:192].unflatten(-1, (2, 32))
        low = torch.cat((low & 15, low >> 4), dim=-1)
        high = torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1)
        scale = b[..., 192:208].view(torch.int8).float() * _half(b, 208).float()
        return (low | high << 4) - 32, scale, None
    d, dmin, s = _half(b, 0).float(), _half(b, 2).float(), b[..., 4:16]
    top, middle, last = s[..., 0:4], s[..., 4:8], s[..., 8:12]
    scale = d * torch.cat((top & 63, last & 15 | top >> 6 << 4), dim=-1)
    minimum = dmin * torch.cat((middle & 63, last >> 4 | middle >> 6 << 4), dim=-1)
    # Of every 64 elements the first half lies in the low nibbles of 32 bytes.
    nibbles = b[..., -128:].unflatten(-1, (4, 1, 32))
    codes = torch.cat((nibbles & 15, nibbles >> 4), dim=-2)
    if type == "Q5_K":
        fifth = b[..., None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None]
        codes = codes | ((fifth & 1) << 4).unflatten(-2, (4, 2))
    return codes.flatten(-3), scale, -minimum
