"""A decoder of the Llama family in narrowcast ops, and its export to the decoder contract.

Per layer, with n = RMSNorm and x [B, S, H]::

    q, k, v = n(x) Wq^T, n(x) Wk^T, n(x) Wv^T          heads of size D, rotated by position
    x = x + attention(q, cache(k), cache(v)) Wo^T
    x = x + (silu(n(x) Wg^T) * (n(x) Wu^T)) Wd^T

Source: Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", 2023.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from narrowcast.errors import ArgumentError, UnsupportedError

ops = torch.ops.narrowcast

#: Layers that a file may ask for; and bytes of rotary tables beyond those of its weights (128 K positions of 128).
MAX_LAYERS, MAX_TABLES = 1024, 64 << 20


@dataclass(frozen=True)
class DecoderConfig:
    """The sizes of a decoder. ``context`` is the number of positions that can be rotated."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    context: int
    norm_eps: float
    rope_theta: float
    tied: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_positions(positions: int, head_dim: int, weight_bytes: int) -> None:
    """Raises UnsupportedError where rotary tables would need more memory than a model of this size explains.

    positions, head_dim: as a file states them; weight_bytes: that are really there. A damaged length costs nothing.
    """
    needed, most = positions * head_dim * 4, max(MAX_TABLES, weight_bytes)
    if needed > most:
        raise UnsupportedError(
            f"the rotary tables of {positions} positions of {head_dim} would need {needed} bytes, more than the weights' "
            f"{weight_bytes}: import with context={most // (4 * head_dim)} or fewer"
        )


def rope_tables(
    config: DecoderConfig, linear_factor: float = 1.0, divisors: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin [context, D / 2] of position * theta^(-2 i / D).

    linear_factor: positions are divided by it. divisors: [D / 2], the frequencies are divided by them.
    """
    step = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    frequency = config.rope_theta**-step
    if divisors is not None:
        frequency = frequency / divisors.double()
    angle = torch.outer(torch.arange(config.context, dtype=torch.float64) / linear_factor, frequency)
    return angle.cos().float(), angle.sin().float()


def _linear(x: Tensor, layer: nn.Linear, residual: Tensor | None = None) -> Tensor:
    return ops.linear(x, layer.weight, layer.bias, "none", residual)


class _Layer(nn.Module):
    def __init__(self, config: DecoderConfig, biases: frozenset[str]):
        super().__init__()
        c = config
        self.config = config
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim

        def linear(name: str, n: int, k: int) -> nn.Linear:
            return nn.Linear(k, n, bias=name in biases)

        self.attention_norm = nn.Parameter(torch.empty(c.hidden))
        self.q, self.k, self.v = (
            linear("q", q, c.hidden),
            linear("k", kv, c.hidden),
            linear("v", kv, c.hidden),
        )
        self.o = linear("o", c.hidden, q)
        self.mlp_norm = nn.Parameter(torch.empty(c.hidden))
        self.gate = linear("gate", c.intermediate, c.hidden)
        self.up = linear("up", c.intermediate, c.hidden)
        self.down = linear("down", c.hidden, c.intermediate)

    def forward(self, x, start, lengths, cos, sin, k_cache, v_cache):
        c = self.config
        batch, length = x.shape[0], x.shape[1]
        h = ops.rms_norm(x, self.attention_norm, c.norm_eps)
        q = _linear(h, self.q).view(batch, length, c.heads, c.head_dim).transpose(1, 2)
        k = _linear(h, self.k).view(batch, length, c.kv_heads, c.head_dim).transpose(1, 2)
        v = _linear(h, self.v).view(batch, length, c.kv_heads, c.head_dim).transpose(1, 2)
        ops.kv_append(k_cache, v_cache, k, v, start, cos=cos, sin=sin)
        q = ops.rope(q, cos, sin, start)
        a = ops.attention_decode(q, k_cache, v_cache, lengths)
        x = _linear(a.transpose(1, 2).reshape(batch, length, c.heads * c.head_dim), self.o, x)
        h = ops.rms_norm(x, self.mlp_norm, c.norm_eps)
        return _linear(ops.silu_mul(_linear(h, self.gate), _linear(h, self.up)), self.down, x)


class Decoder(nn.Module):
    """The whole model. ``biases`` names the linear layers that have one (of q, k, v, o, gate, up, down).

    forward(input_ids int64 [B, S], start int32 [B], logit_rows int64 [R], k_cache_0, v_cache_0, ...)
    -> logits float32 [R, vocab]; the caches [B, kv_heads, C, head_dim] are written in place.
    """

    def __init__(self, config: DecoderConfig, biases: frozenset[str] = frozenset()):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(_Layer(config, biases) for _ in range(config.layers))
        self.norm = nn.Parameter(torch.empty(config.hidden))
        if not config.tied:
            self.head = nn.Linear(config.hidden, config.vocab, bias=False)
        self.register_buffer("cos", torch.empty(config.context, config.head_dim // 2))
        self.register_buffer("sin", torch.empty(config.context, config.head_dim // 2))

    def forward(self, input_ids, start, logit_rows, *caches):
        if len(caches) != 2 * len(self.layers):
            raise ArgumentError(f"caches must be {2 * len(self.layers)} tensors, got {len(caches)}")
        lengths = start + input_ids.shape[1]
        x = self.embedding(input_ids)
        for i, layer in enumerate(self.layers):
            x = layer(x, start, lengths, self.cos, self.sin, caches[2 * i], caches[2 * i + 1])
        x = x.flatten(0, 1).index_select(0, logit_rows)
        x = ops.rms_norm(x, self.norm, self.config.norm_eps)
        head = self.embedding if self.config.tied else self.head
        return ops.linear(x, head.weight, out_dtype=torch.float32)


def cache_names(layers: int) -> list[str]:
    """The caches' names, in the order of the inputs."""
    return [f"{side}_cache_{i}" for i in range(layers) for side in ("k", "v")]


def export_decoder(
    module: nn.Module, layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> torch.export.ExportedProgram:
    """Exports a module with the inputs of :class:`Decoder`; batch, length, rows and capacity stay dynamic."""
    batch, length, rows, capacity = 2, 3, 5, 16
    cache = torch.zeros(batch, kv_heads, capacity, head_dim, dtype=dtype)
    dim = torch.export.Dim
    b, s, c = dim("batch", max=1 << 20), dim("length", max=1 << 24), dim("capacity", max=1 << 24)
    with torch.no_grad():
        exported = torch.export.export(
            module.eval(),
            (
                torch.zeros(batch, length, dtype=torch.int64),
                torch.zeros(batch, dtype=torch.int32),
                torch.zeros(rows, dtype=torch.int64),
                *(cache.clone() for _ in range(2 * layers)),
            ),
            dynamic_shapes={
                "input_ids": {0: b, 1: s},
                "start": {0: b},
                "logit_rows": {0: dim("rows", max=1 << 24)},
                "caches": tuple({0: b, 2: c} for _ in range(2 * layers)),
            },
        )
    _name_caches(exported, cache_names(layers))
    return exported


def _name_caches(exported: torch.export.ExportedProgram, names: list[str]) -> None:
    """Placeholders of ``*caches`` are called caches_0 ...; the contract has k_cache_0, v_cache_0 ..."""
    inputs = {s.arg.name: s.arg for s in exported.graph_signature.input_specs if hasattr(s.arg, "name")}
    nodes = [n for n in exported.graph.nodes if n.op == "placeholder" and n.name.startswith("caches_")]
    for node, name in zip(nodes, names, strict=True):
        inputs[node.name].name = name
        for spec in exported.graph_signature.output_specs:
            if spec.target == node.name:
                spec.target = name
        node.name = node.target = name
    exported.graph_module.recompile()
