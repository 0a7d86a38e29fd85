"""``narrowcast inspect``: what is in a plan — nodes, precision, bytes, error per layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import output


def inspect(
    plan: Annotated[Path, typer.Argument(help="a .plan file")],
    nodes: Annotated[bool, typer.Option("--nodes", help="list every node of the graph")] = False,
    html: Annotated[Path | None, typer.Option(help="write one self-contained HTML page")] = None,
    png: Annotated[Path | None, typer.Option(help="write a plot of error and precision per layer")] = None,
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show a plan: its graph, the precision of every layer, bytes, measured error."""
    from narrowcast.graph import Plan
    from narrowcast.graph.report import layers_of, nodes_of, write_html, write_png

    loaded = Plan.load(plan)
    layers = layers_of(loaded)
    if html is not None:
        write_html(loaded, html)
    if png is not None:
        write_png(loaded, png)
    if json:
        output.print_json(
            {
                "plan": str(plan),
                "kind": loaded.kind,
                "recipe": loaded.recipe,
                "bytes": plan.stat().st_size,
                "weight_bytes": loaded.weight_bytes,
                "certificate": loaded.certificate,
                "layers": layers,
                "nodes": nodes_of(loaded),
            }
        )
        return
    console = output.console()
    console.print(
        f"{plan}: {loaded.kind}, recipe {loaded.recipe}, {output.size(plan.stat().st_size)} "
        f"({output.size(loaded.weight_bytes)} of weights), from {loaded.source.get('name', 'an nn.Module')}"
    )
    for name, value in loaded.certificate.get("metrics", {}).items():
        console.print(f"  {name}: {value:.6g}" if isinstance(value, float) else f"  {name}: {value}")
    rows = [
        [
            layer["name"],
            layer["op"],
            layer["precision"],
            output.size(layer["bytes"]),
            "" if layer["sqnr_db"] is None else f"{layer['sqnr_db']:.1f}",
            layer["why"],
        ]
        for layer in layers
    ]
    columns = ["layer", "op", "weights", "bytes", "SQNR dB", "why"]
    console.print(output.table("layers", columns, rows, {3, 4}))
    if nodes:
        rows = [[n["name"], n["op"], n["inputs"], n["source"]] for n in nodes_of(loaded)]
        console.print(output.table("nodes", ["node", "op", "inputs", "source"], rows))
    for file in (html, png):
        if file is not None:
            console.print(f"wrote {file}")
