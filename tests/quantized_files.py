"""Small checkpoints in other tools' formats, packed by the letter of each specification, with their values."""

from __future__ import annotations

import json

import numpy as np
import safetensors.torch
import torch

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def dense(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of codes as one long number each, lowest code first, cut into int32 words."""
    rows = []
    for row in codes.tolist():
        number = sum(code << (bits * i) for i, code in enumerate(row))
        raw = number.to_bytes(-(-len(row) * bits // 32) * 4, "little")
        rows.append(np.frombuffer(raw, "<i4").copy())
    return torch.from_numpy(np.stack(rows))


def draw(rows, columns, bits, group):
    """Codes [N, K], scales [N, G] and zero points [N, G]."""
    groups = -(-columns // group)
    codes = torch.randint(0, 1 << bits, (rows, columns))
    return codes, torch.randn(rows, groups), torch.randint(0, 1 << bits, (rows, groups))


def values(codes, scale, zero, index):
    """(codes - zero) * scale in float64; ``index`` is the group of each column."""
    return ((codes - zero[:, index]).double() * scale.double()[:, index]).float()


def gptq(module, rows, columns, bits=4, group=32, act_order=False, version=1, symmetric=False, g_idx=True):
    codes, scale, zero = draw(rows, columns, bits, group)
    scale = scale.half()
    zero = torch.full_like(zero, 1 << (bits - 1)) if symmetric else zero
    index = torch.arange(columns) // group
    index = index[torch.randperm(columns)] if act_order else index
    stored = (zero - 1) % (1 << bits) if version == 1 else zero
    tensors = {
        f"{module}.qweight": dense(codes, bits).t(),
        f"{module}.qzeros": dense(stored.t(), bits),
        f"{module}.scales": scale.t(),
    }
    if g_idx:
        tensors[f"{module}.g_idx"] = index.int()
    return tensors, values(codes, scale, zero, index)


def gptq_settings(bits=4, group=32, version=1):
    settings = {"quant_method": "gptq", "bits": bits, "group_size": group}
    return settings | ({"checkpoint_format": "gptq_v2"} if version == 2 else {})


def awq(module, rows, columns, group=32, version="gemm", dtype=torch.float16):
    codes, scale, zero = draw(rows, columns, 4, group)
    scale = scale.to(dtype)
    expected = values(codes, scale, zero, torch.arange(columns) // group)
    if version == "gemv":
        pad = (0, -scale.shape[1] % 8)
        scale, zero = torch.nn.functional.pad(scale, pad), torch.nn.functional.pad(zero, pad)
        packed = (dense(codes, 4), dense(zero, 4), scale)
    else:
        order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
        mixed = [x.t().unflatten(1, (-1, 8))[..., order].flatten(1) for x in (codes, zero)]
        packed = (dense(mixed[0], 4), dense(mixed[1], 4), scale.t())
    return {f"{module}.{n}": t for n, t in zip(("qweight", "qzeros", "scales"), packed)}, expected


def awq_settings(group=32, version="gemm"):
    return {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": version}


def pack_quantized(
    module, rows, columns, bits=4, group=32, asymmetric=False, act_order=False, padded=False,
    dtype=torch.bfloat16,
):  # fmt: skip
    group = columns if group == -1 else group
    codes, scale, zero = draw(rows, columns, bits, group)
    scale = scale.to(dtype)
    zero = zero if asymmetric else torch.full_like(zero, 1 << (bits - 1))
    index = torch.arange(columns) // group
    index = index[torch.randperm(columns)] if act_order else index
    per_word = 32 // bits
    parts = [dense(part, bits) for part in codes.split(per_word, 1)]
    tensors = {
        f"{module}.weight_packed": torch.cat(parts, 1) if padded else dense(codes, bits),
        f"{module}.weight_scale": scale,
        f"{module}.weight_shape": torch.tensor([rows, columns]),
    }
    if asymmetric:
        tensors[f"{module}.weight_zero_point"] = dense(zero.t(), bits).t()
    if act_order:
        tensors[f"{module}.weight_g_idx"] = index.int()
    return tensors, values(codes, scale, zero, index)


def int_quantized(module, rows, columns, asymmetric=False, per_tensor=False, dtype=torch.float32):
    codes = torch.randint(-128, 128, (rows, columns))
    scale = torch.randn(1 if per_tensor else rows, 1).to(dtype)
    zero = torch.randint(-20, 20, scale.shape) if asymmetric else torch.zeros(scale.shape, dtype=torch.int64)
    tensors = {f"{module}.weight": codes.to(torch.int8), f"{module}.weight_scale": scale}
    if asymmetric:
        tensors[f"{module}.weight_zero_point"] = zero.to(torch.int8)
    return tensors, ((codes - zero).double() * scale.double()).float()


def compressed_settings(kind="pack-quantized", bits=4, group=32, int8_inputs=False):
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": inputs if int8_inputs else None}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head"],
    }


def nf4(module, rows, columns, nested=False, block=64):
    count = rows * columns
    codes = torch.randint(0, 16, (count + count % 2,))
    blocks = -(-count // block)
    state = {"quant_type": "nf4", "blocksize": block, "dtype": "float16", "shape": [rows, columns]}
    table = torch.tensor(NF4)
    tensors = {
        f"{module}.weight": (codes[::2] << 4 | codes[1::2]).to(torch.uint8)[:, None],
        f"{module}.weight.quant_map": table,
    }
    if nested:
        inner, outer = torch.rand(256), torch.rand(-(-blocks // 256))
        small = torch.randint(0, 256, (blocks,))
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
        absmax = inner[small] * outer[torch.arange(blocks) // 256] + 0.25
        tensors |= {
            f"{module}.weight.absmax": small.to(torch.uint8),
            f"{module}.weight.nested_absmax": outer,
            f"{module}.weight.nested_quant_map": inner,
        }
    else:
        absmax = tensors[f"{module}.weight.absmax"] = torch.rand(blocks)
    text = json.dumps(state).encode()
    tensors[f"{module}.weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    expected = table[codes[:count]] * absmax[torch.arange(count) // block]
    return tensors, expected.reshape(rows, columns)


def bnb_int8(module, rows, columns):
    codes, scale = torch.randint(-127, 128, (rows, columns)).to(torch.int8), torch.rand(rows)
    tensors = {
        f"{module}.weight": codes,
        f"{module}.SCB": scale,
        f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return tensors, codes.float() * (scale / 127)[:, None]


def hqq(module, rows, columns, bits=4, group=32, axis=1, dtype=torch.float16, whole_zeros=False):
    count = rows * columns // group
    codes = torch.randint(0, 1 << bits, (count, group) if axis else (group, count))
    side = (count, 1) if axis else (1, count)
    scale, zero = torch.randn(side).to(dtype), (torch.rand(side) * ((1 << bits) - 1)).to(dtype)
    zero = zero.round() if whole_zeros else zero
    expected = ((codes.double() - zero.double()) * scale.double()).float().reshape(rows, columns)
    blocks = 10 if bits == 3 else 8 // bits
    padded = torch.nn.functional.pad(codes, (0, 0, 0, -codes.shape[0] % blocks))
    packed = torch.zeros(padded.shape[0] // blocks, codes.shape[1], dtype=torch.int64)
    for block in padded.chunk(blocks):
        packed = packed << bits | block
    tensors = {
        "W_q": packed.to(torch.int32 if bits == 3 else torch.uint8),
        "scale": scale,
        "zero": zero,
        "shape": torch.tensor([rows, columns]),
        "nbits": torch.tensor(bits, dtype=torch.int32),
        "group_size": torch.tensor(group, dtype=torch.int32),
        "axis": torch.tensor(axis, dtype=torch.int32),
        "packing": torch.tensor([ord(c) for c in f"{bits}bit_u8"], dtype=torch.uint8),
        "quant_zero": torch.tensor(0, dtype=torch.uint8),
    }
    return {f"{module}.{part}": t for part, t in tensors.items()}, expected


def torchao_metadata(module, kind, data, parts):
    return {
        f"metadata:{module}.weight": json.dumps({"_type": kind, "_data": data, "_tensor_data_names": parts})
    }


def torchao_bytes(module, rows, columns, bits=8, group=None, int8_inputs=False, asymmetric=False):
    group = group or columns
    low = -(1 << (bits - 1))
    codes = torch.randint(low, -low, (rows, columns))
    scale = torch.randn(rows, columns // group).bfloat16()
    zero = torch.randint(low // 2, 3, scale.shape) if asymmetric else torch.zeros(scale.shape).long()
    data = {"block_size": [1, group], "dtype": {"_type": "torch.dtype", "_data": "bfloat16"}}
    kind = "Int8Tensor"
    if int8_inputs:
        inputs = {"mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"}, "reduce_range": False}
        data["act_quant_kwargs"] = {"_type": "QuantizeTensorToInt8Kwargs", "_data": inputs}
    if bits < 8:
        kind = "IntxUnpackedToInt8Tensor"
        data["target_dtype"] = {"_type": "torch.dtype", "_data": f"int{bits}"}
    tensors = {
        f"{module}._weight_qdata": codes.to(torch.int8),
        f"{module}._weight_scale": scale,
        f"{module}._weight_zero_point": zero.to(torch.int8),
    }
    tensors |= torchao_metadata(module, kind, data, ["qdata", "scale", "zero_point"])
    return tensors, values(codes, scale, zero, torch.arange(columns) // group)


def _affine(codes, scale, minimum, group):
    index = torch.arange(codes.shape[1]) // group
    return (codes.double() * scale.double()[:, index] + minimum.double()[:, index]).float()


def torchao_int4(module, rows, columns, group=32):
    codes = torch.randint(-8, 8, (rows, columns))
    scale, minimum = (torch.randn(rows, columns // group).bfloat16() for _ in range(2))
    tensors = {
        f"{module}._weight_qdata": (codes[:, ::2] & 15 | codes[:, 1::2] << 4).to(torch.int8),
        f"{module}._weight_scale": scale.t(),
        f"{module}._weight_zero_point": minimum.t(),
    }
    data = {"block_size": [1, group], "shape": [rows, columns]}
    tensors |= torchao_metadata(module, "Int4Tensor", data, ["qdata", "scale", "zero_point"])
    return tensors, _affine(codes, scale, minimum, group)


def torchao_tiles(module, rows, columns, group=32):
    """Lane by lane, as the kernel that packs describes itself."""
    n, k = -(-rows // 8) * 8, -(-columns // 1024) * 1024
    codes = torch.randint(0, 16, (n, k))
    scale, zero = (torch.randn(n, k // group).bfloat16() for _ in range(2))
    words = np.zeros((n // 8, k // 128, 32, 4), np.uint32)
    table = codes.numpy()
    for tile in np.ndindex(words.shape):
        row = tile[0] * 8 + tile[2] // 4
        first = tile[1] * 128 + tile[3] * 32 + tile[2] % 4 * 2
        v = [int(table[row, first + 8 * (i // 2) + i % 2]) for i in range(8)]
        for place, i in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            words[tile] |= np.uint32(v[i] << 4 * place)
    tensors = {
        f"{module}._weight_qdata": torch.from_numpy(words.view(np.int32)),
        f"{module}._weight_scale_and_zero": torch.stack((scale, zero), -1).transpose(0, 1),
    }
    data = {"block_size": [1, group], "shape": [rows, columns]}
    tensors |= torchao_metadata(module, "Int4TilePackedTo4dTensor", data, ["qdata", "scale_and_zero"])
    return tensors, _affine(codes - 8, scale, zero, group)[:rows, :columns]


BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
TORCHAO = {"quant_method": "torchao"}

#: name -> (writer of one layer, quantization_config): what the damaged files and whole models are made of.
FORMATS = {
    "gptq": (lambda m, n, k: gptq(m, n, k), gptq_settings()),
    "gptq-act-order": (lambda m, n, k: gptq(m, n, k, act_order=True, version=2), gptq_settings(version=2)),
    "awq": (lambda m, n, k: awq(m, n, k), awq_settings()),
    "pack-quantized": (
        lambda m, n, k: pack_quantized(m, n, k, asymmetric=True, act_order=True),
        compressed_settings(),
    ),
    "int-quantized": (
        lambda m, n, k: int_quantized(m, n, k),
        compressed_settings("int-quantized", 8, int8_inputs=True),
    ),
    "nf4": (lambda m, n, k: nf4(m, n, k, nested=True), BNB),
    "bnb-int8": (lambda m, n, k: bnb_int8(m, n, k), BNB),
    "hqq": (lambda m, n, k: hqq(m, n, k), {"quant_method": "hqq"}),
    "torchao": (lambda m, n, k: torchao_int4(m, n, k), TORCHAO),
    "torchao-int8": (lambda m, n, k: torchao_bytes(m, n, k, int8_inputs=True), TORCHAO),
}


def save(folder, tensors, settings, **config):
    """A folder as Hugging Face keeps them. Texts named ``metadata:NAME`` go into the header of the weights."""
    folder.mkdir(exist_ok=True)
    config = {**config, "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    texts = {k.removeprefix("metadata:"): v for k, v in tensors.items() if isinstance(v, str)}
    if texts:
        texts["tensor_names"] = json.dumps(list(texts))
    tensors = {name: t.contiguous() for name, t in tensors.items() if not isinstance(t, str)}
    safetensors.torch.save_file(tensors, str(folder / "model.safetensors"), metadata=texts or None)
    return folder
