"""torchao: tensor subclasses taken apart into plain tensors, their kind in the metadata of the file.

``_type`` of a weight names the layout; the parts of ``m.weight`` are ``m._weight_PART``:

============================  ===================================================================
Int8Tensor                    qdata int8 [N, K], scale [N, 1], zero_point: (q - zero_point) * scale
IntxUnpackedToInt8Tensor      the same with groups: scale, zero_point [N, K / g]
Int4Tensor                    qdata int8 [N, K/2], signed codes, the low nibble first; scale, zero_point
                              [K / g, N]: q * scale + zero_point
Int4TilePackedTo4dTensor      qdata int32 [N/8, K/128, 32, 4] in the order of a GPU's registers, scale_and_zero
                              [K / g, N, 2]: (q - 8) * scale + zero
============================  ===================================================================

Layout: torchao (prototype/safetensors, quantization/quantize_/workflows); the tiles are those of PyTorch's
_convert_weight_to_int4pack.
"""

from __future__ import annotations

import torch
from torch import Tensor

from narrowcast.errors import FormatError, UnsupportedError
from narrowcast.formats import GroupedWeight, Int8Weight, unpack_int4

from .checkpoint import Checkpoint, Settings, integers, parse_json
from .codes import FLOATS, check, with_minima, with_zeros

_TILE_N, _TILE_K = 8, 128


def read(tensors: Checkpoint, settings: Settings) -> tuple[dict[str, GroupedWeight | Int8Weight], set[str]]:
    """Parameter name -> weight, and the names of the tensors that were read for them."""
    if "tensor_names" not in tensors.metadata:
        raise UnsupportedError("a torchao checkpoint needs the metadata of its safetensors files")
    weights, used = {}, set()
    for name, text in tensors.metadata.items():
        module, _, parameter = name.rpartition(".")
        if not module or not text.startswith("{"):
            continue
        about = Settings(parse_json(text.encode(), f"the metadata of {name}"), f"the metadata of {name}")
        kind = about.text("_type", "")
        if kind == "Tensor":
            continue
        if kind not in _KINDS:
            raise UnsupportedError(
                f"{name}: the torchao kind must be one of {', '.join(_KINDS)}, got {kind!r}"
            )
        prefix = f"{module}._{parameter}_"
        if f"{prefix}act_pre_scale" in tensors:
            raise UnsupportedError(f"{name}: torchao weights with a scale of their inputs are not supported")
        weights[name] = _KINDS[kind](tensors, prefix, about.inner("_data"))
        used |= {key for key in tensors if key.startswith(prefix)}
    return weights, used


def _matrix(tensors: Checkpoint, name: str) -> Tensor:
    tensor = tensors.need(name)
    if tensor.dim() != 2 or 0 in tensor.shape:
        raise FormatError(f"{name} must be a matrix, got {list(tensor.shape)}")
    return tensor


def _block(about: Settings, columns: int) -> int:
    """The group size: block_size is [1, g]."""
    block = about.values.get("block_size")
    if not integers(block, 1 << 31) or len(block) != 2 or block[0] != 1:
        raise UnsupportedError(f"{about.name}: block_size must be [1, group size], got {block!r}")
    if block[1] < 1 or columns % block[1]:
        raise FormatError(f"{about.name}: groups of {block[1]} do not divide {columns} inputs")
    return block[1]


def _bytes(tensors: Checkpoint, prefix: str, about: Settings) -> GroupedWeight | Int8Weight:
    codes = _matrix(tensors, f"{prefix}qdata")
    check(codes, (torch.int8,), tuple(codes.shape), f"{prefix}qdata")
    rows, columns = codes.shape
    size = _block(about, columns)
    scale = tensors.need(f"{prefix}scale")
    if scale.dim() == 1 and size == columns:
        scale = scale[:, None]
    check(scale, FLOATS, (rows, columns // size), f"{prefix}scale")
    zero: Tensor | None = None
    if f"{prefix}zero_point" in tensors:
        zero = tensors[f"{prefix}zero_point"]
        if zero.numel() != scale.numel() or zero.dtype not in (torch.int8, *FLOATS):
            raise FormatError(f"{prefix}zero_point must be int8 or floats {list(scale.shape)}")
        zero = zero.reshape(scale.shape) if bool((zero != 0).any()) else None
    if zero is None and size == columns and _symmetric_int8_inputs(about):
        return Int8Weight(codes, scale[:, 0].float().contiguous())
    bits = 4 if _four_bits(about) and int(codes.min()) >= -8 and int(codes.max()) < 8 else 8
    if zero is not None and zero.is_floating_point():
        return with_minima(codes, scale, -zero.float() * scale.float(), 8, size)
    return with_zeros(codes, scale, 0 if zero is None else zero, bits, size)


def _four_bits(about: Settings) -> bool:
    if not about.has("target_dtype"):
        return False
    return about.inner("target_dtype").text("_data", "") in ("int1", "int2", "int3", "int4")


def _symmetric_int8_inputs(about: Settings) -> bool:
    if not about.has("act_quant_kwargs"):
        return False
    inputs = about.inner("act_quant_kwargs").inner("_data")
    kind = inputs.inner("mapping_type") if inputs.has("mapping_type") else None
    return kind is None or kind.text("_data", "") == "SYMMETRIC"


def _nibbles(tensors: Checkpoint, prefix: str, about: Settings) -> GroupedWeight:
    packed = _matrix(tensors, f"{prefix}qdata")
    check(packed, (torch.int8, torch.uint8), tuple(packed.shape), f"{prefix}qdata")
    rows, columns = packed.shape[0], packed.shape[1] * 2
    groups = (columns // _block(about, columns), rows)
    scale = check(tensors.need(f"{prefix}scale"), FLOATS, groups, f"{prefix}scale").t()
    minimum = check(tensors.need(f"{prefix}zero_point"), FLOATS, groups, f"{prefix}zero_point").t()
    codes = unpack_int4(packed.view(torch.uint8)) ^ 8  # two's complement to 0..15
    return with_minima(codes, scale, minimum, 4, columns // groups[0], centre=8)


def _tiles(tensors: Checkpoint, prefix: str, about: Settings) -> GroupedWeight:
    words = tensors.need(f"{prefix}qdata")
    shape = about.values.get("shape")
    if not integers(shape, 1 << 31) or len(shape) != 2 or 0 in shape:
        raise FormatError(f"{about.name}: the shape is {shape!r}")
    tiles = tuple(words.shape[:2])
    check(words, (torch.int32,), (*tiles, 32, 4), f"{prefix}qdata")
    rows, columns = tiles[0] * _TILE_N, tiles[1] * _TILE_K
    if not (rows >= shape[0] and columns >= shape[1]):
        raise FormatError(f"{prefix}qdata {list(words.shape)} is too small for {shape}")
    size = _block(about, columns)
    both = tensors.need(f"{prefix}scale_and_zero")
    check(both, FLOATS, (columns // size, rows, 2), f"{prefix}scale_and_zero")
    if shape[1] % size:
        raise UnsupportedError(f"{about.name}: groups of {size} do not divide {shape[1]} inputs")
    # Lane t of a word holds row t / 4 and, beside each other, two columns of each of four blocks of eight; the
    # nibbles come in the order 0 2 4 6 1 3 5 7.
    nibbles = [words >> shift & 15 for shift in (0, 16, 4, 20, 8, 24, 12, 28)]
    codes = torch.stack(nibbles, dim=-1).view(
        *tiles, 8, 4, 4, 4, 2
    )  # n tile, k tile, row, lane, word, block, 2
    codes = codes.permute(0, 2, 1, 4, 5, 3, 6).reshape(rows, columns).to(torch.uint8)
    kept, groups = slice(shape[0]), shape[1] // size
    scale, minimum = both[:groups, kept, 0].t(), both[:groups, kept, 1].t()
    return with_minima(codes[kept, : shape[1]], scale, minimum, 4, size, centre=8)


_KINDS = {
    "Int8Tensor": _bytes,
    "IntxUnpackedToInt8Tensor": _bytes,
    "Int4Tensor": _nibbles,
    "Int4TilePackedTo4dTensor": _tiles,
}
