"""What is in a plan, as rows, as a page, as a plot."""

from __future__ import annotations

import html
import os
from typing import Any

from torch import fx

from narrowcast.errors import UnsupportedError
from narrowcast.files import atomic_path

from .plan import Plan
from .serialize import target_name

_LAYERS = ("linear", "conv2d", "linear_int8", "linear_dynamic_int8", "linear_grouped", "conv2d_int8")
_COLOURS = {"int8": "#2a7ab0", "int4": "#c4661f", "float32": "#777777"}


def layers_of(plan: Plan) -> list[dict[str, Any]]:
    """A row per layer: name, op, precision, bytes, sqnr_db (or None), why. First what compression looked at."""
    weights = plan.graph.weights
    rows = []
    seen: set[str] = set()
    for entry in plan.record.get("layers", []):
        name = str(entry.get("name", ""))
        own = [key for key in weights if key == name or key.startswith(f"{name}.")]
        seen.update(own)
        size = sum(weights[key].nbytes for key in own)
        rows.append(
            {
                "name": name,
                "op": entry.get("op", ""),
                "precision": entry.get("precision", ""),
                "bytes": size,
                "sqnr_db": entry.get("sqnr_db"),
                "why": entry.get("why", ""),
            }
        )
    for node in plan.graph.calls():
        op = target_name(node.target).removeprefix("narrowcast.").removesuffix(".default")
        own = [str(x.target) for x in node.all_input_nodes if x.op == "get_attr" and x.target in weights]
        if op in _LAYERS and own and not seen.intersection(own):
            first = weights[own[0]]
            rows.append(
                {
                    "name": str(node.meta.get("source") or own[0].rpartition(".")[0]),
                    "op": op,
                    "precision": str(first.dtype).removeprefix("torch."),
                    "bytes": sum(weights[key].nbytes for key in own),
                    "sqnr_db": None,
                    "why": "",
                }
            )
    return rows


def nodes_of(plan: Plan) -> list[dict[str, str]]:
    """A row per call of the graph: name, op, inputs, source."""
    return [
        {
            "name": node.name,
            "op": target_name(node.target),
            "inputs": ", ".join(x.name for x in node.all_input_nodes if isinstance(x, fx.Node)),
            "source": str(node.meta.get("source", "")),
        }
        for node in plan.graph.calls()
    ]


def write_html(plan: Plan, path: str | os.PathLike) -> None:
    """One self-contained page: the summary, the certificate, error and precision of every layer."""
    layers = layers_of(plan)
    metrics = plan.certificate.get("metrics", {})
    bounds = plan.certificate.get("bounds", {})
    text = html.escape
    facts = "".join(
        f"<tr><td>{text(name)}</td><td>{value:.6g}</td><td>{_bounds(bounds.get(name))}</td></tr>"
        for name, value in metrics.items()
    )
    rows = "".join(
        f"<tr><td>{text(r['name'])}</td><td>{text(r['op'])}</td><td>{text(r['precision'])}</td>"
        f"<td class=n>{r['bytes']:,}</td><td class=n>{_decibels(r['sqnr_db'])}</td><td>{text(r['why'])}</td></tr>"
        for r in layers
    )
    page = f"""<!doctype html><meta charset="utf-8"><title>{text(plan.recipe)} plan</title>
<style>body{{font:14px sans-serif;margin:2em;max-width:70em}}td,th{{padding:.1em .8em .1em 0;text-align:left}}
.n{{text-align:right}}</style>
<h1>{text(str(plan.source.get("path", "plan")))}: {text(plan.recipe)}</h1>
<p>{text(plan.kind)}, {plan.weight_bytes:,} bytes of weights.</p>
<h2>Measured on held-out data</h2><table><tr><th>metric<th>value<th>95 %</tr>{facts}</table>
<h2>Error per layer</h2>{_bars(layers)}
<table><tr><th>layer<th>op<th>weights<th>bytes<th>SQNR dB<th>why</tr>{rows}</table>
"""
    with atomic_path(path) as temporary:
        temporary.write_text(page)


def _bounds(pair: Any) -> str:
    return f"{pair[0]:.5g} .. {pair[1]:.5g}" if isinstance(pair, list) and len(pair) == 2 else ""


def _decibels(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _bars(layers: list[dict[str, Any]]) -> str:
    known = [r for r in layers if r["sqnr_db"] is not None]
    if not known:
        return "<p>No layer was measured.</p>"
    width, height = max(4, min(16, 900 // len(known))), 160
    top = max(r["sqnr_db"] for r in known)
    bars = []
    for index, r in enumerate(known):
        tall = max(1.0, r["sqnr_db"] / max(top, 1) * height)
        bars.append(
            f'<rect x="{index * width}" y="{height - tall:.1f}" width="{width - 1}" height="{tall:.1f}" '
            f'fill="{_COLOURS.get(r["precision"], "#999999")}"><title>{html.escape(r["name"])}: '
            f"{r['sqnr_db']:.1f} dB, {r['precision']}</title></rect>"
        )
    return f'<svg width="{len(known) * width}" height="{height}">{"".join(bars)}</svg>'


def write_png(plan: Plan, path: str | os.PathLike) -> None:
    """A bar per layer: its signal-to-quantisation-noise ratio, coloured by precision."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError("plots need matplotlib: pip install narrowcast[plot]") from error
    known = [r for r in layers_of(plan) if r["sqnr_db"] is not None]
    figure = Figure(figsize=(max(6, len(known) * 0.12), 4), layout="constrained")
    axes = figure.subplots()
    colours = [_COLOURS.get(r["precision"], "#999999") for r in known]
    axes.bar(range(len(known)), [r["sqnr_db"] for r in known], color=colours)
    axes.set_xticks(range(len(known)), [r["name"] for r in known], rotation=90, fontsize=5)
    axes.set_ylabel("SQNR (dB)")
    axes.set_title(f"{plan.source.get('path', 'plan')}: {plan.recipe}")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
