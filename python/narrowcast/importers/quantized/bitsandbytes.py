"""bitsandbytes: NF4 and FP4 (values from a table), and int8 rows.

``w[i] = quant_map[code[i]] * absmax[i // blocksize]``, i along the flattened weight; a nested absmax is
``nested_quant_map[absmax] * nested_absmax[block // nested_blocksize] + nested_offset``.

==========================================  =====================================================
weight                                      uint8, two codes a byte, the first in the high nibble
weight.absmax                               float32 [blocks], or uint8 [blocks] if nested
weight.quant_map                            float32 [16]
weight.nested_absmax, .nested_quant_map     float32 [blocks / nested_blocksize], float32 [256]
weight.quant_state.bitsandbytes__nf4        uint8, a JSON object: blocksize, shape, nested_blocksize ...
==========================================  =====================================================

int8: ``w[n, k] = weight[n, k] * SCB[n] / 127``, weight int8 [N, K].

Layout: bitsandbytes (functional.py QuantState, nn/modules.py). No integer kernel holds values of a table: such
weights are read as floats.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from narrowcast.errors import FormatError, UnsupportedError
from narrowcast.formats import GroupedWeight

from .checkpoint import Checkpoint, Settings, integers, parse_json
from .codes import check, with_zeros

_STATES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
_PARTS = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", *_STATES)


def read(tensors: Checkpoint, settings: Settings) -> tuple[dict[str, GroupedWeight | Tensor], set[str]]:
    """Parameter name -> weight, and the names of the tensors that were read for them."""
    weights: dict[str, GroupedWeight | Tensor] = {}
    used: set[str] = set()
    for name in tensors:
        for state in _STATES:
            if name.endswith(state):
                weight = name.removesuffix(state)
                weights[weight] = _table(tensors, weight, name)
                used |= {weight + part for part in _PARTS}
        if name.endswith(".SCB"):
            module = name.removesuffix(".SCB")
            weights[f"{module}.weight"] = _int8(tensors, module)
            used |= {f"{module}.{part}" for part in ("weight", "SCB", "weight_format")}
    return weights, used


def _table(tensors: Checkpoint, name: str, state_name: str) -> Tensor:
    raw = tensors[state_name]
    if raw.dtype != torch.uint8 or raw.numel() > 1 << 16:
        raise FormatError(f"{state_name} must be bytes of JSON")
    state = Settings(parse_json(bytes(raw.flatten().tolist()), state_name), state_name)
    shape = state.values.get("shape")
    if not integers(shape, 1 << 31) or not 1 <= len(shape) <= 4 or 0 in shape:
        raise FormatError(f"{state_name}: the shape is {shape!r}")
    count, block = math.prod(shape), state.integer("blocksize", low=1)
    # Some files keep the bytes in words of another type.
    packed = tensors.need(name).contiguous().flatten().view(torch.uint8)
    if packed.numel() != (count + 1) // 2:
        raise FormatError(f"{name} has {packed.numel()} bytes, the shape {shape} needs {(count + 1) // 2}")
    blocks = -(-count // block)
    absmax = tensors.need(f"{name}.absmax")
    if f"{name}.nested_absmax" in tensors:
        absmax = _nested(tensors, name, absmax, blocks, state)
    check(absmax, (torch.float32,), (blocks,), f"{name}.absmax")
    table = check(tensors.need(f"{name}.quant_map"), (torch.float32,), (16,), f"{name}.quant_map")
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).flatten()[:count]
    values = table[codes.long()]
    if count % block == 0:
        return (values.view(blocks, block) * absmax[:, None]).reshape(shape)
    return (values * absmax.repeat_interleave(block)[:count]).reshape(shape)


def _nested(tensors: Checkpoint, name: str, absmax: Tensor, blocks: int, state: Settings) -> Tensor:
    check(absmax, (torch.uint8,), (blocks,), f"{name}.absmax")
    size = state.integer("nested_blocksize", low=1)
    offset = state.values.get("nested_offset")
    if not isinstance(offset, int | float):
        raise FormatError(f"{state.name}: nested_offset must be a number, got {offset!r}")
    table = tensors.need(f"{name}.nested_quant_map")
    check(table, (torch.float32,), (256,), f"{name}.nested_quant_map")
    outer = tensors[f"{name}.nested_absmax"]
    check(outer, (torch.float32,), (-(-blocks // size),), f"{name}.nested_absmax")
    values = table[absmax.long()] * outer[torch.arange(blocks) // size]
    return values + torch.tensor(float(offset))


def _int8(tensors: Checkpoint, module: str) -> GroupedWeight:
    codes = tensors.need(f"{module}.weight")
    if codes.dim() != 2 or 0 in codes.shape:
        raise FormatError(f"{module}.weight must be a matrix, got {list(codes.shape)}")
    check(codes, (torch.int8,), tuple(codes.shape), f"{module}.weight")
    scale = tensors[f"{module}.SCB"]
    check(scale, (torch.float32,), (codes.shape[0],), f"{module}.SCB")
    order = tensors.get(f"{module}.weight_format")
    if order is not None and (order.numel() != 1 or int(order) != 0):
        raise UnsupportedError(f"{module}: the weight must lie in rows, not in the tiles of a GPU")
    # Rows with float inputs: the package itself keeps the large ones of these in float.
    return with_zeros(codes, scale[:, None] / 127, 0, 8, codes.shape[1])
