"""Runs passes in an order that is checked, not remembered: each says what it needs and what it leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..ir import Graph
from .fold import fold_constants, share_equal_calls
from .fuse_activation import fuse_activation, fuse_residual
from .fuse_attention import fuse_attention
from .fuse_gate import fuse_gate
from .fuse_norm import fuse_add_norm, fuse_layer_norm, fuse_rms_norm
from .fuse_rope import fuse_rope
from .merge_linears import merge_linears
from .simplify import simplify
from .to_conv2d import fold_batch_norm, to_conv2d
from .to_linear import to_linear


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
    _pass(to_linear, requires="simple", provides="layers"),
    _pass(to_conv2d, requires="simple"),
    _pass(fold_batch_norm, requires="layers", provides="folded"),
    _pass(fuse_rope, requires="simple"),
    _pass(fuse_layer_norm),
    _pass(fuse_rms_norm, requires="simple", provides="norms"),
    # Before activations are fused: a gate's silu must not disappear into its layer's epilogue.
    _pass(fuse_gate, requires="layers", provides="gates"),
    _pass(fuse_attention, requires="simple"),
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
    """How often each pass applied, in order."""

    applied: list[tuple[str, int]]

    def __str__(self) -> str:
        return ", ".join(f"{name} {count}" for name, count in self.applied if count)


def run_passes(graph: Graph, passes: Iterable[Pass]) -> Report:
    """Applies ``passes`` to ``graph`` in place. Raises ValueError when one comes before what it needs."""
    left: set[str] = set()
    applied = []
    for step in passes:
        missing = step.requires - left
        if missing:
            raise ValueError(f"pass {step.name} needs {', '.join(sorted(missing))} first")
        applied.append((step.name, step.run(graph)))
        left |= step.provides
    graph.clean()
    graph.fx.lint()
    return Report(applied)


def optimize(graph: Graph) -> tuple[Graph, Report]:
    """A fused copy of ``graph`` (see the package's text for its form), and what was fused."""
    fused = graph.clone()
    report = run_passes(fused, DEFAULT)
    return fused, report
