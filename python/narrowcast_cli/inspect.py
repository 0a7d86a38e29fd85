"""``narrowcast inspect``: what is in a plan — nodes, precision, bytes, error per layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import output


def inspect(
    plan: Annotated[Path, typer.Argument(help="a .plan file")],
    nodes: Annotated[bool, typer.Option("--nodes", help="list every node of the graph")] = False,
    report: Annotated[
        Path | None, typer.Option(help="write one self-contained HTML page; times every layer here")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="write a plot of error and precision per layer")] = None,
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show a plan: its graph, the precision of every layer, bytes, measured error."""
    from narrowcast.files import check_writable
    from narrowcast.graph import Plan
    from narrowcast.graph.report import report_of, write_png

    for file in (report, png):
        if file is not None:
            check_writable(file)
    loaded = Plan.load(plan)
    content = report_of(loaded) if report is None else write_report(loaded, report)
    if png is not None:
        write_png(loaded, png)
    if json:
        output.print_json(content)
        return
    console = output.console()
    console.print(
        f"{plan}: {loaded.kind}, recipe {loaded.recipe}, {output.size(plan.stat().st_size)} "
        f"({output.size(loaded.weight_bytes)} of weights), from {loaded.source.get('name', 'an nn.Module')}"
    )
    for metric in content["metrics"]:
        console.print(f"  {metric['name']}: {metric['value']:.6g}")
    rows = [
        [
            layer["name"],
            layer["op"],
            layer["precision"],
            output.size(layer["bytes"]),
            "" if layer["sqnr_db"] is None else f"{layer['sqnr_db']:.1f}",
            "; ".join([layer["why"], *layer["notes"]] if layer["why"] else layer["notes"]),
        ]
        for layer in content["layers"]
    ]
    columns = ["layer", "op", "weights", "bytes", "SQNR dB", "why"]
    console.print(output.table("layers", columns, rows, {3, 4}))
    if nodes:
        rows = [[n["name"], n["op"], n["inputs"], n["source"]] for n in content["nodes"]]
        console.print(output.table("nodes", ["node", "op", "inputs", "source"], rows))
    for warning in [*content["notes"], *(content["data"] or {}).get("warnings", [])]:
        console.print(f"warning: {warning}", markup=False)
    for file in (report, png):
        if file is not None:
            console.print(f"wrote {file}")


def write_report(plan: Any, path: Path) -> dict[str, Any]:
    """Times the layers of a loaded plan, writes the page, and returns what is on it."""
    from narrowcast.errors import UnsupportedError
    from narrowcast.graph.page import write_page
    from narrowcast.graph.report import report_of
    from narrowcast.runtime.timing import time_layers

    try:
        timing = time_layers(plan)
    except UnsupportedError as error:  # the page is worth having without times
        output.console(stderr=True).print(f"layers are not timed: {error}", markup=False)
        timing = None
    content = report_of(plan, timing)
    write_page(content, path)
    return content
