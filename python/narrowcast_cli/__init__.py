"""The command line: ``narrowcast compress | run | eval | bench | inspect | verify | doctor``. One file per verb.

Nothing here imports torch or narrowcast before a verb runs, so that ``--help`` is immediate.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the console script."""
    import typer

    from . import bench, compress, doctor, evaluate, inspect, output, run, verify

    app = typer.Typer(
        name="narrowcast",
        help="Compress real transformers and CNNs to INT8 / INT4, prove what that cost, and run them.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.command()(compress.compress)
    app.command()(run.run)
    app.command("eval")(evaluate.evaluate)
    app.command()(bench.bench)
    app.command()(inspect.inspect)
    app.command()(verify.verify)
    app.command()(doctor.doctor)
    sys.exit(output.run(app))
