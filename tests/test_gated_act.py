import math

import pytest
import torch

from conftest import forced, variants
from gated_act_cases import FORMS, SHAPES, operands
from narrowcast.kernels.gated_act import gated_act_ref as ref
from tolerances import assert_close

ops = torch.ops.narrowcast
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("variant", variants("gated_act"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op, options", FORMS)
def test_reference(variant, dtype, shape, op, options):
    gate, up = operands(shape, dtype)
    if shape == (1, 1):  # gelu of a large negative number is a difference of near equals
        gate = gate.abs()
    with forced("gated_act", variant):
        out = getattr(ops, op)(gate, up, *options)
    assert out.dtype == dtype
    assert_close(out, getattr(ref, op)(gate, up, *options))


@pytest.mark.parametrize("variant", variants("gated_act"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, group", [((3, 7), 0), ((2, 3, 64), 32), ((17, 384), 0)])
@pytest.mark.parametrize("op, options", FORMS)
def test_int8_is_quantize_of_the_float_result(variant, dtype, shape, group, op, options):
    gate, up = operands(shape, dtype)
    with forced("gated_act", variant):
        q, scale = getattr(ops, f"{op}_int8")(gate, up, *options, group)
        y = getattr(ops, op)(gate.float(), up.float(), *options)
    expected_q, expected_scale = ops.quantize_int8(y, group)
    assert torch.equal(q, expected_q) and torch.equal(scale, expected_scale)


@pytest.mark.parametrize("variant", variants("gated_act"))
def test_extremes(variant):
    gate = torch.tensor([[0.0, -0.0, 100.0, -100.0, 3e38, math.inf, math.nan, 1.0]])
    up = torch.full_like(gate, 2.0)
    with forced("gated_act", variant):
        for op in ("silu_mul", "gelu_mul"):
            y = getattr(ops, op)(gate, up)[0]
            assert y[:4].tolist() == [0, 0, 200, 0] and y[4] == math.inf
            assert y[5] == math.inf and y[6].isnan() and y[7].isfinite()
        ops.nan_count(reset=True)
        q, _ = ops.silu_mul_int8(gate, up)
        assert ops.nan_count() == 1 and q[0, 5:7].tolist() == [127, 0]


def test_strided_expanded_empty():
    merged = torch.randn(6, 128)
    for gate, up in (
        (merged[:, :64], merged[:, 64:]),
        (merged[::2, ::2], merged[::2, 1::2]),
        (merged[0].expand(4, 128), merged[:4]),
        (merged[0], merged[1]),
        (merged[:0], merged[:0]),
    ):
        assert_close(ops.silu_mul(gate, up), ref.silu_mul(gate, up))
        assert torch.equal(ops.silu_mul_int8(gate, up)[0], ops.quantize_int8(ops.silu_mul(gate, up))[0])
    assert ops.silu_mul_int8(merged[:3, :0], merged[:3, :0])[1].tolist() == [1, 1, 1]


def test_out():
    gate, up = operands((5, 96), torch.bfloat16)
    out = torch.full_like(gate, math.nan)
    ops.silu_mul.out(gate, up, out=out)
    assert torch.equal(out, ops.silu_mul(gate, up))
    ops.gelu_mul.out(gate, up, "tanh", out=out)
    assert torch.equal(out, ops.gelu_mul(gate, up, "tanh"))
    for bad, message in (
        (out.float(), "out must be bfloat16"),
        (out[:4], "out must be bfloat16"),
        (torch.empty(96, 5, dtype=torch.bfloat16).t(), "out must be contiguous"),
        (up, "out must not overlap"),
    ):
        with pytest.raises(RuntimeError, match=f"silu_mul: {message}"):
            ops.silu_mul.out(gate, up, out=bad)


def test_opcheck_and_compile():
    gate, up = operands((4, 64), torch.float32)
    for op, arguments in (
        (ops.silu_mul, (gate, up)),
        (ops.silu_mul_int8, (gate, up, 32)),
        (ops.gelu_mul, (gate, up, "tanh")),
        (ops.gelu_mul_int8, (gate, up)),
    ):
        torch.library.opcheck(op.default, arguments)
    torch.library.opcheck(ops.silu_mul.out, (gate, up), {"out": torch.empty_like(gate)})
    torch.library.opcheck(ops.gelu_mul.out, (gate, up), {"out": torch.empty_like(gate)})
    f = torch.compile(lambda g, u: ops.silu_mul(g, u) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(f(gate, up), ops.silu_mul(gate, up) + 1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"gate": torch.ones(2, 64, dtype=torch.int8)}, "gate must be float32"),
        ({"gate": torch.tensor(1.0)}, "gate must be float32"),
        ({"up": torch.ones(2, 63)}, "up must have the dtype and shape of gate"),
        ({"up": torch.ones(2, 64, dtype=torch.float16)}, "up must have the dtype and shape of gate"),
        ({"approximate": "sigmoid"}, "approximate must be none or tanh, got 'sigmoid'"),
        ({"group_size": 7}, "group_size must be 0"),
    ],
)
def test_bad_input(change, message):
    arguments = {"gate": torch.ones(2, 64), "up": torch.ones(2, 64)}
    with pytest.raises(RuntimeError, match=f"gelu_mul_int8: {message}"):
        ops.gelu_mul_int8(**(arguments | change))
