import random

import pytest

from narrowcast.errors import Error
from narrowcast.runtime import memory
from narrowcast.runtime.memory import Arena, Interval


def intervals(count, steps, most_bytes):
    result = []
    for _ in range(count):
        first = random.randrange(steps)
        last = min(steps, first + int(random.expovariate(0.3)))
        result.append(Interval(random.choice([0, 1, 63, 64, 65, random.randrange(most_bytes)]), first, last))
    return result


@pytest.mark.parametrize("count, steps", [(0, 1), (1, 1), (7, 3), (60, 20), (300, 100)])
def test_no_two_live_buffers_overlap(count, steps):
    for _ in range(10):
        live = intervals(count, steps, 1 << 20)
        arena = memory.plan(live)
        memory.verify(live, arena)
        most = max(
            (sum(-(-b.bytes // 64) * 64 for b in live if b.first <= t <= b.last) for t in range(steps + 1)),
            default=0,
        )
        assert arena.lower_bound == most <= arena.bytes


def test_chain_needs_the_two_largest_neighbours():
    live = [Interval(64 * size, i, i + 1) for i, size in enumerate([1, 5, 3, 2, 9, 4])]
    assert memory.plan(live).bytes == memory.plan(live).lower_bound == 64 * 13


def test_smallest_sufficient_gap_is_taken():
    live = [
        Interval(640, 0, 9), Interval(512, 0, 4), Interval(448, 0, 9), Interval(320, 0, 4),
        Interval(312, 0, 9), Interval(300, 5, 9),
    ]  # fmt: skip
    arena = memory.plan(live)
    assert arena.offsets[5] == arena.offsets[3]  # 320 bytes fit better than 512
    assert arena.bytes == arena.lower_bound


@pytest.mark.parametrize(
    "offsets, bytes, message",
    [([0, 0], 128, "overlap"), ([0, 32], 128, "unaligned"), ([0, 64], 100, "outside")],
)
def test_verifier_sees_bad_plans(offsets, bytes, message):
    with pytest.raises(Error, match=message):
        memory.verify([Interval(64, 0, 1), Interval(64, 1, 2)], Arena(offsets, bytes, 128))
