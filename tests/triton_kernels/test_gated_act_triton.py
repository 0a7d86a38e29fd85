import math

import pytest
import torch

from conftest import LOADED, STORED
from gated_act_cases import FORMS, SHAPES, operands
from narrowcast.kernels.gated_act import gated_act_ref as ref
from narrowcast.kernels.gated_act import gated_act_triton as ours
from narrowcast.kernels.quantize import nan_count, quantize_triton
from tolerances import assert_close


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op, options", FORMS)
def test_reference(dtype, shape, op, options):
    gate, up = operands(shape, dtype)
    if shape == (1, 1):  # gelu of a large negative number is a difference of near equals
        gate = gate.abs()
    out = getattr(ours, op)(gate, up, *options)
    assert out.dtype == dtype
    assert_close(out, getattr(ref, op)(gate, up, *options))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("dtype", LOADED)
@pytest.mark.parametrize(
    "shape, group",
    [((3, 7), 0), ((2, 3, 64), 32), ((7, 384), 0), ((3, 192), 96), ((2, 3000), 8), ((1, 16500), 0)],
)
@pytest.mark.parametrize("op, options", FORMS)
def test_int8_is_quantize_of_the_float_result(dtype, shape, group, op, options):
    gate, up = operands(shape, dtype)
    q, scale = getattr(ours, f"{op}_int8")(gate, up, *options, group)
    y = getattr(ours, op)(gate.float(), up.float(), *options)
    expected_q, expected_scale = quantize_triton.quantize_int8(y, group)
    assert torch.equal(q, expected_q) and torch.equal(scale, expected_scale)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_extremes():
    gate = torch.tensor([[0.0, -0.0, 100.0, -100.0, 3e38, math.inf, math.nan, 1.0]])
    up = torch.full_like(gate, 2.0)
    for op, options in FORMS:
        y = getattr(ours, op)(gate, up, *options)[0]
        assert y[:4].tolist() == [0, 0, 200, 0] and y[4] == math.inf
        assert y[5] == math.inf and y[6].isnan() and y[7].isfinite()
    nan_count(reset=True)
    q, _ = ours.silu_mul_int8(gate, up)
    assert nan_count() == 1 and q[0, 5:7].tolist() == [127, 0]


def test_strided_expanded_empty():
    merged = torch.randn(6, 128)
    for gate, up in (
        (merged[:, :64], merged[:, 64:]),
        (merged[::2, ::2], merged[::2, 1::2]),
        (merged[0].expand(4, 128), merged[:4]),
        (merged[0], merged[1]),
        (merged[:0], merged[:0]),
    ):
        assert_close(ours.silu_mul(gate, up), ref.silu_mul(gate, up))
        expected = quantize_triton.quantize_int8(ours.silu_mul(gate, up))
        assert all(map(torch.equal, ours.silu_mul_int8(gate, up), expected))
    assert ours.silu_mul_int8(merged[:3, :0], merged[:3, :0])[1].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"gate": torch.ones(2, 64, dtype=torch.float64)}, "gate must be float32"),
        ({"gate": torch.tensor(1.0)}, "gate must be float32"),
        ({"up": torch.ones(3, 64)}, "up must have the dtype and shape of gate"),
        ({"up": torch.ones(2, 64, dtype=torch.float16)}, "up must have the dtype"),
        ({"up": torch.ones(2, 64, device="meta")}, "up must be on"),
        ({"approximate": "erf"}, "approximate must be none or tanh, got 'erf'"),
        ({"group_size": 7}, "group_size must be 0"),
    ],
)
def test_bad_input(change, message):
    x = torch.ones(2, 64)
    change = {
        k: v.to(x.device) if isinstance(v, torch.Tensor) and not v.is_meta else v for k, v in change.items()
    }
    with pytest.raises(RuntimeError, match=f"gelu_mul_int8: {message}"):
        ours.gelu_mul_int8(**({"gate": x, "up": x} | change))
