"""Everything here needs a GPU: elsewhere each test is skipped and says so.

``--room ROOM`` keeps one room's ops; ``--json PATH`` writes which op passed on which backend: the rows that
tools/verified.py turns into proofs.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

import narrowcast
from narrowcast import dispatch

HERE = Path(__file__).parent
REASON = "needs a CUDA device, and torch sees none here"


def pytest_addoption(parser):
    parser.addoption("--room", default=None, help="only the ops of this room")
    parser.addoption("--json", default=None, help="write which op passed on which backend")


def pytest_collection_modifyitems(config, items):
    room = config.getoption("--room", default=None)
    for item in [i for i in items if HERE in i.path.parents]:
        item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=REASON))
        op = _op_of(item)
        if room and op and dispatch.ROOM_OF[op] != room:
            items.remove(item)


def _op_of(item) -> str | None:
    return item.callspec.params.get("op") if hasattr(item, "callspec") else None


_outcomes: dict[tuple[str, str], Counter[str]] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    op = _op_of(item)
    if op and HERE in item.path.parents and (call.when == "call" or report.failed):
        key = op, item.callspec.params["backend"]
        _outcomes.setdefault(key, Counter())[report.outcome] += 1
    return report


def pytest_sessionfinish(session):
    path = session.config.getoption("--json", default=None)
    if not path or not torch.cuda.is_available():
        return
    gpu = torch.cuda.get_device_properties(0)
    rows = [
        {
            "op": op,
            "backend": backend,
            "arch": f"sm_{gpu.major}{gpu.minor}",
            "passed": counts["passed"],
            "failed": counts["failed"],
            "sources": None if backend == "reference" else dispatch.source_hash(op, backend),
            "device": gpu.name,
            "uuid": str(gpu.uuid),
            "seed": session.config.option.seed,
            "versions": {"narrowcast": narrowcast.__version__, "torch": torch.__version__},
        }
        for (op, backend), counts in sorted(_outcomes.items())
    ]
    Path(path).write_text(json.dumps(rows, indent=1) + "\n")
