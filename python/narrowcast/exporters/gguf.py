"""Weights as GGUF blocks of the types Q8_0, Q4_0 and Q4_1, which hold our forms byte for byte.

The inverse of ``formats.from_gguf``. Files are written by the package ``gguf``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from narrowcast.errors import ArgumentError, UnsupportedError
from narrowcast.files import atomic_path
from narrowcast.formats import GroupedWeight, unpack_int4

BLOCK = 32


def write_gguf(
    path: str | Path,
    weights: Mapping[str, Tensor | GroupedWeight],
    architecture: str,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes one file.

    weights: tensor name -> a float32 or float16 tensor, or a :class:`GroupedWeight`. architecture: "llama" ...;
    metadata: further keys, values int, float, bool, str or a list of one of them.

    Raises UnsupportedError for a weight that no block type holds exactly.
    """
    try:
        import gguf
    except ImportError:
        raise UnsupportedError("a GGUF file needs the package gguf: pip install gguf") from None
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        for key, value in (metadata or {}).items():
            _add(writer, key, value)
        for name, weight in weights.items():
            if isinstance(weight, Tensor):
                if weight.dtype not in (torch.float32, torch.float16):
                    raise ArgumentError(f"weights must be float32 or float16, {name!r} is {weight.dtype}")
                writer.add_tensor(name, weight.detach().contiguous().numpy())
                continue
            kind, blocks = to_gguf(weight, name)
            writer.add_tensor(name, blocks.numpy(), raw_dtype=gguf.GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def to_gguf(weight: GroupedWeight, name: str = "weight") -> tuple[str, Tensor]:
    """The block type that holds a weight exactly, and its blocks, uint8 [N, bytes of a row].

    Groups may be any multiple of 32; a float32 scale or offset must be one that float16 holds.
    """
    rows, columns = weight.shape
    if weight.columns is not None or weight.group_size % BLOCK:
        raise UnsupportedError(f"{name}: GGUF takes groups of 32 in the order of the inputs")
    if weight.bits == 8 and weight.offset is not None:
        raise UnsupportedError(f"{name}: no GGUF type holds 8-bit codes with an offset")
    halves = []
    for t in (weight.scale, weight.offset):
        if t is not None:
            half = t.half()
            if not torch.equal(half.to(t.dtype), t):
                raise UnsupportedError(f"{name}: GGUF scales and minima are float16, these would be rounded")
            half = half.repeat_interleave(weight.group_size // BLOCK, 1)
            halves.append(half.unsqueeze(-1).contiguous().view(torch.uint8))
    packed = weight.packed.view(rows, columns // BLOCK, -1)
    if weight.bits == 4:
        codes = unpack_int4(packed)
        packed = codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4
    kind = "Q8_0" if weight.bits == 8 else "Q4_0" if weight.offset is None else "Q4_1"
    return kind, torch.cat((*halves, packed), dim=-1).flatten(1)


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        (writer.add_uint32 if 0 <= value < 1 << 32 else writer.add_int64)(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        raise ArgumentError(f"metadata must be numbers, texts or lists, {key!r} is {type(value).__name__}")
