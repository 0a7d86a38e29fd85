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


BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}

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
}


def save(folder, tensors, settings, metadata=None, **config):
    """A folder as Hugging Face keeps them."""
    folder.mkdir(exist_ok=True)
    config = {**config, "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: t.contiguous() for name, t in tensors.items()}
    safetensors.torch.save_file(tensors, str(folder / "model.safetensors"), metadata=metadata)
    return folder
