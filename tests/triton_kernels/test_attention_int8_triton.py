import pytest
import torch

from attention_cases import SHAPES, operands
from attention_int8_cases import QUANTIZED, SAME_CODES
from conftest import DEVICE, STORED
from narrowcast.kernels.attention import attention_ref as exact
from narrowcast.kernels.attention.attention_checks import attention_arguments
from narrowcast.kernels.attention_int8 import attention_int8_ref as ref
from narrowcast.kernels.attention_int8 import attention_int8_triton as ours
from tolerances import assert_close

MASKS = [(False, 0), (True, 0), (True, 3), (False, 4)]


def exact_keys(*shape):
    """Keys whose sums have no rounding: their mean, and with it every code, is that of the reference."""
    return torch.randint(-24, 25, shape) / 8


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize(
    "shape", [*SHAPES[:2], (2, 4, 2, 17, 40, 64, 64), SHAPES[5], (1, 2, 1, 9, 50, 80, 96)]
)
def test_shapes_and_masks(dtype, shape):
    q, _, v = operands(*shape, dtype)
    k = (exact_keys(shape[0], shape[2], *shape[4:6]) + torch.randint(-4, 5, (shape[2], 1, shape[5]))).to(
        dtype
    )
    for causal, window in MASKS:
        out = ours.attention_int8(q, k, v, None, None, causal, window)
        message = f"{causal} {window}"
        expected = ref.attention_int8(q, k, v, causal=causal, window=window)
        assert_close(out, expected, SAME_CODES[dtype], message)
        assert_close(out, exact.attention(q, k, v, causal=causal, window=window), 2 * QUANTIZED, message)


@pytest.mark.parametrize("shape", [SHAPES[2], (1, 2, 2, 5, 300, 128, 96), (1, 1, 1, 5, 70, 256, 160)])
def test_normal_inputs(shape):
    q, k, v = operands(*shape, torch.float16)
    k = k + 5 * torch.randn(shape[2], 1, shape[5]).half()  # what the mean takes away
    assert_close(ours.attention_int8(q, k, v), exact.attention(q, k, v), QUANTIZED)


@pytest.mark.parametrize("depth", [1, 40, 200])
def test_codes_of_the_keys(depth):
    q, _, v = operands(2, 2, 2, 1, 150, depth, 16)
    k = exact_keys(2, 2, 150, depth)
    k[0, 1, 7, 0], k[1, 0, 3, depth - 1] = torch.inf, torch.nan
    codes, scales, means = ours.quantize_keys(attention_arguments("attention_int8", q, k, v))
    mean = ref.mean_of(k)
    assert torch.equal(means, mean[:, :, 0])
    expected, expected_scale = ref.quantize(k - mean)
    codes = codes.unflatten(1, (2, 150)).transpose(0, 1)
    assert torch.equal(codes[..., :depth].float(), expected) and (codes[..., depth:] == 0).all()
    scales = scales.unflatten(1, (2, 150)).transpose(0, 1)
    assert torch.equal(scales.nan_to_num(-1), expected_scale[..., 0].nan_to_num(-1))


def test_every_option_at_once():
    q, _, v = operands(2, 4, 2, 11, 70, 40, 24)
    k = exact_keys(2, 2, 70, 40) + 0.5
    options = {"scale": 0.3, "causal": True, "window": 30, "softcap": 2.5, "sinks": torch.randn(4)}
    for bias in (None, torch.randn(2, 4, 11, 70), torch.randn(2, 1, 1, 70).bfloat16()):
        out = ours.attention_int8(q, k, v, bias, **options)
        assert_close(out, ref.attention_int8(q, k, v, bias, **options), SAME_CODES[out.dtype])
        assert_close(out, exact.attention(q, k, v, bias, **options), 3 * QUANTIZED)  # wider scores
    out = ours.attention_int8(q, k, v, scale=-0.3, sinks=options["sinks"])
    assert_close(out, ref.attention_int8(q, k, v, scale=-0.3, sinks=options["sinks"]), SAME_CODES[out.dtype])


def test_packed_sequences():
    lengths = [(5, 9), (0, 3), (37, 68), (8, 0)]
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0, dtype=torch.int32) for x in zip(*lengths, strict=True))
    q, k, v = (t.half() for t in (torch.randn(50, 4, 32), exact_keys(80, 2, 32), torch.randn(80, 2, 32)))
    for causal in (False, True):
        for options in ({}, {"sinks": torch.randn(4)}):
            out = ours.attention_int8(q, k, v, None, None, causal, 0, 0.0, cu_q, cu_k, **options)
            expected = ref.attention_int8(
                q, k, v, causal=causal, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options
            )
            assert_close(out, expected, SAME_CODES[out.dtype])
            assert (out[42:] == 0).all()  # no keys at all
    for cu_q, cu_k in (([0, 90], [0, 110]), ([-5, 4, 3, 9], [-7, 20, 3, 11]), ([3, 3], [0, 11])):
        cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in (cu_q, cu_k))
        ours.attention_int8(q, k, v, None, None, True, 0, 0.0, cu_q, cu_k)  # reads nothing outside


@pytest.mark.parametrize("dtype", STORED)
def test_values_that_are_not_finite(dtype):
    q, _, v = operands(1, 1, 1, 6, 6, 16, 8, dtype)
    k = exact_keys(1, 1, 6, 16).to(dtype)
    expected = ref.attention_int8(q, k[:, :, :5], v[:, :, :5], scale=0.5)
    k[0, 0, 5, 3], v[0, 0, 5] = torch.inf, torch.nan
    out = ours.attention_int8(q, k, v, None, 0.5, True)
    assert out[0, 0, :5].isfinite().all() and out[0, 0, 5].isnan().all()
    q[0, 0, 2, 0] = torch.nan
    out = ours.attention_int8(q, k[:, :, :5], v[:, :, :5], None, 0.5)
    assert out[0, 0, 2].isnan().all()
    rest = [0, 1, 3, 4, 5]
    assert_close(out[:, :, rest], expected[:, :, rest], SAME_CODES[out.dtype])


def test_constant_rows_and_large_values():
    q, _, v = operands(1, 2, 1, 3, 70, 8, 8)
    k = exact_keys(1, 1, 70, 8)
    mean = v.mean(2, keepdim=True).expand(1, 2, 3, 8)
    assert_close(ours.attention_int8(q, torch.ones_like(k), v), mean)
    assert_close(ours.attention_int8(q * 0, k, v), mean)
    assert_close(ours.attention_int8(q * 1000, k, v), ref.attention_int8(q * 1000, k, v), 1e-3)


def test_views_and_empty():
    merged = exact_keys(2, 17, 3, 2, 32)  # one linear's output: q, k, v side by side
    q, k, v = (merged[:, :, i].transpose(1, 2) for i in range(3))
    bound, expected = SAME_CODES[q.dtype], ref.attention_int8(q, k, v)
    assert_close(ours.attention_int8(q, k, v), expected, bound)
    turned = k.transpose(2, 3).contiguous().transpose(2, 3)
    assert_close(ours.attention_int8(q, turned, v), expected, bound)
    one = k[:, :1].expand(2, 2, 17, 32)
    assert_close(ours.attention_int8(q, one, v), ref.attention_int8(q, one, v), bound)
    assert ours.attention_int8(q[:0], k[:0], v[:0]).shape == (0, 2, 17, 32)
    assert ours.attention_int8(q[:, :, :0], k, v).shape == (2, 2, 0, 32)
    assert (ours.attention_int8(q, k[:, :, :0], v[:, :, :0]) == 0).all()
    sinks = torch.zeros(2)
    assert (ours.attention_int8(q, k[:, :, :0], v[:, :, :0], sinks=sinks) == 0).all()
    assert ours.attention_int8(q[:, :0], k[:, :0], v[:, :0]).shape == (2, 0, 17, 32)
    mean = v.mean(2, keepdim=True).expand(2, 2, 17, 32)
    assert_close(ours.attention_int8(q[..., :0], k[..., :0], v), mean)


def test_same_bits_whatever_the_batch():
    q, k, v = operands(3, 4, 2, 40, 40, 32, 32, torch.float16)
    whole = ours.attention_int8(q, k, v, causal=True)
    for b in range(3):
        alone = ours.attention_int8(q[b : b + 1], k[b : b + 1], v[b : b + 1], causal=True)
        assert torch.equal(whole[b : b + 1], alone)
    rows = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]
    cu = torch.arange(4, dtype=torch.int32) * 40
    packed = ours.attention_int8(*rows, None, None, True, 0, 0.0, cu, cu)
    alone = ours.attention_int8(*(t[40:80] for t in rows), None, None, True, 0, 0.0, cu[:2], cu[:2])
    assert torch.equal(packed[40:80], alone)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.ones(2, 9, 16)}, "q must be float32, float16 or bfloat16"),
        ({"k": torch.ones(2, 2, 11, 16).half()}, "k must have the dtype of q"),
        ({"v": torch.ones(2, 2, 12, 16)}, "v must have the shape of k"),
        ({"bias": torch.ones(9, 12)}, "bias must be"),
        ({"scale": float("nan")}, "scale must be"),
    ],
)
def test_bad_input(change, message):
    given = dict(zip("qkv", operands(2, 4, 2, 9, 11, 16, 16), strict=True)) | change
    with pytest.raises(RuntimeError, match=f"attention_int8: {message}"):
        ours.attention_int8(
            **{k: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for k, t in given.items()}
        )
