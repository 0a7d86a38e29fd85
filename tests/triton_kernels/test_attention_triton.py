import pytest
import torch

from attention_cases import SHAPES, operands
from conftest import STORED
from narrowcast.kernels.attention import attention_ref as ref
from narrowcast.kernels.attention import attention_triton as ours
from tolerances import BOUND, assert_close

MASKS = [(False, 0), (True, 0), (True, 3), (False, 4)]


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize(
    "shape",
    [*SHAPES[:3], (2, 6, 2, 33, 75, 64, 64), SHAPES[5], (1, 2, 1, 9, 50, 80, 80), (1, 1, 1, 5, 40, 256, 160)],
)
def test_shapes_and_masks(dtype, shape):
    q, k, v = operands(*shape, dtype)
    for causal, window in MASKS:
        out = ours.attention(q, k, v, None, None, causal, window)
        assert_close(
            out, ref.attention(q, k, v, causal=causal, window=window), BOUND[dtype], f"{causal} {window}"
        )


def test_many_keys():
    q, k, v = operands(*SHAPES[3], torch.float16)
    assert_close(ours.attention(q, k, v, causal=True), ref.attention(q, k, v, causal=True))
    q, k, v = operands(1, 1, 1, 150, 300, 16, 16, torch.float16)
    for causal, window in ((True, 0), (True, 70), (False, 30)):
        out = ours.attention(q, k, v, None, None, causal, window)
        assert_close(out, ref.attention(q, k, v, causal=causal, window=window))


@pytest.mark.parametrize("depth", [2, 15, 31, 96, 112, 192, 200])
def test_head_sizes(depth):
    q, k, v = operands(1, 2, 2, 5, 40, depth, depth, torch.float16)
    assert_close(ours.attention(q, k, v), ref.attention(q, k, v))
    assert_close(ours.attention(q, k, v, causal=True), ref.attention(q, k, v, causal=True))


def test_every_option_at_once():
    q, k, v = operands(2, 4, 2, 11, 70, 40, 24)
    options = {"scale": 0.3, "causal": True, "window": 30, "softcap": 2.5, "sinks": torch.randn(4)}
    for bias in (
        None,
        torch.randn(2, 4, 11, 70),
        torch.randn(70),
        torch.randn(2, 1, 1, 70).bfloat16(),
        torch.randn(4, 11, 1).half(),
        torch.randn(1, 1, 1, 70).expand(2, 4, 11, 70),
    ):
        out, lse = ours.attention_lse(q, k, v, bias, **options)
        expected = ref.attention_lse(q, k, v, bias, **options)
        assert_close(out, expected[0])
        assert_close(lse, expected[1])


@pytest.mark.parametrize("scale", [-0.4, 0.0, 1e-3])
def test_scales(scale):
    q, k, v = operands(1, 4, 2, 9, 70, 16, 16)
    for softcap in (0.0, 30.0):
        out, lse = ours.attention_lse(q, k, v, None, scale, True, 0, softcap)
        expected = ref.attention_lse(q, k, v, None, scale, True, 0, softcap)
        assert_close(out, expected[0])
        assert_close(lse, expected[1])


@pytest.mark.parametrize(
    "lengths", [[(5, 9), (0, 3), (37, 68), (8, 0)], [(1, 1), (0, 0), (0, 0), (30, 7), (60, 60)]]
)
def test_packed_sequences(lengths):
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0, dtype=torch.int32) for x in zip(*lengths, strict=True))
    q = torch.randn(int(cu_q[-1]), 4, 32)
    k, v = (torch.randn(int(cu_k[-1]), 2, 32) for _ in "kv")
    for causal, window in MASKS[1:]:
        out, lse = ours.attention_lse(q, k, v, None, None, causal, window, 0.0, cu_q, cu_k)
        expected = ref.attention_lse(
            q, k, v, causal=causal, window=window, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k
        )
        assert_close(out, expected[0])
        assert torch.equal(lse.isinf(), expected[1].isinf())
        assert_close(lse.nan_to_num(0, 0, 0), expected[1].nan_to_num(0, 0, 0))


def test_packed_lengths_out_of_range_read_nothing_outside():
    q, k = torch.randn(9, 2, 8), torch.randn(11, 2, 8)
    for cu_q, cu_k in (([0, 90], [0, 110]), ([-5, 4, 3, 9], [-7, 20, 3, 11]), ([3, 3], [0, 11])):
        cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in (cu_q, cu_k))
        ours.attention(q, k, k, None, None, True, 0, 0.0, cu_q, cu_k)


def test_rows_that_see_nothing():
    q, k, v = operands(1, 2, 2, 9, 4, 16, 16)
    out, lse = ours.attention_lse(q, k, v, None, None, True)
    assert (out[:, :, :5] == 0).all() and lse[:, :, :5].isneginf().all()
    assert_close(out, ref.attention(q, k, v, causal=True))
    bias = torch.zeros(9, 4)
    bias[3] = -torch.inf
    out, lse = ours.attention_lse(q, k, v, bias)
    assert (out[:, :, 3] == 0).all() and lse[:, :, 3].isneginf().all()
    sinks = torch.tensor([0.5, -torch.inf])
    lse = ours.attention_lse(q, k, v, bias, sinks=sinks)[1]
    assert torch.equal(lse[0, :, 3], sinks)


def test_large_scores_and_nan():
    q, k, v = operands(1, 1, 1, 3, 200, 8, 8)
    assert_close(ours.attention(q * 1000, k, v), ref.attention(q * 1000, k, v), 1e-4)
    q[0, 0, 1, 2] = torch.nan
    out = ours.attention(q, k, v)
    assert out[0, 0, 1].isnan().all() and out[0, 0, ::2].isfinite().all()


def test_views_and_empty():
    merged = torch.randn(2, 17, 3, 2, 32)  # one linear's output: q, k, v side by side
    q, k, v = (merged[:, :, i].transpose(1, 2) for i in range(3))
    expected = ref.attention(q, k, v)
    assert_close(ours.attention(q, k, v), expected)
    turned = k.transpose(2, 3).contiguous().transpose(2, 3)
    assert_close(ours.attention(q, turned, v), expected)
    one = k[:, :1].expand(2, 2, 17, 32)
    assert_close(ours.attention(q, one, v), ref.attention(q, one, v))
    assert ours.attention(q[:0], k[:0], v[:0]).shape == (0, 2, 17, 32)
    assert ours.attention(q[:, :, :0], k, v).shape == (2, 2, 0, 32)
    out, lse = ours.attention_lse(q, k[:, :, :0], v[:, :, :0])
    assert (out == 0).all() and lse.isneginf().all()
    assert ours.attention(q[:, :0], k[:, :0], v[:, :0]).shape == (2, 0, 17, 32)
    mean = v.mean(2, keepdim=True).expand(2, 2, 17, 32)
    assert_close(ours.attention(q[..., :0], k[..., :0], v), mean)
    out, lse = ours.attention_lse(q, k, v[..., :0])
    assert out.shape == (2, 2, 17, 0)
    assert_close(lse, ref.attention_lse(q, k, v)[1])


def test_same_bits_whatever_the_batch():
    q, k, v = operands(3, 4, 2, 40, 40, 32, 32, torch.float16)
    whole = ours.attention(q, k, v, causal=True)
    for b in range(3):
        alone = ours.attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], causal=True)
        assert torch.equal(whole[b : b + 1], alone)
    rows = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]
    cu = torch.arange(4, dtype=torch.int32) * 40
    packed = ours.attention(*rows, None, None, True, 0, 0.0, cu, cu)
    alone = ours.attention(*(t[40:80] for t in rows), None, None, True, 0, 0.0, cu[:2], cu[:2])
    assert torch.equal(packed[40:80], alone)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", STORED)
def test_values_behind_a_mask_do_not_leak(bad, dtype):
    q, k, v = operands(1, 4, 2, 40, 40, 16, 24, dtype)
    expected = ref.attention(q, k, v, causal=True)
    k[:, :, 30:], v[:, :, 30:] = bad, bad
    hidden = torch.zeros(40).masked_fill(torch.arange(40) >= 30, -torch.inf)
    out = ours.attention(q, k, v, causal=True)
    assert_close(out[:, :, :30], expected[:, :, :30])
    assert out[:, :, 30:].isnan().all()
    k[:, :, 30:] = 0
    assert_close(ours.attention(q, k, v, hidden), ref.attention(q, k[:, :, :30], v[:, :, :30]))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.ones(2, 9, 16)}, "q must be float32, float16 or bfloat16"),
        ({"q": torch.ones(2, 4, 9, 16).double()}, "q must be float32"),
        ({"k": torch.ones(2, 2, 11, 16).half()}, "k must have the dtype of q"),
        ({"k": torch.ones(2, 3, 11, 16)}, "k must have a number of heads that divides"),
        ({"k": torch.ones(2, 2, 11, 8)}, "k must have the batch and head size"),
        ({"v": torch.ones(2, 2, 12, 16)}, "v must have the shape of k"),
        ({"v": torch.ones(2, 2, 11, 257)}, "v must have a head size of at most 256"),
        ({"bias": torch.ones(9, 12)}, "bias must be"),
        ({"sinks": torch.ones(3)}, "sinks must be"),
        ({"window": -1}, "window must be"),
        ({"softcap": -1.0}, "softcap must be"),
        ({"scale": float("nan")}, "scale must be"),
        ({"cu_seqlens_q": torch.zeros(2, dtype=torch.int32)}, "q must be float32, float16 or bfloat16"),
    ],
)
def test_bad_input(change, message):
    q, k, v = operands(2, 4, 2, 9, 11, 16, 16)
    given = {"q": q, "k": k, "v": v} | change
    with pytest.raises(RuntimeError, match=f"attention: {message}"):
        ours.attention(**{k: t.to(q.device) if isinstance(t, torch.Tensor) else t for k, t in given.items()})
