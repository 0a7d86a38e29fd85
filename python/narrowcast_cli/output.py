"""What every verb shares: the two streams, JSON, progress, and errors that end in an exit code."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

DONE, FAILED, BAD_ARGUMENTS, VERIFICATION_FAILED = 0, 1, 2, 3


def console(stderr: bool = False):
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def print_json(data: Any) -> None:
    # As one text: an error must not leave half a document behind.
    sys.stdout.write(json.dumps(data, indent=2, allow_nan=False, default=str) + "\n")


def table(title: str, columns: list[str], rows: list[list[str]], right: set[int] = frozenset()):
    """A rich table; ``right``: indices of right-aligned columns."""
    from rich.table import Table

    result = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        result.add_column(column, justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        result.add_row(*row)
    return result


def size(count: float) -> str:
    """97.6 MB"""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


@contextmanager
def progress(quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """A callback (what, done, total) that draws a bar with the time left, on the error stream."""
    if quiet or not sys.stderr.isatty():
        last = {"what": "", "time": 0.0}

        def plain(what: str, done: int, total: int) -> None:
            # Logs get a line per stage, and one every ten seconds of a long one.
            now = time.monotonic()
            if not quiet and (what != last["what"] or now - last["time"] > 10):
                print(f"{what}: {done}/{total}", file=sys.stderr, flush=True)
                last.update(what=what, time=now)

        yield plain
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def draw(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield draw


def run(app: Callable[[], None]) -> int:
    """Calls a typer app; errors become one line on the error stream and an exit code, never a traceback."""
    try:
        code = app(standalone_mode=False)
        return code if isinstance(code, int) else DONE  # what a verb exits with comes back as a number
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return FAILED
    except Exception as error:
        return _explain(error)


def _explain(error: Exception) -> int:
    # Compared by name: importing narrowcast here would import torch for `--help`, and typer brings click
    # along under a name of its own, or uses the installed one, by its version.
    kinds = [kind.__name__ for kind in type(error).__mro__]
    if "Exit" in kinds:
        return error.exit_code
    if "Abort" in kinds:
        print("interrupted", file=sys.stderr)
        return FAILED
    if "ClickException" in kinds:
        error.show()
        return BAD_ARGUMENTS
    if "Error" in kinds or isinstance(error, OSError | RuntimeError | MemoryError):
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        print(f"narrowcast: {'; '.join(lines) or type(error).__name__}", file=sys.stderr)
        if "VerificationError" in kinds:
            return VERIFICATION_FAILED
        return BAD_ARGUMENTS if "ArgumentError" in kinds else FAILED
    raise error
