"""The table of bench_compression.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def accuracy_shown(accuracy: Mapping[str, Any]) -> list[str]:
    """Cells of the table: the metrics of the row's model."""
    if "English" in accuracy:
        sets = ("English", "code", "Spanish", "SQL")
        return [f"{accuracy[s]['cosine']:.5f} / {accuracy[s]['cosine_min']:.5f}" for s in sets]
    if "agreement" in accuracy:
        return [
            f"{accuracy['agreement']:.4f}", f"{accuracy.get('agreement_confident', math.nan):.4f}",
            f"{accuracy['kl']:.5f}",
        ]  # fmt: skip
    return [
        f"{accuracy['perplexity_increase']:+.4%}",
        f"{accuracy['kl']:.5f}",
        f"{accuracy['same_top1']:.4f}",
    ]


HEADINGS = {
    "MiniLM-L6": ("English cosine / least", "code", "Spanish", "SQL"),
    "EfficientNet-Lite0": ("agreement", "confident", "KL"),
    "SmolLM2-135M": ("perplexity", "KL", "same top 1"),
}


def show(rows: Sequence[dict]) -> None:
    console = Console(width=max(Console().width, 170))
    for model in dict.fromkeys(row["model"] for row in rows):
        table = Table(title=model, title_justify="left", header_style="bold")
        for heading in ("tool", "recipe", *HEADINGS[model], "of nearest", "s", "CPU s", "MB", "ms"):
            table.add_column(heading, justify="left" if heading in ("tool", "recipe") else "right")
        for row in (r for r in rows if r["model"] == model):
            if "reason" in row:
                table.add_row(row["tool"], row["recipe"], f"[dim]{row['reason']}[/dim]")
                continue
            share = f"{row['share_of_nearest']:.2f}" if "share_of_nearest" in row else ""
            table.add_row(
                row["tool"], row["recipe"], *accuracy_shown(row["accuracy"]), share, f"{row['seconds']:.1f}",
                f"{row['cpu_seconds']:.1f}", f"{row['bytes'] / 1e6:.1f}",
                ", ".join(f"{ms:.2f} ({case})" for case, ms in row.get("latency_ms", {}).items()),
            )  # fmt: skip
        console.print(table)
