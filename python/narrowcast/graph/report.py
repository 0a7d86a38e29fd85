"""What is in a plan: rows per layer and per node, the report that a page and JSON share, a plot."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import Any, BinaryIO

from torch import fx

from narrowcast.errors import UnsupportedError
from narrowcast.files import atomic_path

from .plan import Plan
from .record import check_document, check_record
from .serialize import target_name

_PRODUCTS = {
    "linear", "mm", "addmm", "bmm", "baddbmm", "matmul", "conv1d", "conv2d", "conv3d", "convolution", "embedding",
    "linear_int8", "linear_dynamic_int8", "linear_grouped", "conv2d_int8",
}  # fmt: skip
_COLOURS = {"int8": "#2a7ab0", "int4": "#c4661f", "float32": "#777777"}
#: Metrics of which float32 has a value of its own or, measured against itself, this one.
_FLOAT32 = {"perplexity_increase": 0.0, "kl": 0.0, "same_top1": 1.0, "cosine": 1.0, "cosine_min": 1.0,
            "agreement": 1.0, "agreement_confident": 1.0}  # fmt: skip

Times = dict[str, dict[str, float]]


def layers_of(plan: Plan, times: Times | None = None) -> list[dict[str, Any]]:
    """A row per layer: first what compression looked at, then every other product with a weight of the plan.

    Keys: name, op, precision, bytes, sqnr_db (None: not measured), why, notes, group_size, alpha, damping, dead,
    and ms, milliseconds per case of ``times`` (case -> name of a node -> milliseconds; see runtime.timing).
    Bytes that two layers share, such as a tied table, count in the first of them.

    Raises FormatError for a record that compress would not have written.
    """
    check_record(plan.record)
    first = plan.record.get("first_damping")
    rows = [_recorded(entry, first) for entry in plan.record.get("layers") or []]
    owners = _owners(plan, [row["name"] for row in rows])
    reads = _reads(plan)
    of_node: dict[str, int] = {}
    for node, keys in reads.items():
        op = _op(node)
        found = sorted({index for key in keys for index in owners[key]})
        if found:
            same = [index for index in found if rows[index]["op"] == op]
            of_node[node.name] = same[0] if same else found[-1]
        elif keys and op in _PRODUCTS:
            rows.append(_found(plan, node, op, keys))
            for key in keys:
                owners[key].append(len(rows) - 1)
            of_node[node.name] = len(rows) - 1
    for key, indices in owners.items():
        if indices:
            rows[indices[0]]["bytes"] += plan.graph.weights[key].nbytes
    for case, nodes in (times or {}).items():
        for name, ms in nodes.items():
            if name in of_node:
                spent = rows[of_node[name]]["ms"]
                spent[case] = spent.get(case, 0.0) + ms
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


def report_of(plan: Plan, timing: dict[str, Any] | None = None) -> dict[str, Any]:
    """Everything that a plan says of itself, as plain JSON; the page shows exactly this.

    timing: what runtime.timing.time_layers measured here, or None. "data" is None for a plan without figures
    of its calibration data; "data_recorded" tells an earlier version from a plan that was made without data.

    Raises FormatError for a record or a certificate that compress would not have written.
    """
    check_document(plan.record, plan.certificate, plan.source)
    certificate = plan.certificate
    data = certificate.get("data")
    data_warnings = (data or {}).get("warnings", [])
    warnings = plan.record.get("warnings") or []
    layers = layers_of(plan, (timing or {}).get("nodes"))
    sizes: dict[str, dict[str, int]] = defaultdict(lambda: {"layers": 0, "bytes": 0})
    for row in layers:
        sizes[row["precision"]]["layers"] += 1
        sizes[row["precision"]]["bytes"] += row["bytes"]
    rest = plan.weight_bytes - sum(row["bytes"] for row in layers)
    return {
        "plan": str(plan.path) if plan.path is not None else None,
        "model": str(plan.source.get("name") or plan.source.get("path") or "an nn.Module"),
        "kind": plan.kind,
        "recipe": plan.recipe,
        "kv_cache": plan.record.get("kv_cache"),
        "written_by": plan.written_by,
        "bytes": plan.path.stat().st_size if plan.path is not None else None,
        "weight_bytes": plan.weight_bytes,
        "bytes_float32": plan.record.get("bytes_float32"),
        "bytes_source": plan.source.get("bytes"),
        "metrics": _metrics(certificate),
        "certificate": certificate,
        "precisions": {**sizes, "other weights": {"layers": 0, "bytes": rest}},
        "layers": layers,
        "left_in_float": [
            {"name": row["name"], "op": row["op"], "why": row["why"]}
            for row in layers
            if row["precision"].startswith(("float", "bfloat"))
        ],
        "notes": [w for w in warnings if w not in data_warnings],
        "data_recorded": "data" in certificate,
        "data": data,
        "timing": timing,
        "nodes": nodes_of(plan),
    }


# --- rows -----------------------------------------------------------------------------------------


def _recorded(entry: dict[str, Any], first_damping: float | None = None) -> dict[str, Any]:
    """The row of a layer of the record. first_damping: that of a Hessian which needed no second try."""
    notes, dead, damping = list(entry.get("notes", [])), entry.get("dead") or 0, entry.get("damping")
    if dead:
        notes.append(f"{dead} of its inputs were zero in all of the calibration data")
    if damping is not None and first_damping is not None and damping > first_damping:
        notes.append(f"rounded with damping {damping:g}")
    return {
        "name": entry.get("name", ""),
        "op": entry.get("op", ""),
        "precision": entry.get("precision", ""),
        "bytes": 0,
        "sqnr_db": entry.get("sqnr_db"),
        "why": entry.get("why", ""),
        "notes": notes,
        "group_size": entry.get("group_size") or 0,
        "alpha": entry.get("alpha"),
        "damping": damping,
        "dead": dead,
        "ms": {},
    }


def _found(plan: Plan, node: fx.Node, op: str, keys: list[str]) -> dict[str, Any]:
    """A layer that the record does not name: all of a float plan, and what a recipe does not change."""
    largest = max(keys, key=lambda key: plan.graph.weights[key].numel())
    precision = str(plan.graph.weights[largest].dtype).removeprefix("torch.")
    if op == "linear_grouped":
        precision = f"int{node.args[5] if len(node.args) > 5 else node.kwargs['bits']}"
    why = ""
    if plan.graph.weights[largest].is_floating_point():
        why = "the recipe is fp32" if plan.recipe == "fp32" else f"recipe {plan.recipe} does not change it"
    return _recorded({"name": largest.removesuffix(".weight"), "op": op, "precision": precision, "why": why})


def _op(node: fx.Node) -> str:
    """The plain name of a call: ``linear`` of ``narrowcast.linear.default`` and of ``aten.linear.default``."""
    return target_name(node.target).split(".")[1]


def _owners(plan: Plan, names: list[str]) -> dict[str, list[int]]:
    """For every weight the rows of the layer it belongs to: the longest name that its own begins with."""
    rows = defaultdict(list)
    for index, name in enumerate(names):
        rows[name].append(index)
    owners = {}
    for key in plan.graph.weights:
        name = key
        while name and name not in rows:
            name = name.rpartition(".")[0]
        owners[key] = list(rows.get(name, [])) if name else []
    return owners


def _reads(plan: Plan) -> dict[fx.Node, list[str]]:
    """The weights that each call reads, directly or through calls that read nothing else."""
    constant: dict[fx.Node, list[str]] = {}
    reads = {}
    for node in plan.graph.fx.nodes:
        if node.op == "get_attr":
            constant[node] = [str(node.target)]
        elif node.op == "call_function":
            inputs = node.all_input_nodes
            keys = [key for x in inputs for key in constant.get(x, [])]
            if inputs and all(x in constant for x in inputs):
                constant[node] = keys
            else:
                reads[node] = [key for key in keys if key in plan.graph.weights]
    return reads


def _metrics(certificate: dict[str, Any]) -> list[dict[str, Any]]:
    values, bounds = certificate.get("metrics") or {}, certificate.get("bounds") or {}
    rows = []
    for name, value in values.items():
        low, high = bounds.get(name, (None, None))
        before = values.get(f"{name}_float32", _FLOAT32.get(name))
        if not name.endswith("_float32"):
            rows.append({"name": name, "float32": before, "value": value, "low": low, "high": high})
    return rows


# --- the plot -------------------------------------------------------------------------------------


def write_png(plan: Plan, path: str | os.PathLike) -> None:
    """A bar per layer: its signal-to-quantisation-noise ratio, coloured by precision.

    Raises UnsupportedError without matplotlib, OSError when the file cannot be written.
    """
    with atomic_path(Path(path)) as temporary, open(temporary, "wb") as file:
        draw_png(layers_of(plan), f"{plan.source.get('path', 'plan')}: {plan.recipe}", file)


def draw_png(layers: list[dict[str, Any]], title: str, file: BinaryIO) -> None:
    """The plot of :func:`write_png` for rows of :func:`layers_of`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError("plots need matplotlib: pip install narrowcast[plot]") from error
    known = [r for r in layers if r["sqnr_db"] is not None]
    figure = Figure(figsize=(min(40, max(6, len(known) * 0.12)), 4), layout="constrained")
    axes = figure.subplots()
    for precision in sorted({r["precision"] for r in known}):
        places = [i for i, r in enumerate(known) if r["precision"] == precision]
        heights = [known[i]["sqnr_db"] for i in places]
        axes.bar(places, heights, color=_COLOURS.get(precision, "#999999"), label=precision)
    # A name may hold a dollar sign, which is no formula here.
    names = [r["name"] for r in known]
    axes.set_xticks(range(len(known)), names, rotation=90, fontsize=5, parse_math=False)
    axes.set_ylabel("SQNR (dB)")
    axes.set_title(title, parse_math=False)
    if known:
        axes.legend(title="weights")
    figure.savefig(file, dpi=150, format="png")
