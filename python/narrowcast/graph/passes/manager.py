"""Runs passes in an order that is checked, not remembered: each says what it needs and what it leaves."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from torch import fx

from ..ir import Graph
from .fold import fold_constants, share_equal_calls
from .fuse_activation import fuse_activation, fuse_residual
from .fuse_attention import fuse_attention, fuse_written_attention
from .fuse_gate import fuse_gate
from .fuse_norm import fuse_add_norm, fuse_layer_norm, fuse_rms_norm, fuse_written_layer_norm
from .fuse_rope import fuse_rope
from .merge_linears import merge_linears
from .simplify import simplify
from .spelled_out import name_activations
from .to_conv2d import fold_batch_norm, to_conv2d
from .to_linear import drop_views, fuse_bias, to_linear


@dataclass(frozen=True)
class Pass:
    """A rewrite: ``run(graph)`` returns how often it applied."""

    run: Callable[[Graph], int]
    requires: frozenset[str] = frozenset()  #: states of the graph that other passes must have left
    provides: frozenset[str] = frozenset()  #: states that hold from here on

    @property
    def name(self) -> str:
        return self.run.__name__


def _pass(run, requires: str = "", provides: str = "") -> Pass:
    return Pass(run, frozenset(requires.split()), frozenset(provides.split()))


#: The default list. "simple": no redundant casts; "layers": dense layers and convolutions are ours;
#: "gates", "norms", "epilogues": those are fused.
DEFAULT = (
    _pass(simplify, provides="simple"),
    _pass(share_equal_calls),
    _pass(fold_constants),
    _pass(name_activations, requires="simple", provides="activations"),
    _pass(to_linear, requires="simple", provides="layers"),
    _pass(to_conv2d, requires="simple"),
    _pass(drop_views, requires="layers"),
    _pass(fuse_bias, requires="layers"),
    _pass(fold_batch_norm, requires="layers", provides="folded"),
    _pass(fuse_rope, requires="simple"),
    _pass(fuse_layer_norm),
    _pass(fuse_written_layer_norm, requires="simple"),
    _pass(fuse_rms_norm, requires="simple", provides="norms"),
    # Before activations are fused: a gate's silu must not disappear into its layer's epilogue.
    _pass(fuse_gate, requires="layers activations", provides="gates"),
    _pass(fuse_attention, requires="simple"),
    _pass(fuse_written_attention, requires="simple layers"),
    _pass(merge_linears, requires="layers gates"),
    _pass(fuse_activation, requires="layers folded gates"),
    _pass(fuse_residual, requires="layers folded gates"),
    # Again: an activation may follow a residual sum.
    _pass(fuse_activation, provides="epilogues"),
    # Sums that a layer took into its epilogue are free; what is left joins the norm.
    _pass(fuse_add_norm, requires="norms epilogues"),
    _pass(share_equal_calls),
)


@dataclass
class Report:
    """What each pass did, in order."""

    applied: list[tuple[str, int]]  #: (pass, how often it applied)
    places: dict[str, list[str]]  #: pass -> the module paths where it made or changed a call

    def __str__(self) -> str:
        return ", ".join(f"{name} {count}" for name, count in self.applied if count)


def run_passes(graph: Graph, passes: Iterable[Pass]) -> Report:
    """Applies ``passes`` to ``graph`` in place. Raises ValueError when one comes before what it needs."""
    left: set[str] = set()
    applied: list[tuple[str, int]] = []
    places: dict[str, list[str]] = {}
    for step in passes:
        missing = step.requires - left
        if missing:
            raise ValueError(f"pass {step.name} needs {', '.join(sorted(missing))} first")
        before = _calls(graph)
        applied.append((step.name, step.run(graph)))
        changed = [node for node, form in _calls(graph).items() if before.get(node) != form]
        sources = [node.meta.get("source", "") for node in changed]
        places.setdefault(step.name, []).extend(dict.fromkeys(s for s in sources if s))
        left |= step.provides
    graph.clean()
    graph.fx.lint()
    return Report(applied, places)


def _calls(graph: Graph) -> dict[fx.Node, tuple]:
    """What each call calls, and with which options: its operands may be renamed without a change of it."""
    return {node: (node.target, len(node.args), tuple(node.kwargs)) for node in graph.calls()}


def optimize(graph: Graph, *, positions: int = 8192) -> tuple[Graph, Report]:
    """A fused copy of ``graph`` (see the package's text for its form), and what was fused.

    positions: rows of the rotary tables, one more than the largest position that the graph may be run at.
    """
    fused = graph.clone()
    passes = [_with_positions(step, positions) if step.run is fuse_rope else step for step in DEFAULT]
    return fused, run_passes(fused, passes)


def _with_positions(step: Pass, positions: int) -> Pass:
    @functools.wraps(step.run)
    def run(graph: Graph) -> int:
        return fuse_rope(graph, positions)

    return replace(step, run=run)
