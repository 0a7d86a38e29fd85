"""What kernels make of a plan's weights is made once, in the first run, and its graphs read it; tape.py stands for CUDA's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from narrowcast.kernels.common.prepared import Prepared, _current, prepared
from narrowcast.runtime import Executor
from tape import Tape
from test_runtime import exported

#: Storages of which the op below made something for a plan. A replay calls its ops again, which a graph would not: those
#: calls find no store.
made: list[int] = []


@torch.library.custom_op("prepared_test::times_sum", mutates_args=())
def times_sum(x: Tensor, w: Tensor) -> Tensor:
    """x times the sums of the rows of w, as a kernel with a zero point needs them."""

    def make() -> Tensor:
        if _current.get() is not None:
            made.append(w.data_ptr())
        return w.sum(1)

    return x * prepared("sums", w, make)


@times_sum.register_fake
def _(x, w):
    return torch.empty_like(x)


class Two(nn.Module):
    """The op on two weights, one of them twice, and on a tensor that every run makes anew."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(6, 9)) for _ in range(2))

    def forward(self, x):
        y = times_sum(times_sum(times_sum(x, self.a), self.b), self.a)
        return times_sum(y, x.mean(0)[:, None] * self.a)


@pytest.mark.parametrize("alone", [(), ("prepared_test.times_sum",)])
def test_a_plan_makes_it_once(alone):
    module = Two().requires_grad_(False)
    exe = Executor(exported(module, torch.randn(4, 6)), device="cpu", threads=1)
    exe.graphs = Tape(alone)
    made.clear()
    weights = {w.data_ptr() for w in exe._shared.weights.values()}
    before = exe.memory(torch.randn(4, 6))["packed"]
    for rows in (4, 4, 7, 4, 7, 7):
        x = torch.randn(rows, 6)
        torch.testing.assert_close(exe(x), module(x))
        assert sorted(w for w in made if w in weights) == sorted(weights)
    exe.profile(x, repeats=1, warmup=0)
    assert sum(w in weights for w in made) == len(weights) == 2
    assert exe.memory(torch.randn(4, 6))["packed"] == before + 2 * 6 * 4


def test_what_is_kept():
    a, b = torch.randn(4, 6), torch.randn(4, 6)
    count = 0

    def sums(w: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return w.sum(1)

    def asked(w: Tensor, what: str = "sums") -> Tensor:
        return prepared(what, w, lambda: sums(w))

    store = Prepared([a])
    assert asked(a) is not asked(a)  # nobody said that it stays as it is
    with store.use(keep=False):  # a recording: its results are the graph's
        assert asked(a) is not asked(a) and store.bytes == 0
    with store.use():
        assert asked(a) is asked(a) and asked(a.view(4, 6)) is asked(a)
        assert asked(a.t()) is not asked(a) and torch.equal(asked(a.t()), a.sum(0))
        assert asked(a[1:]) is not asked(a) and asked(a, "others") is not asked(a)
        assert asked(b) is not asked(b)  # not a weight
        with Prepared([b]).use():
            assert asked(b) is asked(b) and asked(a) is not asked(a)
        kept = asked(a)
    with store.use(keep=False):
        assert asked(a) is kept
    assert asked(a) is not kept and store.bytes == (4 + 6 + 3 + 4) * 4
    before = count
    with store.use():
        asked(a), asked(a.t()), asked(a[1:]), asked(a, "others")
    assert count == before
