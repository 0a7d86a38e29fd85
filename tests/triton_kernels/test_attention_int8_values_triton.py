"""The all-integer form of attention_int8: against its derived bound, element by element."""

import pytest
import torch
from test_attention_int8_triton import exact_keys

from attention_cases import SHAPES, operands
from attention_int8_cases import QUANTIZED, SAME_CODES
from conftest import DEVICE, STORED
from narrowcast.kernels.attention import attention_ref as exact
from narrowcast.kernels.attention.attention_checks import attention_arguments
from narrowcast.kernels.attention_int8 import attention_int8_ref as ref
from narrowcast.kernels.attention_int8 import attention_int8_triton as room
from narrowcast.kernels.attention_int8 import attention_int8_values_triton as ours
from tolerances import assert_close


def integer(*arguments, **options):
    return room.attention_all_int8(*arguments, **options)


def assert_within(out, q, k, v, bias=None, message="", **options):
    """Of the float64 continuation of the same scores; the rest is float32 sums and the dtype of the result."""
    expected = ref.attention_int8(q, k, v, bias, **options)
    bound = 1.001 * ref.integer_values_bound(q, k, v, bias, **options)
    # Sums and rounding scale with what is summed, not with what is left of it.
    bound += SAME_CODES[out.dtype] * ref.attention_int8(q, k, v.abs(), bias, **options)
    worst = ((out.double() - expected).abs() / bound.clamp(min=1e-300)).nan_to_num(0).max().item()
    assert worst <= 1, f"{message} {worst:.3g} of the bound"


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize(
    "shape", [*SHAPES[:2], (1, 4, 2, 17, 70, 64, 64), SHAPES[5], (1, 2, 1, 9, 50, 80, 96)]
)
def test_shapes_and_masks(dtype, shape):
    q, _, v = operands(*shape, dtype)
    k = exact_keys(shape[0], shape[2], *shape[4:6]).to(dtype)
    for causal, window in [(False, 0), (True, 0), (True, 3), (False, 4)]:
        out, masks = integer(q, k, v, None, None, causal, window), {"causal": causal, "window": window}
        assert_within(out, q, k, v, message=str(masks), **masks)
        assert_close(out, exact.attention(q, k, v, **masks), 2 * QUANTIZED, str(masks))


@pytest.mark.parametrize(
    "shape", [(1, 2, 2, 32, 32, 32, 32), (1, 2, 2, 5, 300, 128, 96), (1, 1, 1, 5, 70, 256, 160)]
)
def test_normal_inputs(shape):
    q, k, v = operands(*shape, torch.float16)
    assert_close(integer(q, k, v), exact.attention(q, k, v), QUANTIZED)


def test_every_option_at_once():
    q, _, v = operands(1, 2, 1, 11, 70, 40, 24)
    k = exact_keys(1, 1, 70, 40) + 0.5
    options = {"scale": 0.3, "causal": True, "window": 30, "softcap": 2.5, "sinks": torch.randn(2)}
    hidden = torch.randn(1, 1, 1, 70)
    hidden[..., 60] = -torch.inf
    for bias in (None, torch.randn(1, 2, 11, 70), hidden.bfloat16()):
        assert_within(integer(q, k, v, bias, **options), q, k, v, bias, **options)
    assert_within(integer(q, k, v, scale=-0.3), q, k, v, scale=-0.3)


def test_packed_sequences():
    lengths = [(5, 9), (0, 3), (37, 68), (8, 0), (3, 130)]
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0, dtype=torch.int32) for x in zip(*lengths, strict=True))
    q, k, v = (t.half() for t in (torch.randn(53, 2, 32), exact_keys(210, 1, 32), torch.randn(210, 1, 32)))
    out = integer(q, k, v, None, None, True, 0, 0.0, cu_q, cu_k)
    for i in range(len(lengths)):
        parts = q[cu_q[i] : cu_q[i + 1]], k[cu_k[i] : cu_k[i + 1]], v[cu_k[i] : cu_k[i + 1]]
        if all(len(t) for t in parts):
            parts = [t.transpose(0, 1)[None] for t in parts]
            o = out[cu_q[i] : cu_q[i + 1]].transpose(0, 1)[None]
            assert_within(o, *parts, causal=True)
    assert (out[42:50] == 0).all()  # no keys at all
    for cu_q, cu_k in (([0, 90], [0, 310]), ([-5, 4, -300, 9], [-7, 20, -300, 11]), ([3, 3], [0, 11])):
        cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in (cu_q, cu_k))
        integer(q, k, v, None, None, True, 0, 0.0, cu_q, cu_k)  # reads nothing outside


@pytest.mark.parametrize("depth", [1, 24, 80, 200])
def test_codes_of_the_values(depth):
    q, k, v = operands(2, 2, 2, 1, 150, 32, depth)
    v[0, 1, 7, 0], v[1, 0, 3, depth - 1], v[1, 1, 9], v[0, 0, 4] = torch.inf, torch.nan, 0, v[0, 0, 4] * 1e-30
    codes, logs, inverses, sums, top = ours.quantize_values(attention_arguments("attention_int8", q, k, v))
    codes, logs, inverses = (
        t.unflatten(-1, (2, 192)).movedim(-2, 0)[..., :150] for t in (codes, logs, inverses)
    )
    assert (codes[:, :, depth:] == 0).all()
    finite = v.isfinite().all(-1)
    scale = v.nan_to_num(0, 0, 0).abs().amax(-1) / 127
    assert torch.equal(top, scale.amax(-1))
    scale = scale.clamp(min=2.0**-40 * top[..., None])
    expected = torch.where(finite[..., None], (v * (1 / scale)[..., None]).round(), 0)
    assert torch.equal(codes[:, :, :depth].transpose(-1, -2).float(), expected)
    assert torch.equal(logs.isfinite(), finite)
    share = scale / top[..., None]
    assert_close(logs[finite].exp2(), share[finite], 1e-5)
    assert_close(inverses[finite], 1 / share[finite], 1e-6)
    by_32 = torch.nn.functional.pad(expected, (0, 0, 0, 42)).unflatten(2, (6, 32)).sum(3)
    assert torch.equal(sums.unflatten(1, (2, 6)).transpose(0, 1)[..., :depth].float(), by_32)


def test_small_values_beside_large_ones():
    """An attention sink: one key that most weight goes to, whose values are tiny. Scales of columns would lose them."""
    q, k, v = operands(1, 1, 1, 40, 150, 32, 32)
    k[:, :, 0] = 3 * q.mean(2) / q.mean(2).norm(dim=-1, keepdim=True)
    q = q + 4 * k[:, :, :1]
    v[:, :, 0] *= 1e-3
    out = integer(q, k, v)
    assert_within(out, q, k, v)
    assert_close(out, ref.attention_int8(q, k, v), QUANTIZED)
    for factor in (1e-30, 0.0, 1e30):  # of one key: less and more than its codes can follow
        v[:, :, 3] = factor * torch.randn(32)
        assert_within(integer(q, k, v), q, k, v, message=str(factor))
    assert (integer(q, k, v * 0) == 0).all()


@pytest.mark.parametrize("dtype", STORED)
def test_values_that_are_not_finite(dtype):
    q, _, v = operands(1, 1, 1, 6, 6, 16, 8, dtype)
    k = exact_keys(1, 1, 6, 16).to(dtype)
    v[0, 0, 5, 2] = torch.nan
    out = integer(q, k, v, None, 0.5, True)
    assert_within(
        out[:, :, :5], q[:, :, :5], k, v.nan_to_num(0), scale=0.5, bias=torch.full((5, 6), -torch.inf).triu(1)
    )
    assert out[0, 0, 5].isnan().all()
    hide = torch.zeros(6)
    hide[5] = -torch.inf
    assert integer(q, k, v, hide, 0.5).isfinite().all()
    q[0, 0, 2, 0] = torch.nan
    assert integer(q, k, v, hide, 0.5).isnan().any(-1).tolist() == [[[i == 2 for i in range(6)]]]


def test_constant_rows_and_large_scores():
    q, _, v = operands(1, 2, 1, 3, 70, 8, 8)
    k = exact_keys(1, 1, 70, 8)
    assert_within(integer(q, torch.ones_like(k), v), q, torch.ones_like(k), v)
    assert_within(integer(q * 1000, k, v), q * 1000, k, v)  # a rounded weight of 256 would be one of 0
    sinks = torch.tensor([0.0, 900.0])
    assert (integer(q, k, v, sinks=sinks)[:, 1] == 0).all()


def test_views_and_empty():
    merged = exact_keys(2, 17, 3, 2, 32)  # one linear's output: q, k, v side by side
    q, k, v = (merged[:, :, i].transpose(1, 2) for i in range(3))
    assert_within(integer(q, k, v), q, k, v)
    assert integer(q[:0], k[:0], v[:0]).shape == (0, 2, 17, 32)
    assert (integer(q, k[:, :, :0], v[:, :, :0]) == 0).all()
    assert integer(q[:, :0], k[:, :0], v[:, :0]).shape == (2, 0, 17, 32)
    assert q.device.type == DEVICE
