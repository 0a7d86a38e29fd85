import pytest
import torch

from conftest import LOADED, STORED
from kv_append_cases import operands, tables
from narrowcast.kernels.kv_append import kv_append_ref as ref
from narrowcast.kernels.kv_append import kv_append_triton as ours
from narrowcast.kernels.quantize import nan_count
from narrowcast.kernels.quantize.quantize_ref import quantize_int8
from tolerances import assert_close

CACHES = [*STORED, torch.int8]


def check(arguments, **options):
    expected = ref.kv_append(*arguments, **options)
    ours.kv_append(*arguments, **options)
    got = [arguments[i] for i in (0, 5, 1, 6) if arguments[i] is not None]
    for x, y in zip(got, expected, strict=True):
        if x.dtype == torch.int8:  # float64 and float32 turn a value on an edge to either side
            assert (x.int() - y.int()).abs().max() <= 1
        else:
            assert_close(x, y)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("dtype", LOADED)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 2), (2, 3, 5, 17, 24), (3, 2, 1, 40, 80)])
def test_appends(cache, dtype, shape):
    check(operands(*shape, cache, dtype))
    for interleaved in (False, True):
        cos, sin = tables(shape[3] + 3, shape[4] // 2)
        check(operands(*shape, cache, dtype), cos=cos, sin=sin, interleaved=interleaved)
        part = [t[:, : shape[4] // 4] for t in (cos, sin)]
        check(operands(*shape, cache, dtype), cos=part[0], sin=part[1], interleaved=interleaved)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("page", [8, 5])
def test_pages(cache, page):
    b, h, s, d = 3, 2, 21, 16
    _, _, k, v, start, _, _ = operands(b, h, s, 8 * page, d, cache)
    table = torch.randperm(30)[:24].view(3, 8).to(torch.int32)
    caches = [torch.ones(30, h, page, d).to(cache) for _ in "kv"]
    scales = [torch.ones(30, h, page) for _ in "kv"] if cache == torch.int8 else [None, None]
    check([*caches, k, v, start, *scales], block_table=table)


def test_int8_rounds_as_quantize_int8():
    arguments = operands(2, 3, 4, 20, 32, torch.int8)
    arguments[2][0, 0, 0] = 0.0
    arguments[3][1, 1, 1, 5] = torch.inf
    arguments[3][1, 1, 2, 5] = torch.nan
    nan_count(reset=True)
    ours.kv_append(*arguments)
    assert nan_count(reset=True) == 1
    for cache, scale, x in ((0, 5, 2), (1, 6, 3)):
        q, s = quantize_int8(arguments[x])
        for b, at in enumerate(arguments[4].tolist()):
            assert torch.equal(arguments[cache][b, :, at : at + 4], q[b])
            assert torch.equal(arguments[scale][b, :, at : at + 4], s[b])


def test_float32_turns_without_fused_products():
    k_cache, v_cache, k, v, start, _, _ = operands(2, 3, 4, 20, 32)
    cos, sin = tables(20, 16)
    ours.kv_append(k_cache, v_cache, k, v, start, cos=cos, sin=sin)
    for b, at in enumerate(start.tolist()):
        c, s = cos[at : at + 4], sin[at : at + 4]
        x, y = k[b].chunk(2, -1)
        assert torch.equal(k_cache[b, :, at : at + 4], torch.cat((x * c - y * s, y * c + x * s), -1))


def test_views_and_empty():
    arguments = operands(2, 3, 4, 20, 32)
    merged = torch.randn(2, 4, 2, 3, 32)
    arguments[2], arguments[3] = (merged[:, :, i].transpose(1, 2) for i in range(2))
    arguments[0] = torch.ones(2, 20, 3, 40).transpose(1, 2)[..., 4:36]
    check(arguments)
    arguments[2] = arguments[2].transpose(2, 3).contiguous().transpose(2, 3)
    check(arguments)
    check(operands(2, 3, 0, 20, 32))
    check(operands(2, 3, 1, 20, 0))


@pytest.mark.parametrize("cache", [torch.float16, torch.int8])
def test_slots_out_of_range_are_left_out(cache):
    arguments = operands(2, 3, 4, 20, 32, cache)
    arguments[4] = torch.tensor([18, -2], dtype=torch.int32)
    before = [t.clone() for t in arguments[:2]]
    cos, sin = tables(19, 16)
    ours.kv_append(*arguments)
    for x, y in zip(arguments[:2], before, strict=True):
        assert torch.equal(x[0, :, :18], y[0, :, :18]) and torch.equal(x[1, :, 2:], y[1, :, 2:])
        assert not torch.equal(x[0, :, 18:], y[0, :, 18:]) and not torch.equal(x[1, :, :2], y[1, :, :2])
    before = arguments[0].clone()
    ours.kv_append(*arguments, cos, sin)
    assert torch.equal(arguments[0][0, :, 19], before[0, :, 19])  # no such position in the tables
    table = torch.tensor([[-1], [2]], dtype=torch.int32)
    before = arguments[0].clone()
    ours.kv_append(*arguments, block_table=table)
    assert torch.equal(arguments[0], before)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"start": torch.tensor([0, 0])}, "start must be contiguous int32"),
        ({"k": torch.ones(2, 3, 4, 16)}, "v must have the dtype and shape of k"),
        ({"k_cache": torch.ones(2, 3, 20, 16)}, "k_cache must be"),
        ({"k_cache": torch.ones(1, 3, 20, 32).expand(2, 3, 20, 32)}, "k_cache must have stride 1"),
        ({"v_cache": torch.ones(2, 3, 21, 32)}, "v_cache must have the dtype and shape"),
        ({"k_scale": torch.ones(2, 3, 20)}, "k_scale and v_scale must be absent"),
        ({"cos": torch.ones(19, 16)}, "sin must be"),
        ({"cos": torch.ones(30, 17), "sin": torch.ones(30, 17)}, "cos must be contiguous float32"),
        ({"block_table": torch.ones(2, 3)}, "block_table must be contiguous int32"),
    ],
)
def test_bad_input_writes_nothing(change, message):
    arguments = operands(2, 3, 4, 20, 32)
    good = dict(zip(("k_cache", "v_cache", "k", "v", "start"), arguments, strict=False)) | change
    device = arguments[3].device
    good = {
        k: t.to(device) if isinstance(t, torch.Tensor) and t.device != device else t for k, t in good.items()
    }
    before = good["k_cache"].clone()
    with pytest.raises(RuntimeError, match=f"kv_append: {message}"):
        ours.kv_append(**good)
    assert torch.equal(good["k_cache"], before)


def test_overlaps_are_refused():
    k_cache, v_cache, k, v, start = operands(2, 3, 4, 20, 32)[:5]
    with pytest.raises(RuntimeError, match="v_cache must not overlap k_cache"):
        ours.kv_append(k_cache, k_cache, k, v, start)
    with pytest.raises(RuntimeError, match="k must not overlap a cache"):
        ours.kv_append(k_cache, v_cache, k_cache[:, :, :4], v, start)
