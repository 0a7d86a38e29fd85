"""What a program runs: a row per node, and totals; with times, a profile."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .trace import StepRecord, Trace, short_name


@dataclass(frozen=True)
class Row:
    """One node. backend: view, folded, host, "native <kernel>" or "callback (<why>)"; on a GPU "graph (<why>)", part of
    a CUDA graph, or "eager (<why>)", launched by itself."""

    node: str
    op: str
    backend: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int  # read and written
    macs: int
    weights: str  # precision of the weights: int8, int4, float32, ... or ""
    source: str


@dataclass(frozen=True)
class Explanation:
    """rows: every call of the graph in order. weight_macs: multiply-adds per weight precision."""

    rows: list[Row]
    weight_macs: dict[str, int]

    @property
    def not_native(self) -> list[Row]:
        """Every node that runs through Python in every call."""
        return [r for r in self.rows if r.backend.startswith(("callback", "eager"))]

    @property
    def shares(self) -> dict[str, float]:
        """Share of the multiply-adds with weights, by the precision of the weights."""
        total = sum(self.weight_macs.values())
        return {k: v / total for k, v in self.weight_macs.items()} if total else {}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "nodes": [vars(r) for r in self.rows],
            "weight_macs": self.weight_macs,
            "shares": self.shares,
        }

    def __str__(self) -> str:
        rows = [r for r in self.rows if r.backend not in ("view", "host")]
        header = ("node", "op", "backend", "dtype", "bytes", "MACs", "weights")
        cells = [(r.node, r.op, r.backend, r.dtype, f"{r.bytes:,}", f"{r.macs:,}", r.weights) for r in rows]
        shares = ", ".join(f"{k} {v:.1%}" for k, v in sorted(self.shares.items()))
        callbacks = ", ".join(f"{r.node} ({r.op})" for r in self.not_native)
        return (
            f"{table(header, cells)}\n"
            f"weight MACs: {shares or 'none'}\n"
            f"through Python: {callbacks or 'nothing'}"
        )


@dataclass(frozen=True)
class Timing:
    """One step of a profile."""

    node: str
    op: str
    backend: str
    ms: float
    gb_per_s: float
    gmac_per_s: float
    share: float


@dataclass(frozen=True)
class Profile:
    """rows in the order of the run; ``ms`` the sum."""

    rows: list[Timing]

    @property
    def ms(self) -> float:
        return sum(r.ms for r in self.rows)

    def by_op(self) -> dict[str, float]:
        """Milliseconds per op, most first."""
        sums: dict[str, float] = {}
        for r in self.rows:
            sums[r.op] = sums.get(r.op, 0.0) + r.ms
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"steps": [vars(r) for r in self.rows], "by_op": self.by_op(), "ms": self.ms}

    def __str__(self) -> str:
        header = ("node", "op", "backend", "ms", "share", "GB/s", "GMAC/s")
        cells = [
            (r.node, r.op, r.backend, f"{r.ms:.4f}", f"{r.share:.1%}", f"{r.gb_per_s:.1f}",
             f"{r.gmac_per_s:.1f}")
            for r in self.rows
        ]  # fmt: skip
        return f"{table(header, cells)}\ntotal {self.ms:.4f} ms"


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Columns aligned, numbers to the right."""
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]

    def line(row: tuple[str, ...]) -> str:
        cells = (
            c.rjust(w) if c[:1].isdigit() and i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))
        )
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), *map(line, rows)])


def explain(program: Trace) -> Explanation:
    """See :meth:`Executor.explain`."""
    steps = {step.node: step for step in program.steps}
    rows, totals = [], {}
    for node in program.shared.nodes.nodes:
        if node.op != "call_function":
            continue
        step, value = steps.get(node), program.values[node]
        first = next((t for t in _flat(value)), None)
        macs, weights = (_macs(program, step), _weights(program, step)) if step else (0, "")
        if macs and weights:
            totals[weights] = totals.get(weights, 0) + macs
        rows.append(
            Row(
                node.name,
                short_name(node.target),
                backend(step) if step else program.kinds[node],
                str(first.dtype).removeprefix("torch.") if first is not None else "",
                tuple(first.shape) if first is not None else (),
                _bytes(step) if step else 0,
                macs,
                weights,
                _source(node),
            )
        )
    return Explanation(rows, totals)


def profile(program: Trace, seconds: list[float]) -> Profile:
    """Seconds per step, with what each moved and multiplied."""
    total = sum(seconds) or 1.0
    rows = []
    for step, s in zip(program.steps, seconds):
        s = max(s, 1e-12)
        rows.append(
            Timing(
                step.node.name,
                step.op,
                backend(step),
                s * 1e3,
                _bytes(step) / s / 1e9,
                _macs(program, step) / s / 1e9,
                s / total,
            )
        )
    return Profile(rows)


def backend(step: StepRecord) -> str:
    """ "native avx512", or "callback (why)" and its like."""
    if step.backend != "native":
        return f"{step.backend} ({step.why})"
    try:
        return f"native {torch.ops.narrowcast._op_variants(step.op).split(',')[0]}".rstrip()
    except RuntimeError:  # a room without a list of its own
        return "native"


def _flat(value: Any) -> list[Tensor]:
    leaves = value if isinstance(value, (tuple, list)) else [value]
    return [t for t in leaves if isinstance(t, Tensor)]


def _bytes(step: StepRecord) -> int:
    return sum(t.numel() * t.element_size() for t in [*step.reads, *step.writes])


def _weight(program: Trace, step: StepRecord) -> Tensor | None:
    """The matrix or filter that a product takes: its largest constant operand."""
    constants = [t for t in step.reads if program.is_constant(t) and t.dim() >= 2]
    return max(constants, key=lambda t: t.numel(), default=None)


_PRODUCTS = ("linear", "conv", "mm", "matmul", "bmm", "addmm", "baddbmm")


def _is_product(step: StepRecord) -> bool:
    name = step.op.removeprefix("aten.").split(".")[0]
    return name.startswith(("linear", "conv")) or name in _PRODUCTS


def _weights(program: Trace, step: StepRecord) -> str:
    if not _is_product(step):
        return ""
    weight = _weight(program, step)
    if weight is None:
        return ""
    if step.op.startswith("linear_grouped"):
        return f"int{_bits(step)}"
    return str(weight.dtype).removeprefix("torch.")


def _bits(step: StepRecord) -> int:
    """bits of linear_grouped(x, packed, scale, offset, group_size, bits, ...)."""
    node = step.node
    return int(node.args[5] if len(node.args) > 5 else node.kwargs["bits"])


def _macs(program: Trace, step: StepRecord) -> int:
    out = step.writes[0] if step.writes else None
    name = step.op.removeprefix("aten.").split(".")[0]
    if out is None:
        return 0
    if name.startswith("conv"):
        weight = _weight(program, step)
        return out.numel() * (math.prod(weight.shape[1:]) if weight is not None else 0)
    if name in ("attention", "attention_lse", "attention_int8", "attention_decode") or (
        name == "scaled_dot_product_attention"
    ):
        q, k = step.reads[:2]
        return 2 * q.numel() * k.shape[-2]  # q k^T and p v; a decode cache counts its capacity
    if not _is_product(step):
        return 0
    x = step.reads[1] if name in ("addmm", "baddbmm") else step.reads[0]
    return out.numel() * x.shape[-1]


def _source(node: fx.Node) -> str:
    """The module path a node comes from, else the last line of its Python stack."""
    if isinstance(node.meta.get("source"), str):
        return node.meta["source"]
    stack = node.meta.get("nn_module_stack")
    if stack:
        return next(reversed(stack.values()))[0]
    trace = (node.meta.get("stack_trace") or "").strip().splitlines()
    return trace[-1].strip() if trace else ""
