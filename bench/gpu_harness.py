"""GPU timings: device events, buffers that no cache holds, contenders in turns, floors measured in the same run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from harness import Timing, measure
from narrowcast.runtime.cuda_graphs import Moment

Call = Callable[[], Any]
#: Sets of inputs per case at most: small ones would need thousands to fill a cache twice.
MOST_SETS = 128


def clock_of(device: torch.device) -> Callable[[], Any]:
    return Moment if device.type == "cuda" else perf_counter


class Loop:
    """One contender over all sets of inputs: on a GPU one CUDA graph, so that launches cost it little.

    What refuses to be captured (it waits for the device) runs call by call; ``captured`` says which it was.
    """

    def __init__(self, calls: Sequence[Call], device: torch.device):
        self.calls = calls
        for call in (calls[0], *calls):  # compiled, tuned, allocated
            call()
        self.graph = _capture(calls) if device.type == "cuda" else None
        self.captured = self.graph is not None

    def __call__(self) -> None:
        if self.graph is not None:
            self.graph.replay()
        else:
            for call in self.calls:
                call()


def _capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph | None:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except RuntimeError:
        graph = None
    torch.cuda.synchronize()
    return graph


def timed(loops: Mapping[str, Loop], device: torch.device, seconds: float, rounds: int) -> dict[str, Timing]:
    """Seconds of one call of each contender: the median of turns in which all take part."""
    whole = measure(loops, seconds=seconds, rounds=rounds, clock=clock_of(device))
    timings = {}
    for name, timing in whole.items():
        timings[name] = Timing(timing / len(loops[name].calls))
        timings[name].spread = timing.spread
    return timings


def sets_for(input_bytes: int, cache_bytes: int) -> int:
    """How many sets of inputs it takes that one is gone from the cache before its turn comes again."""
    return max(2, min(MOST_SETS, -(-2 * cache_bytes // max(input_bytes, 1)) + 1))


class Draw:
    """Random operands on a device, repeatable; on ``meta`` shapes alone. Zeros would run faster than data do."""

    def __init__(self, device: torch.device | str, seed: int):
        self.device = torch.device(device)
        self.generator = None
        if self.device.type != "meta":
            self.generator = torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16, std: float = 1.0) -> Tensor:
        x = torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.float32)
        return x.mul_(std).to(dtype)

    def uniform(self, *shape: int, low: float = 0.5, high: float = 1.5) -> Tensor:
        x = torch.rand(shape, generator=self.generator, device=self.device, dtype=torch.float32)
        return x.mul_(high - low).add_(low)

    def codes(self, *shape: int, low: int = -127, high: int = 127, dtype: torch.dtype = torch.int8) -> Tensor:
        """low .. high, both included."""
        return torch.randint(low, high + 1, shape, generator=self.generator, device=self.device, dtype=dtype)


@dataclass(frozen=True)
class Floors:
    """What the device reached in this run: bytes per second (read and written), operations per second by kind."""

    bandwidth: float
    peaks: Mapping[str, float]

    def of(self, bytes_moved: float, operations: Mapping[str, float]) -> tuple[float, str]:
        """The least seconds, and what sets them. Operations of a kind without a measured peak do not count."""
        memory = bytes_moved / self.bandwidth
        arithmetic = sum(n / self.peaks[kind] for kind, n in operations.items() if kind in self.peaks)
        return (arithmetic, "tensor cores") if arithmetic > memory else (memory, "memory")


def measure_floors(
    device: torch.device, seed: int, *, side: int = 8192, copied: int = 1 << 30, seconds: float = 0.3
) -> Floors:
    """A copy of ``copied`` bytes and products of [side, side] by torch, on random data."""
    draw, clock = Draw(device, seed), clock_of(device)
    source = draw.codes(copied)
    target = torch.empty_like(source)
    a, b = draw.normal(side, side), draw.normal(side, side)
    qa, qb = draw.codes(side, side), draw.codes(side, side).t()
    calls: dict[str, Call] = {
        "copy": lambda: target.copy_(source), "bf16": lambda: a @ b, "int8": lambda: torch._int_mm(qa, qb),
    }  # fmt: skip
    best: dict[str, float] = {}
    for name, call in calls.items():
        try:
            best[name] = measure({name: call}, seconds=seconds, rounds=9, clock=clock)[name]
        except RuntimeError:
            if name == "copy":
                raise
    peaks = {kind: 2 * side**3 / s for kind, s in best.items() if kind != "copy"}
    return Floors(2 * copied / best["copy"], peaks)
