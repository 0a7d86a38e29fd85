"""The arena planner: intervals of life in, byte offsets out.

Largest first; each buffer goes into the smallest gap, among the buffers alive at the same time,
that holds it. The lower bound is the most bytes alive at any one step: no plan can be smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import Error

ALIGNMENT = 64  # one cache line, and one AVX-512 register


@dataclass(frozen=True)
class Interval:
    """A buffer of ``bytes`` that must survive from step ``first`` through step ``last``."""

    bytes: int
    first: int
    last: int


@dataclass(frozen=True)
class Arena:
    """offsets[i]: the place of interval i; bytes: the whole; lower_bound: what any plan needs."""

    offsets: list[int]
    bytes: int
    lower_bound: int


def _aligned(n: int) -> int:
    return (n + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def plan(intervals: Sequence[Interval]) -> Arena:
    """Places every interval in one arena, 64-byte aligned."""
    order = sorted(range(len(intervals)), key=lambda i: (-intervals[i].bytes, intervals[i].first))
    offsets = [0] * len(intervals)
    placed: list[tuple[int, int, int, int]] = []  # (offset, end, first, last)
    total = 0
    for i in order:
        b = intervals[i]
        if b.bytes == 0:
            continue
        size = _aligned(b.bytes)
        together = sorted(p[:2] for p in placed if p[2] <= b.last and b.first <= p[3])
        best, best_gap, cursor = -1, -1, 0
        for offset, end in together:
            gap = offset - cursor
            if gap >= size and (best < 0 or gap < best_gap):
                best, best_gap = cursor, gap
            cursor = max(cursor, end)
        offsets[i] = cursor if best < 0 else best
        placed.append((offsets[i], offsets[i] + size, b.first, b.last))
        total = max(total, offsets[i] + size)
    return Arena(offsets, total, lower_bound(intervals))


def lower_bound(intervals: Sequence[Interval]) -> int:
    """The most bytes, each buffer aligned, that are alive at one step."""
    change: dict[int, int] = {}
    for b in intervals:
        change[b.first] = change.get(b.first, 0) + _aligned(b.bytes)
        change[b.last + 1] = change.get(b.last + 1, 0) - _aligned(b.bytes)
    alive = most = 0
    for step in sorted(change):
        alive += change[step]
        most = max(most, alive)
    return most


def verify(intervals: Sequence[Interval], arena: Arena) -> None:
    """Raises when two buffers that live together share a byte, or one leaves the arena."""
    live: list[int] = []
    for i in sorted((i for i, b in enumerate(intervals) if b.bytes), key=lambda i: intervals[i].first):
        b, start = intervals[i], arena.offsets[i]
        if start % ALIGNMENT or start < 0 or start + b.bytes > arena.bytes:
            raise Error(f"memory plan: buffer {i} at {start} is unaligned or outside the arena")
        live = [j for j in live if intervals[j].last >= b.first]
        for j in live:
            if start < arena.offsets[j] + intervals[j].bytes and arena.offsets[j] < start + b.bytes:
                raise Error(f"memory plan: buffers {i} and {j} are alive together and overlap")
        live.append(i)
