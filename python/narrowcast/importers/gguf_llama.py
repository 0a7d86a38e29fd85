"""Llama models in GGUF files: weights, their own quantised forms, and the tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from narrowcast.errors import ArgumentError, FormatError, UnsupportedError
from narrowcast.formats import GroupedWeight

from .gguf import GGUFFile
from .gguf_tokenizer import tokenizer_json
from .llama import MAX_LAYERS, Decoder, DecoderConfig, check_positions, export_decoder, rope_tables
from .model import Model, describe_file

MAX_SIZE = 1 << 24

_MATRICES = {
    "attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_output": "o",
    "ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down",
}  # fmt: skip
_NORMS = {"attn_norm": "attention_norm", "ffn_norm": "mlp_norm"}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def load(path: str | Path, dtype: torch.dtype = torch.float32, context: int | None = None) -> Model:
    """Imports a GGUF file of the architecture ``llama`` as a decoder.

    dtype: of the weights and activations; logits are always float32.
    context: positions to prepare; by default as many as the file says.

    Raises FormatError for a damaged file, UnsupportedError for another architecture, tensor type, rotary
    scaling or tokenizer.
    """
    if dtype not in _DTYPES:
        raise ArgumentError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    file = GGUFFile(path)
    config = _config(file, context)
    module, native = _module(file, config, dtype)
    text = _token_ids(file, config)
    assets = {"tokenizer.json": tokenizer_json(file)}
    if "tokenizer.chat_template" in file.metadata:
        assets["chat_template"] = file.get("tokenizer.chat_template", str).encode()
    exported = export_decoder(module, config.layers, config.kv_heads, config.head_dim, dtype)
    return Model(
        exported,
        "decoder",
        {
            "architecture": "llama",
            "name": file.get("general.name", str, Path(path).stem),
            "dtype": str(dtype).removeprefix("torch."),
            **config.as_dict(),
            "max_position_embeddings": config.context,
            **text,
        },
        assets,
        native,
        describe_file(Path(path)),
    )


def _size(file: GGUFFile, key: str, default: int | None = None, limit: int = MAX_SIZE) -> int:
    value = file.get(key, int, default)
    if not 1 <= value <= limit:
        raise FormatError(f"{file.path.name}: {key!r} must be between 1 and {limit}, got {value}")
    return value


def _config(file: GGUFFile, context: int | None) -> DecoderConfig:
    name = file.path.name
    architecture = file.get("general.architecture", str)
    if architecture != "llama":
        raise UnsupportedError(f"{name}: the architecture {architecture!r} is not known, only 'llama' is")
    if file.get("llama.expert_count", int, 0):
        raise UnsupportedError(f"{name}: mixtures of experts are not supported")
    hidden = _size(file, "llama.embedding_length")
    heads = _size(file, "llama.attention.head_count")
    kv_heads = _size(file, "llama.attention.head_count_kv", heads)
    head_dim = _size(file, "llama.attention.key_length", max(hidden // heads, 1))
    rotated = _size(file, "llama.rope.dimension_count", head_dim)
    if heads % kv_heads or head_dim % 2:
        raise FormatError(
            f"{name}: {heads} heads, {kv_heads} kv heads of size {head_dim} do not fit together"
        )
    if rotated != head_dim or file.get("llama.attention.value_length", int, head_dim) != head_dim:
        raise UnsupportedError(
            f"{name}: heads of {head_dim} with {rotated} rotated elements are not supported"
        )
    vocab = file.info("token_embd.weight").shape[0]
    eps = file.get("llama.attention.layer_norm_rms_epsilon", float)
    theta = file.get("llama.rope.freq_base", float, 10000.0)
    if not 0 < eps < 1 or not 1 < theta < 1e12:
        raise FormatError(f"{name}: norm epsilon {eps} and rotary base {theta} are out of range")
    limit = _size(file, "llama.context_length")
    if context is not None and not 1 <= context <= limit:
        raise ArgumentError(f"context must be between 1 and the file's {limit}, got {context}")
    check_positions(context or limit, head_dim, sum(info.nbytes for info in file.tensors.values()))
    return DecoderConfig(
        layers=_size(file, "llama.block_count", limit=MAX_LAYERS),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=_size(file, "llama.feed_forward_length"),
        vocab=vocab,
        context=context or limit,
        norm_eps=eps,
        rope_theta=theta,
        tied="output.weight" not in file.tensors,
    )


def _module(
    file: GGUFFile, config: DecoderConfig, dtype: torch.dtype
) -> tuple[Decoder, dict[str, GroupedWeight]]:
    shapes = _tensor_names(file, config)
    state: dict[str, Tensor] = {}
    native: dict[str, GroupedWeight] = {}
    rows = {
        "q": _split_halves(config.heads, config.head_dim),
        "k": _split_halves(config.kv_heads, config.head_dim),
    }
    for name, parameter in shapes.items():
        kind = f".{parameter}".split(".")[-2]
        value = file.tensor(name, dtype)
        state[parameter] = value[rows[kind]] if kind in rows else value
        if value.dim() == 2 and (grouped := file.grouped(name)) is not None:
            native[parameter] = grouped.rows(rows[kind]) if kind in rows else grouped
    scaling = file.get("llama.rope.scaling.type", str, "none")
    if scaling not in ("none", "linear"):
        raise UnsupportedError(f"{file.path.name}: rotary scaling {scaling!r} is not supported")
    factor = file.get("llama.rope.scaling.factor", float, 1.0) if scaling == "linear" else 1.0
    divisors = file.tensor("rope_freqs.weight") if "rope_freqs.weight" in file.tensors else None
    if not 0 < factor < 1e6 or (divisors is not None and not bool((divisors > 0).all())):
        raise FormatError(f"{file.path.name}: rotary factors must be positive")
    state["cos"], state["sin"] = rope_tables(config, factor, divisors)
    biases = frozenset(p.split(".")[-2] for p in state if p.endswith(".bias"))
    with torch.device("meta"):
        module = Decoder(config, biases)
    missing = sorted(set(module.state_dict()) - set(state))
    if missing:
        raise FormatError(f"{file.path.name}: some layers lack {missing[0]!r}")
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False), native


def _tensor_names(file: GGUFFile, config: DecoderConfig) -> dict[str, str]:
    """File name -> parameter name, after checking every shape and that no tensor would be left out."""
    c = config
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    sizes = {
        "q": (q, c.hidden), "k": (kv, c.hidden), "v": (kv, c.hidden), "o": (c.hidden, q),
        "gate": (c.intermediate, c.hidden), "up": (c.intermediate, c.hidden),
        "down": (c.hidden, c.intermediate),
    }  # fmt: skip
    expected = {
        "token_embd.weight": ("embedding.weight", (c.vocab, c.hidden)),
        "output_norm.weight": ("norm", (c.hidden,)),
    }
    if not c.tied:
        expected["output.weight"] = ("head.weight", (c.vocab, c.hidden))
    for i in range(c.layers):
        for name, parameter in _NORMS.items():
            expected[f"blk.{i}.{name}.weight"] = (f"layers.{i}.{parameter}", (c.hidden,))
        for name, parameter in _MATRICES.items():
            expected[f"blk.{i}.{name}.weight"] = (f"layers.{i}.{parameter}.weight", sizes[parameter])
            if f"blk.{i}.{name}.bias" in file.tensors:
                expected[f"blk.{i}.{name}.bias"] = (f"layers.{i}.{parameter}.bias", sizes[parameter][:1])
    for name, (_, shape) in expected.items():
        if file.info(name).shape != shape:
            raise FormatError(
                f"{file.path.name}: {name!r} must be {list(shape)}, got {list(file.info(name).shape)}"
            )
    if "rope_freqs.weight" in file.tensors and file.info("rope_freqs.weight").shape != (c.head_dim // 2,):
        raise FormatError(f"{file.path.name}: 'rope_freqs.weight' must be [{c.head_dim // 2}]")
    unknown = sorted(set(file.tensors) - set(expected) - {"rope_freqs.weight"})
    if unknown:
        raise UnsupportedError(f"{file.path.name}: the tensor {unknown[0]!r} has no place in a llama model")
    return {name: parameter for name, (parameter, _) in expected.items()}


def _split_halves(heads: int, head_dim: int) -> Tensor:
    """The files keep q and k rows for rotation of neighbours; ours rotates the halves of a head."""
    return torch.arange(heads * head_dim).view(heads, head_dim // 2, 2).transpose(1, 2).reshape(-1)


def _token_ids(file: GGUFFile, config: DecoderConfig) -> dict[str, Any]:
    ids: dict[str, Any] = {}
    tokens = file.metadata.get("tokenizer.ggml.tokens", [])
    for ours, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        value = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if value is not None and not (type(value) is int and 0 <= value < config.vocab):
            raise FormatError(
                f"{file.path.name}: the {key} token must be below {config.vocab}, got {value!r}"
            )
        ids[ours] = value
        if value is not None and value < len(tokens):
            ids[ours.removesuffix("_id")] = tokens[value]
    return ids
