"""compressed-tensors: the formats "int-quantized" and "pack-quantized".

``w[n, k] = (q[n, k] - zero_point) * scale``, q signed, one scale per tensor, row or group of a row.

=================  =========================  =======================================================
pack-quantized     weight_packed              int32 [N, K * bits/32]: q + 2^(bits - 1), lowest bits first
pack-quantized     weight_shape               integers [2]: N, K
pack-quantized     weight_zero_point          int32 [N * bits/32, G], packed along the rows; may be absent
int-quantized      weight                     int8 [N, K]
int-quantized      weight_zero_point          integers of the shape of weight_scale; may be absent
both               weight_scale               float [N, G], [N, 1], [N] or [1]
both               weight_g_idx               integers [K], the group of each input; may be absent
=================  =========================  =======================================================

Codes of 3, 5, 6 or 7 bits straddle words in new files; old ones leave the last bits of each word empty.
Layout: the compressed-tensors package (compressors/pack_quantized, naive_quantized).
"""

from __future__ import annotations

import torch
from torch import Tensor

from narrowcast.errors import FormatError, UnsupportedError
from narrowcast.formats import GroupedWeight, Int8Weight

from .checkpoint import Checkpoint, Settings
from .codes import FLOATS, check, group_size, sorted_columns, unpack, with_zeros

FORMATS = ("int-quantized", "pack-quantized", "naive-quantized", "mixed-precision")
_PARTS = (
    "weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx", "input_scale",
    "input_zero_point", "output_scale", "output_zero_point", "k_scale", "v_scale",
)  # fmt: skip
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)


def read(tensors: Checkpoint, settings: Settings) -> tuple[dict[str, GroupedWeight | Int8Weight], set[str]]:
    """Parameter name -> weight, and the names of the tensors that were read or need no place.

    A weight of int8 rows whose inputs are int8, too, becomes an :class:`Int8Weight`, any other a
    :class:`GroupedWeight`.
    """
    schemes = _schemes(settings)
    weights: dict[str, GroupedWeight | Int8Weight] = {}
    used = {name for name in tensors if name.rpartition(".")[2] in _PARTS}
    for name in tensors:
        module, _, part = name.rpartition(".")
        if part == "weight_packed":
            weights[f"{module}.weight"] = _packed(tensors, module, schemes)
        elif part == "weight" and f"{module}.weight_scale" in tensors:
            if tensors[name].dtype != torch.int8:
                raise UnsupportedError(f"{name} must be int8, got {tensors[name].dtype}")
            weights[name] = _plain(tensors, module, schemes)
            used.add(name)
    return weights, used


class _Scheme:
    """What a config group says of its weights and inputs."""

    def __init__(self, group: Settings):
        weights = group.inner("weights")
        if weights.text("type", "int") != "int":
            raise UnsupportedError(f"{weights.name}: the type must be int, got {weights.text('type')!r}")
        self.bits = weights.integer("num_bits", 8, low=1, high=8)
        self.group_size = weights.integer("group_size", -1, low=-1)
        self.int8_inputs = False
        if group.has("input_activations"):
            inputs = group.inner("input_activations")
            self.int8_inputs = (
                inputs.text("type", "int") == "int"
                and inputs.integer("num_bits", 8) == 8
                and inputs.flag("symmetric", True)
            )


def _schemes(settings: Settings) -> list[_Scheme]:
    kind = settings.text("format", "pack-quantized")
    if kind not in FORMATS:
        raise UnsupportedError(f"the compressed-tensors format must be one of {FORMATS}, got {kind!r}")
    groups = settings.inner("config_groups")
    schemes = [_Scheme(groups.inner(key)) for key in groups.values]
    if not schemes:
        raise FormatError(f"{groups.name} must not be empty")
    return schemes


def _packed(tensors: Checkpoint, module: str, schemes: list[_Scheme]) -> GroupedWeight:
    words = tensors[f"{module}.weight_packed"]
    shape = check(tensors.need(f"{module}.weight_shape"), _INTEGERS, (2,), f"{module}.weight_shape").tolist()
    rows, columns = shape
    if words.dim() != 2 or rows != words.shape[0] or not 0 < columns <= words.shape[1] * 32 or not rows:
        raise FormatError(f"{module}.weight_shape {shape} does not fit weight_packed {list(words.shape)}")
    # Config groups differ in bits: the width of the words says which one this layer belongs to.
    for bits in sorted({s.bits for s in schemes}):
        if words.shape[1] == -(-columns * bits // 32):
            codes = unpack(words, bits, columns, f"{module}.weight_packed")
            break
        if words.shape[1] == -(-columns // (32 // bits)):
            codes = _unpack_padded(words, bits, columns, f"{module}.weight_packed")
            break
    else:
        raise FormatError(f"{module}.weight_packed {list(words.shape)} does not fit {columns} columns")
    scale = _scale(tensors, module, rows)
    zero: Tensor | int = 1 << (bits - 1)
    if f"{module}.weight_zero_point" in tensors:
        stored = tensors[f"{module}.weight_zero_point"]
        zeros = unpack(stored.t(), bits, rows, f"{module}.weight_zero_point").t()
        zero = check(zeros, (torch.uint8,), tuple(scale.shape), f"{module}.weight_zero_point")
    return _grouped(tensors, module, codes, scale, zero, bits, schemes)


def _unpack_padded(words: Tensor, bits: int, count: int, name: str) -> Tensor:
    if words.dtype != torch.int32:
        raise FormatError(f"{name} must be int32, got {words.dtype}")
    shifts = torch.arange(32 // bits) * bits
    codes = (words[:, :, None] >> shifts.to(torch.int32)) & ((1 << bits) - 1)
    return codes.flatten(1)[:, :count].to(torch.uint8)


def _plain(tensors: Checkpoint, module: str, schemes: list[_Scheme]) -> GroupedWeight | Int8Weight:
    codes = tensors[f"{module}.weight"]
    if codes.dim() != 2 or 0 in codes.shape:
        raise FormatError(f"{module}.weight must be a matrix, got {list(codes.shape)}")
    scale = _scale(tensors, module, codes.shape[0])
    zero: Tensor | int = 0
    if f"{module}.weight_zero_point" in tensors:
        stored = tensors[f"{module}.weight_zero_point"]
        if stored.dtype not in _INTEGERS or stored.numel() not in (scale.numel(), 1):
            raise FormatError(f"{module}.weight_zero_point must be integers {list(scale.shape)}")
        if stored.numel() and (int(stored.min()) < -128 or int(stored.max()) > 127):
            raise FormatError(f"{module}.weight_zero_point must lie between -128 and 127")
        stored = stored.reshape(scale.shape if stored.numel() == scale.numel() else (1, 1))
        zero = stored.expand_as(scale) if bool(stored.any()) else 0
    same = all(s.int8_inputs for s in schemes if s.bits == 8)
    if scale.shape[1] == 1 and isinstance(zero, int) and same and any(s.bits == 8 for s in schemes):
        return Int8Weight(codes, scale[:, 0].float().contiguous())
    return _grouped(tensors, module, codes, scale, zero, 8, schemes)


def _scale(tensors: Checkpoint, module: str, rows: int) -> Tensor:
    """The scale as [N, G]."""
    scale = tensors.need(f"{module}.weight_scale")
    if scale.numel() == 1:
        scale = scale.reshape(1, 1).expand(rows, 1)
    elif scale.dim() == 1:
        scale = scale[:, None]
    if scale.dim() != 2 or scale.shape[1] == 0:
        raise FormatError(f"{module}.weight_scale must be [N, G], got {list(scale.shape)}")
    return check(scale, FLOATS, (rows, scale.shape[1]), f"{module}.weight_scale")


def _grouped(
    tensors: Checkpoint, module: str, codes: Tensor, scale: Tensor, zero: Tensor | int, bits: int,
    schemes: list[_Scheme],
) -> GroupedWeight:  # fmt: skip
    columns, groups = codes.shape[1], scale.shape[1]
    fitting = [s.group_size for s in schemes if s.group_size > 0 and -(-columns // s.group_size) == groups]
    size = group_size(columns, groups, fitting[0] if fitting else -1, module)
    order = None
    index = tensors.get(f"{module}.weight_g_idx")
    if index is not None and bool((index != -1).any()):
        check(index, _INTEGERS, (columns,), f"{module}.weight_g_idx")
        order = sorted_columns(index, groups, size, f"{module}.weight_g_idx")
        codes = codes if order is None else codes[:, order]
    return with_zeros(codes, scale, zero, bits, size, order)
