"""Rounding of weights: never worse than nearest, exact about what it made, and loud about what it could not do."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from narrowcast.compress.gptq import INT4, INT4_SYMMETRIC, INT8, PASSES, Grid, round_weight
from narrowcast.errors import ArgumentError

GRIDS = [INT4, INT4_SYMMETRIC, INT8, Grid(-127, 127, False, half=False)]


def correlated(rows: int, k: int) -> torch.Tensor:
    """Inputs whose columns depend on each other and differ in size, as those of real layers do."""
    return torch.randn(rows, k) @ (torch.randn(k, k) * 0.2) + torch.randn(k) * torch.rand(rows, 1)


def moments(x: torch.Tensor) -> torch.Tensor:
    return x.t() @ x / x.shape[0]


def loss(weight, other, hessian) -> float:
    change = (weight - other).double()
    return ((change @ hessian.double()) * change).sum().item()


@pytest.mark.parametrize(
    "n, k, group", [(17, 32, 32), (31, 64, 32), (33, 96, 32), (70, 128, 64), (5, 192, 192)]
)
@pytest.mark.parametrize("grid", GRIDS)
def test_better_than_nearest_on_held_out_inputs(grid, n, k, group):
    x, weight = correlated(40 * k, k), torch.randn(n, k)
    train, test = moments(x[::2]), moments(x[1::2])
    nearest = round_weight(weight, None, grid, group)
    ours = round_weight(weight, train, grid, group)
    assert loss(weight, ours.dequantize(), test) < 0.9 * loss(weight, nearest.dequantize(), test)
    assert ours.codes.min() >= grid.low and ours.codes.max() <= grid.high
    reached = loss(weight, ours.dequantize(), train) / loss(weight, 0 * weight, train)
    assert ours.error == pytest.approx(reached, rel=1e-2)


@pytest.mark.parametrize("grid", GRIDS)
def test_trust_is_the_share_of_moments_between_inputs(grid):
    hessian, weight = moments(correlated(500, 64)), torch.randn(20, 64)
    diagonal = hessian.diagonal().diag()
    for trust in (0.0, 0.5, 1.0):
        given = round_weight(weight, hessian, grid, 32, trust)
        mixed = round_weight(weight, trust * hessian + (1 - trust) * diagonal, grid, 32)
        torch.testing.assert_close(given.scale, mixed.scale, rtol=1e-3, atol=0)
        # A product rounded the other way may tip a code over.
        assert (given.codes != mixed.codes).float().mean() < 0.05
        reached = loss(weight, given.dequantize(), hessian) / loss(weight, 0 * weight, hessian)
        assert given.error == pytest.approx(reached, rel=1e-2)


def test_less_trust_helps_where_data_is_little():
    gained = []
    for _ in range(6):
        x, weight = correlated(4096 + 48, 64), torch.randn(24, 64)
        few, test = moments(x[:48]), moments(x[48:])
        errors = [
            loss(weight, round_weight(weight, few, INT4, 32, trust).dequantize(), test)
            for trust in (1.0, 0.7)
        ]
        gained.append(errors[0] / errors[1])
    assert sum(gained) / len(gained) > 1


@pytest.mark.parametrize("n", [1, 20])
@pytest.mark.parametrize("grid", [INT4, INT4_SYMMETRIC, INT8])
def test_the_stored_weight_is_what_was_measured(grid, n):
    rounded = round_weight(torch.randn(n, 96), moments(correlated(500, 96)), grid, 32)
    assert torch.equal(rounded.weight().dequantize(), rounded.dequantize())
    if grid.zero_point:
        zero = -rounded.offset / rounded.scale
        assert (zero - zero.round()).abs().max() < 0.01 and zero.min() > -0.01 and zero.max() < 15.01


def test_refinement_never_adds_error(monkeypatch):
    weight, hessian = torch.randn(40, 128), moments(correlated(2000, 128))
    errors = []
    for passes in range(4):
        monkeypatch.setattr("narrowcast.compress.gptq.PASSES", passes)
        errors.append(round_weight(weight, hessian, INT4, 32).error)
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in pairwise(errors))
    assert errors[3] < 0.95 * errors[0] and PASSES >= 1


def test_threads_do_not_change_a_bit():
    weight, hessian = torch.randn(200, 96), moments(correlated(1000, 96))
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(round_weight(weight, hessian, INT4, 32))
    torch.set_num_threads(before)
    for other in results[1:]:
        for part in ("codes", "scale", "offset"):
            assert torch.equal(getattr(results[0], part), getattr(other, part))


# --- what can be wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize("hessian", [None, torch.zeros(64, 64)])
def test_without_data_nearest_and_said_so(hessian):
    weight = torch.randn(7, 64)
    rounded = round_weight(weight, hessian, INT4, 32)
    assert rounded.notes == ["no calibration data reached it: rounded to nearest"] and rounded.dead == 64
    assert ((rounded.dequantize() - weight).norm() / weight.norm()) < 0.12


def test_dead_inputs_are_counted_and_rounded_to_nearest():
    x, weight = correlated(2000, 64), torch.randn(16, 64)
    x[:, 5], x[:, 40:44] = 0, 0
    rounded = round_weight(weight, moments(x), INT4, 32)
    assert rounded.dead == 5 and not rounded.notes
    grid = torch.arange(INT4.low, INT4.high + 1).view(-1, 1)
    for k in [5, 40, 41, 42, 43]:  # the scales are chosen for the live inputs: a dead one may be clipped
        scale, offset = rounded.scale[:, k // 32], rounded.offset[:, k // 32]
        nearest = (grid * scale + offset - weight[:, k]).abs().amin(0)
        error = (rounded.dequantize()[:, k] - weight[:, k]).abs()
        torch.testing.assert_close(error, nearest, rtol=1e-5, atol=1e-6)


def test_fewer_rows_than_inputs():
    x, weight = torch.randn(9, 96), torch.randn(16, 96)
    rounded = round_weight(weight, moments(x), INT4, 32)
    nearest = round_weight(weight, None, INT4, 32)
    assert loss(weight, rounded.dequantize(), moments(x)) < loss(weight, nearest.dequantize(), moments(x))
    assert ((rounded.dequantize() - weight).norm() / weight.norm()) < 0.5


def test_damping_grows_until_the_hessian_can_be_factored_and_is_reported():
    hessian = torch.eye(32)
    hessian[3, 4] = hessian[4, 3] = 1.05  # not positive definite until 0.05 is added
    rounded = round_weight(torch.randn(4, 32), hessian, INT4, 32)
    assert rounded.damping == 0.1
    assert rounded.notes == ["its Hessian could not be factored with damping 0.01"]


def test_a_hopeless_hessian_is_reported():
    hessian = torch.eye(32)
    hessian[3, 4] = hessian[4, 3] = 50.0
    rounded = round_weight(torch.randn(4, 32), hessian, INT4, 32)
    assert len(rounded.notes) == 4 and "GPTQ was left out" in rounded.notes[-1]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": torch.full((4, 64), float("nan"))}, "weight must be finite"),
        ({"hessian": torch.full((64, 64), float("inf"))}, "hessian must be finite"),
        ({"hessian": torch.eye(32)}, r"hessian must be finite \[64, 64\], got \[32, 32\]"),
        ({"group_size": 48}, "group_size must divide K = 64, got 48"),
        ({"group_size": 0}, "group_size must divide K = 64, got 0"),
    ],
)
def test_refusals(change, message):
    good = {"weight": torch.randn(4, 64), "hessian": torch.eye(64), "grid": INT4, "group_size": 32}
    with pytest.raises(ArgumentError, match=message):
        round_weight(**(good | change))


def test_weights_of_zero_stay_zero():
    for grid in GRIDS:
        rounded = round_weight(torch.zeros(3, 64), moments(correlated(200, 64)), grid, 32)
        assert not rounded.dequantize().any()
