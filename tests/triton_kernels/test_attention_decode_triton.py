import pytest
import torch

from attention_decode_cases import operands, pages_of
from conftest import LOADED, STORED
from narrowcast.kernels.attention_decode import attention_decode_ref as ref
from narrowcast.kernels.attention_decode import attention_decode_triton as ours
from tolerances import assert_close

CACHES = [*LOADED, torch.int8]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1, 1), (2, 3, 1, 1, 280, 17), (2, 6, 2, 5, 100, 32), (1, 2, 1, 40, 60, 80)]
)
def test_caches(cache, dtype, shape):
    inputs = operands(*shape, cache, dtype)
    assert_close(ours.attention_decode(*inputs), ref.attention_decode(*inputs))


@pytest.mark.parametrize("cache", [torch.float16, torch.int8])
@pytest.mark.parametrize("sq", [1, 3])
def test_several_chunks(cache, sq):
    inputs = operands(3, 4, 2, sq, 600, 16, cache, torch.float16, [600, 513, sq])
    assert_close(ours.attention_decode(*inputs), ref.attention_decode(*inputs))


@pytest.mark.parametrize("sq", [1, 3, 35])
def test_options(sq):
    inputs = operands(2, 4, 2, sq, 400, 16, torch.float16, torch.float16)
    for options in (
        {"scale": 0.4, "window": 270, "softcap": 3.0, "sinks": torch.randn(4)},
        {"scale": -0.2, "window": 7, "sinks": torch.tensor([0.5, -torch.inf, 2, -3])},
        {"scale": 0.0, "window": 2000},
    ):
        assert_close(ours.attention_decode(*inputs, **options), ref.attention_decode(*inputs, **options))


@pytest.mark.parametrize("cache", [torch.float16, torch.int8])
@pytest.mark.parametrize("sq, page", [(1, 16), (9, 5), (40, 16)])
def test_pages(cache, sq, page):
    q, k, v, lengths, k_scale, v_scale = operands(3, 4, 2, sq, 20 * page, 32, cache, torch.float16)
    table = torch.randperm(70)[:60].view(3, 20).to(torch.int32)
    k, v = (t.nan_to_num() for t in (k, v))
    paged = [None if t is None else pages_of(t, table, page) for t in (k, v, k_scale, v_scale)]
    dense = ours.attention_decode(q, k, v, lengths, k_scale, v_scale)
    out = ours.attention_decode(q, *paged[:2], lengths, *paged[2:], block_table=table)
    assert torch.equal(out, dense)
    assert_close(out, ref.attention_decode(q, *paged[:2], lengths, *paged[2:], block_table=table))


def test_small_scales_keep_their_range():
    q, k, v, lengths, k_scale, v_scale = operands(1, 2, 1, 1, 90, 16, torch.int8, torch.float16)
    v_scale = v_scale * 1e-6
    v_scale[:, :, 3] = 0
    out = ours.attention_decode(q.float(), k, v, lengths, k_scale, v_scale)
    expected = ref.attention_decode(q, k, v, lengths, k_scale, v_scale)
    assert_close(out, expected)
    v_scale *= 1e5
    out = ours.attention_decode(q, k, v, lengths, k_scale, v_scale)
    assert_close(out, ref.attention_decode(q, k, v, lengths, k_scale, v_scale))


def test_same_bits_whatever_the_batch():
    inputs = operands(3, 4, 2, 1, 700, 16, torch.float16, torch.float16)
    whole = ours.attention_decode(*inputs)
    for b in range(3):
        n = int(inputs[3][b])
        alone = [t[b : b + 1].contiguous() for t in inputs[:4]]
        assert torch.equal(ours.attention_decode(*alone), whole[b : b + 1])
        alone[1:3] = [t[:, :, : n + n % 2].contiguous() for t in alone[1:3]]  # another capacity
        assert torch.equal(ours.attention_decode(*alone), whole[b : b + 1])


def test_views_and_empty():
    q, k, v, lengths, _, _ = operands(2, 4, 2, 3, 50, 16)
    expected = ref.attention_decode(q, k, v, lengths)
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert_close(ours.attention_decode(*turned, lengths), expected)
    backwards = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v)]
    assert_close(ours.attention_decode(*backwards, lengths), expected)
    assert ours.attention_decode(q[:0], k[:0], v[:0], lengths[:0]).shape == (0, 4, 3, 16)
    assert ours.attention_decode(q[:, :, :0], k, v, lengths * 0).shape == (2, 4, 0, 16)


@pytest.mark.parametrize("cache", [torch.float16, torch.int8])
def test_lengths_and_pages_out_of_range_read_nothing_outside(cache):
    q, k, v, lengths, k_scale, v_scale = operands(2, 4, 2, 1, 32, 16, cache, lengths=[32, 32])
    full = ours.attention_decode(q, k, v, lengths, k_scale, v_scale)
    far = ours.attention_decode(q, k, v, lengths + 1000, k_scale, v_scale)
    assert torch.equal(full, far)
    assert (ours.attention_decode(q, k, v, lengths - 99, k_scale, v_scale) == 0).all()
    table = torch.tensor([[-7], [99]], dtype=torch.int32)
    out = ours.attention_decode(q, k, v, lengths, k_scale, v_scale, block_table=table)
    assert torch.equal(out, full)


@pytest.mark.parametrize("cache", [torch.float32, torch.float16])
@pytest.mark.parametrize("group", [1, 40])
def test_values_behind_a_mask_do_not_leak(cache, group):
    q, k, v, lengths, _, _ = operands(1, group, 1, 3, 300, 24, cache, cache)
    lengths[:] = 300
    k, v = k.nan_to_num(), v.nan_to_num()
    k[:, :, -1], v[:, :, -1], v[:, :, :40] = torch.nan, torch.nan, torch.inf
    out = ours.attention_decode(q, k, v, lengths, window=200)
    expected = ref.attention_decode(
        q[:, :, :2], k[:, :, :-1], v[:, :, :-1].nan_to_num(0, 0, 0), lengths - 1, window=200
    )
    assert_close(out[:, :, :2], expected)
    assert out[:, :, 2].isnan().all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lengths": torch.tensor([9, 9])}, "lengths must be contiguous int32"),
        ({"q": torch.ones(2, 4, 3, 8)}, "k_cache must have the batch and head size"),
        ({"q": torch.ones(2, 3, 3, 16)}, "k_cache must have a number of heads"),
        ({"v_cache": torch.ones(2, 2, 50, 16).half()}, "v_cache must have the dtype"),
        ({"k_cache": torch.ones(2, 2, 50, 16).double()}, "k_cache must be float32"),
        ({"k_cache": torch.ones(2, 2, 50, 16).to(torch.int8)}, "v_cache must have the dtype"),
        ({"k_scale": torch.ones(2, 2, 50)}, "k_scale and v_scale must be absent"),
        ({"block_table": torch.ones(2, 3)}, "block_table must be contiguous int32"),
        ({"sinks": torch.ones(4).half()}, "sinks must be"),
        ({"window": -1}, "window must be"),
    ],
)
def test_bad_input(change, message):
    names = ("q", "k_cache", "v_cache", "lengths")
    good = dict(zip(names, operands(2, 4, 2, 3, 50, 16), strict=False)) | change
    device = good["v_cache"].device
    good = {k: t.to(device) if isinstance(t, torch.Tensor) else t for k, t in good.items()}
    with pytest.raises(RuntimeError, match=f"attention_decode: {message}"):
        ours.attention_decode(**good)
