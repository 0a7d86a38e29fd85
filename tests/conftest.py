"""Seeds, kernel variants by enumeration, and visible reasons for every skip."""

from __future__ import annotations

import os
import random
import time

import pytest
import torch

import narrowcast  # noqa: F401  (loads the ops)

# Collected by test_triton.py in processes of their own, or on a GPU.
collect_ignore = (
    [] if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available() else ["triton_kernels"]
)

torch.set_num_threads(int(os.environ.get("NARROWCAST_THREADS", "2")))


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=None, help="seed of every test's random inputs")


def pytest_configure(config):
    if config.getoption("--seed") is None:
        config.option.seed = int(time.time()) % 1_000_000


def pytest_report_header(config):
    ops = torch.ops.narrowcast
    return f"seed {config.option.seed} (repeat with --seed), CPU kernels up to {ops._isa()}"


@pytest.fixture(autouse=True)
def seed(request) -> int:
    """Fresh inputs in every run, repeatable by --seed."""
    value = request.config.option.seed
    torch.manual_seed(value)
    random.seed(value)
    return value


@pytest.fixture
def cli(monkeypatch, capsys):
    """Runs the command line in this process: ``cli("inspect", path).json``."""
    from command_line import runner

    return runner(monkeypatch, capsys)


def variants(op: str) -> list[str]:
    """The kernels of a list that run on this CPU, for ``pytest.mark.parametrize``."""
    return torch.ops.narrowcast._op_variants(op).split(",")


class forced:
    """``with forced("linear_int8", "avx2"):`` runs one kernel of a list only."""

    def __init__(self, op: str, variant: str):
        self.op, self.variant = op, variant

    def __enter__(self):
        torch.ops.narrowcast._force_variant(self.op, self.variant)

    def __exit__(self, *exception):
        torch.ops.narrowcast._force_variant(self.op, "")
