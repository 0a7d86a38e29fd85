import pytest
import torch

from attention_cases import SHAPES, operands
from conftest import forced, variants
from narrowcast.kernels.attention import attention as public
from narrowcast.kernels.attention import attention_ref as ref
from tolerances import BOUND, assert_close

ops = torch.ops.narrowcast
VARIANTS = variants("attention")
DTYPES = list(BOUND)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_masks(variant, dtype, shape):
    q, k, v = operands(*shape, dtype)
    with forced("attention", variant):
        for causal, window in ((False, 0), (True, 0), (True, 3), (False, 4)):
            out = ops.attention(q, k, v, None, None, causal, window)
            assert_close(
                out, ref.attention(q, k, v, causal=causal, window=window), BOUND[dtype], f"{causal} {window}"
            )


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_option_at_once(variant):
    q, k, v = operands(2, 6, 2, 37, 150, 64, 48)
    options = {"scale": 0.3, "causal": True, "window": 40, "softcap": 2.5, "sinks": torch.randn(6)}
    for bias in (
        None,
        torch.randn(2, 6, 37, 150),
        torch.randn(150),
        torch.randn(2, 1, 1, 150).bfloat16(),
        torch.randn(6, 37, 1).half(),
        torch.randn(1, 1, 1, 150).expand(2, 6, 37, 150),
    ):
        with forced("attention", variant):
            out, lse = ops.attention_lse(q, k, v, bias, **options)
        expected = ref.attention_lse(q, k, v, bias, **options)
        assert_close(out, expected[0])
        assert_close(lse, expected[1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_sequences(variant):
    cu_q = torch.tensor([0, 5, 5, 72, 80], dtype=torch.int32)
    cu_k = torch.tensor([0, 9, 12, 150, 150], dtype=torch.int32)
    q, k, v = torch.randn(80, 4, 32), torch.randn(150, 2, 32), torch.randn(150, 2, 32)
    for causal in (False, True):
        with forced("attention", variant):
            out, lse = ops.attention_lse(q, k, v, None, None, causal, 0, 0.0, cu_q, cu_k)
        expected = ref.attention_lse(q, k, v, causal=causal, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
        assert_close(out, expected[0])
        assert torch.equal(lse.isinf(), expected[1].isinf())
        assert_close(lse.nan_to_num(0, 0, 0), expected[1].nan_to_num(0, 0, 0).float())
        assert (out[72:] == 0).all()  # no keys at all


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_that_see_nothing(variant):
    q, k, v = operands(1, 2, 2, 9, 4, 16, 16)
    with forced("attention", variant):
        out, lse = ops.attention_lse(q, k, v, None, None, True)
        assert (out[:, :, :5] == 0).all() and lse[:, :, :5].isneginf().all()
        assert_close(out, ref.attention(q, k, v, causal=True))
        bias = torch.zeros(9, 4)
        bias[3] = -torch.inf
        out, lse = ops.attention_lse(q, k, v, bias)
        assert (out[:, :, 3] == 0).all() and lse[:, :, 3].isneginf().all()
        sinks = torch.tensor([0.5, -torch.inf])
        lse = ops.attention_lse(q, k, v, bias, sinks=sinks)[1]
        assert torch.equal(lse[0, :, 3], sinks)


@pytest.mark.parametrize("variant", VARIANTS)
def test_large_scores_and_nan(variant):
    q, k, v = operands(1, 1, 1, 3, 200, 8, 8)
    with forced("attention", variant):
        assert_close(ops.attention(q * 1000, k, v), ref.attention(q * 1000, k, v), 1e-4)
        q[0, 0, 1, 2] = torch.nan
        out = ops.attention(q, k, v)
    assert out[0, 0, 1].isnan().all() and out[0, 0, ::2].isfinite().all()


def test_views_and_empty():
    merged = torch.randn(2, 33, 3, 4, 32)  # one linear's output: q, k, v side by side
    q, k, v = (merged[:, :, i].transpose(1, 2) for i in range(3))
    expected = ref.attention(q, k, v)
    assert_close(ops.attention(q, k, v), expected)
    turned = k.transpose(2, 3).contiguous().transpose(2, 3)
    assert_close(ops.attention(q, turned, v), expected)
    one = k[:, :1].expand(2, 4, 33, 32)
    assert_close(ops.attention(q, one, v), ref.attention(q, one, v))
    out = torch.full_like(q, torch.nan).contiguous()
    ops.attention.out(q, k, v, out=out)
    assert_close(out, expected)
    assert ops.attention(q[:0], k[:0], v[:0]).shape == (0, 4, 33, 32)
    assert ops.attention(q[:, :, :0], k, v).shape == (2, 4, 0, 32)
    assert (ops.attention(q, k[:, :, :0], v[:, :, :0]) == 0).all()
    assert ops.attention(q[:, :0], k[:, :0], v[:, :0]).shape == (2, 0, 33, 32)
    assert_close(ops.attention(q[..., :0], k[..., :0], v), v.mean(2, keepdim=True).expand(2, 4, 33, 32))


def test_same_bits_whatever_the_batch():
    q, k, v = operands(5, 4, 2, 70, 70, 32, 32)
    whole = ops.attention(q, k, v, causal=True)
    for b in range(5):
        assert torch.equal(
            whole[b : b + 1], ops.attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], causal=True)
        )


def test_opcheck_and_compile():
    q, k, v = operands(2, 4, 2, 9, 11, 16, 16)
    torch.library.opcheck(ops.attention.default, (q, k, v, torch.randn(9, 11)), {"causal": True})
    torch.library.opcheck(ops.attention_lse.default, (q, k, v))
    torch.library.opcheck(ops.attention.out, (q, k, v), {"out": torch.empty_like(q)})
    compiled = torch.compile(lambda *a: public(*a) + 1, fullgraph=True, backend="aot_eager")
    assert_close(compiled(q, k, v), ref.attention(q, k, v) + 1)
    with pytest.raises(RuntimeError, match="no gradient"):
        ops.attention(q.requires_grad_(), k, v)


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
    ],
)
def test_bad_input(change, message):
    q, k, v = operands(2, 4, 2, 9, 11, 16, 16)
    with pytest.raises(RuntimeError, match=f"attention: {message}"):
        ops.attention(**({"q": q, "k": k, "v": v} | change))


@pytest.mark.parametrize(
    "cu_q, cu_k, message",
    [
        ([0, 9], [0, 10], "cu_seqlens_k must go from 0 to 11"),
        ([0, 10, 9], [0, 3, 11], "cu_seqlens_q must not decrease"),
        ([0, 4, 9], [0, 11], "cu_seqlens_k must be contiguous int32"),
    ],
)
def test_bad_cu_seqlens(cu_q, cu_k, message):
    q, k = torch.ones(9, 2, 8), torch.ones(11, 2, 8)
    tensors = (torch.tensor(x, dtype=torch.int32) for x in (cu_q, cu_k))
    with pytest.raises(RuntimeError, match=message):
        ops.attention(q, k, k, None, None, False, 0, 0.0, *tensors)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_behind_a_mask_do_not_leak(variant, bad, dtype):
    q, k, v = operands(1, 4, 2, 40, 40, 16, 24, dtype)
    expected = ref.attention(q, k, v, causal=True)
    k[:, :, 30:], v[:, :, 30:] = bad, bad
    hidden = torch.zeros(40).masked_fill(torch.arange(40) >= 30, -torch.inf)
    with forced("attention", variant):
        out = ops.attention(q, k, v, causal=True)
        assert_close(out[:, :, :30], expected[:, :, :30])
        assert out[:, :, 30:].isnan().all()
        k[:, :, 30:] = 0
        assert_close(ops.attention(q, k, v, hidden), ref.attention(q, k[:, :, :30], v[:, :, :30]))
