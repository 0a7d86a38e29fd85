import pytest
import torch

from attention_cases import SHAPES, operands
from attention_int8_cases import QUANTIZED, SAME_CODES
from conftest import forced, variants
from narrowcast.kernels.attention import attention_ref as exact
from narrowcast.kernels.attention_int8 import attention_int8 as public
from narrowcast.kernels.attention_int8 import attention_int8_ref as ref
from steps import run_step
from tolerances import BOUND, assert_close

ops = torch.ops.narrowcast
VARIANTS = variants("attention_int8")
DTYPES = list(BOUND)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_masks(variant, dtype, shape):
    q, k, v = operands(*shape, dtype)
    k = (k + 5 * torch.randn(shape[2], 1, shape[5])).to(dtype)  # what the mean takes away
    for causal, window in ((False, 0), (True, 0), (True, 3), (False, 4)):
        with forced("attention_int8", variant):
            out = ops.attention_int8(q, k, v, None, None, causal, window)
        message = f"{causal} {window}"
        expected = ref.attention_int8(q, k, v, causal=causal, window=window)
        assert_close(out, expected, SAME_CODES[dtype], message)
        assert_close(out, exact.attention(q, k, v, causal=causal, window=window), QUANTIZED, message)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_option_at_once(variant):
    q, k, v = operands(2, 6, 2, 37, 150, 64, 48)
    options = {"scale": 0.3, "causal": True, "window": 40, "softcap": 2.5, "sinks": torch.randn(6)}
    k = k + 0.5
    for bias in (None, torch.randn(2, 6, 37, 150), torch.randn(2, 1, 1, 150).bfloat16()):
        with forced("attention_int8", variant):
            out = ops.attention_int8(q, k, v, bias, **options)
        assert_close(out, ref.attention_int8(q, k, v, bias, **options), SAME_CODES[out.dtype])
        assert_close(out, exact.attention(q, k, v, bias, **options), 2 * QUANTIZED)  # wider scores


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("width", [0.1, 1.0, 3.0])
def test_stated_bound(variant, width):
    q, k, v = operands(1, 2, 2, 33, 77, 48, 32)
    q[:, :, ::3, 5] *= 20  # outliers
    k, q = k * width, q * width
    with forced("attention_int8", variant):
        out = ops.attention_int8(q, k, v).double()
    scaled, centred = q.double() / 48**0.5, k.double() - k.double().mean(2, keepdim=True)
    qs, ks = (t.abs().amax(-1, keepdim=True) / 127 for t in (scaled, centred))
    ks, one = ks.transpose(-1, -2), scaled.abs().sum(-1, keepdim=True)
    d = qs / 2 * centred.abs().sum(-1)[..., None, :] + ks / 2 * one + 48 * qs * ks / 4
    bound = torch.expm1(2 * d.amax(-1, keepdim=True)) * exact.attention(q, k, v.abs())
    assert ((out - exact.attention(q, k, v)).abs() <= bound * 1.001 + 1e-5).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_sequences(variant):
    cu_q = torch.tensor([0, 5, 5, 72, 80], dtype=torch.int32)
    cu_k = torch.tensor([0, 9, 12, 150, 150], dtype=torch.int32)
    q, k, v = torch.randn(80, 4, 32), torch.randn(150, 2, 32), torch.randn(150, 2, 32)
    for causal in (False, True):
        with forced("attention_int8", variant):
            out = ops.attention_int8(q, k, v, None, None, causal, 0, 0.0, cu_q, cu_k)
        expected = ref.attention_int8(q, k, v, causal=causal, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
        assert_close(out, expected, SAME_CODES[out.dtype])
        assert (out[72:] == 0).all()  # no keys at all


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite(variant, dtype):
    q, k, v = operands(1, 1, 1, 6, 6, 16, 8, dtype)
    expected = ref.attention_int8(q, k[:, :, :5], v[:, :, :5], scale=0.5)
    k[0, 0, 5, 3], v[0, 0, 5] = torch.inf, torch.nan
    with forced("attention_int8", variant):
        out = ops.attention_int8(q, k, v, None, 0.5, True)
        assert out[0, 0, :5].isfinite().all() and out[0, 0, 5].isnan().all()
        q[0, 0, 2, 0] = torch.nan
        out = ops.attention_int8(q, k[:, :, :5], v[:, :, :5], None, 0.5)
    assert out[0, 0, 2].isnan().all()
    rest = [0, 1, 3, 4, 5]
    assert_close(out[:, :, rest], expected[:, :, rest], SAME_CODES[out.dtype])


@pytest.mark.parametrize("variant", VARIANTS)
def test_constant_rows_and_large_values(variant):
    q, k, v = operands(1, 2, 1, 3, 70, 8, 8)
    with forced("attention_int8", variant):
        same = ops.attention_int8(q, torch.ones_like(k), v)
        assert_close(same, v.mean(2, keepdim=True).expand(1, 2, 3, 8))
        assert_close(ops.attention_int8(q * 0, k, v), v.mean(2, keepdim=True).expand(1, 2, 3, 8))
        large = ops.attention_int8(q * 1000, k, v)
    assert_close(large, ref.attention_int8(q * 1000, k, v), 1e-3)


def test_views_and_empty():
    merged = torch.randn(2, 33, 3, 4, 32)  # one linear's output: q, k, v side by side
    q, k, v = (merged[:, :, i].transpose(1, 2) for i in range(3))
    bound, expected = SAME_CODES[q.dtype], ref.attention_int8(q, k, v)
    assert_close(ops.attention_int8(q, k, v), expected, bound)
    turned = k.transpose(2, 3).contiguous().transpose(2, 3)
    assert_close(ops.attention_int8(q, turned, v), expected, bound)
    one = k[:, :1].expand(2, 4, 33, 32)
    assert_close(ops.attention_int8(q, one, v), ref.attention_int8(q, one, v), bound)
    assert ops.attention_int8(q[:0], k[:0], v[:0]).shape == (0, 4, 33, 32)
    assert ops.attention_int8(q[:, :, :0], k, v).shape == (2, 4, 0, 32)
    assert (ops.attention_int8(q, k[:, :, :0], v[:, :, :0]) == 0).all()
    assert ops.attention_int8(q[:, :0], k[:, :0], v[:, :0]).shape == (2, 0, 33, 32)
    assert_close(ops.attention_int8(q[..., :0], k[..., :0], v), v.mean(2, keepdim=True).expand(2, 4, 33, 32))


def test_same_bits_whatever_the_batch():
    q, k, v = operands(5, 4, 2, 70, 70, 32, 32)
    whole = ops.attention_int8(q, k, v, causal=True)
    for b in range(5):
        alone = ops.attention_int8(q[b : b + 1], k[b : b + 1], v[b : b + 1], causal=True)
        assert torch.equal(whole[b : b + 1], alone)


@pytest.mark.parametrize("variant", VARIANTS)
def test_step(variant):
    q, k, v = operands(2, 4, 2, 9, 70, 32, 16)
    out, none = torch.full((2, 4, 9, 16), torch.nan), None
    with forced("attention_int8", variant):
        run_step("attention_int8", [q, k, v, none, none, none, none], [out], times=2, causal=True, scale=0.2)
        assert torch.equal(out, ops.attention_int8(q, k, v, None, 0.2, True))
    with pytest.raises(RuntimeError, match="attention_int8: out must be contiguous"):
        run_step("attention_int8", [q, k, v, none, none, none, none], [out[..., :8]])


def test_opcheck_and_compile():
    q, k, v = operands(2, 4, 2, 9, 11, 16, 16)
    torch.library.opcheck(ops.attention_int8.default, (q, k, v, torch.randn(9, 11)), {"causal": True})
    compiled = torch.compile(lambda *a: public(*a) + 1, fullgraph=True, backend="aot_eager")
    assert_close(compiled(q, k, v), ref.attention_int8(q, k, v) + 1, SAME_CODES[q.dtype])
    with pytest.raises(RuntimeError, match="no gradient"):
        ops.attention_int8(q.requires_grad_(), k, v)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.ones(2, 9, 16)}, "q must be float32, float16 or bfloat16"),
        ({"q": torch.ones(2, 4, 9, 16).double()}, "q must be float32"),
        ({"k": torch.ones(2, 2, 11, 16).half()}, "k must have the dtype of q"),
        ({"k": torch.ones(2, 3, 11, 16)}, "k must have a number of heads that divides"),
        ({"k": torch.ones(2, 2, 11, 8)}, "k must have the batch and head size"),
        ({"v": torch.ones(2, 2, 12, 16)}, "v must have the shape of k"),
        ({"bias": torch.ones(9, 12)}, "bias must be"),
        ({"sinks": torch.ones(3)}, "sinks must be"),
        ({"window": -1}, "window must be"),
        ({"softcap": -1.0}, "softcap must be"),
        ({"scale": float("nan")}, "scale must be"),
        ({"q": torch.ones(1, 1, 1, 65537), "k": torch.ones(1, 1, 1, 65537), "v": torch.ones(1, 1, 1, 4)},
         "q must have a head size of at most 65536"),
        ({"cu_seqlens_q": torch.zeros(2, dtype=torch.int32)}, "q must be float32, float16 or bfloat16"),
    ],
)  # fmt: skip
def test_bad_input(change, message):
    q, k, v = operands(2, 4, 2, 9, 11, 16, 16)
    with pytest.raises(RuntimeError, match=f"attention_int8: {message}"):
        ops.attention_int8(**({"q": q, "k": k, "v": v} | change))
