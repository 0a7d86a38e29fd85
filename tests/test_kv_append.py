import pytest
import torch

from kv_append_cases import operands, tables
from narrowcast.kernels.kv_append import kv_append_ref as ref
from tolerances import assert_close

ops = torch.ops.narrowcast
CACHES = [torch.float32, torch.float16, torch.bfloat16, torch.int8]


def check(arguments, **options):
    expected = ref.kv_append(*arguments, **options)
    ops.kv_append(*arguments, **options)
    got = [arguments[i] for i in (0, 5, 1, 6) if arguments[i] is not None]
    for x, y in zip(got, expected, strict=True):
        if x.dtype == torch.int8:  # float64 and float32 turn a value on an edge to either side
            assert (x.int() - y.int()).abs().max() <= 1
        else:
            assert_close(x, y)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 2), (2, 3, 5, 17, 24), (3, 2, 1, 40, 64)])
def test_appends(cache, dtype, shape):
    check(operands(*shape, cache, dtype))
    for interleaved in (False, True):
        cos, sin = tables(shape[3] + 3, shape[4] // 2)
        check(operands(*shape, cache, dtype), cos=cos, sin=sin, interleaved=interleaved)
        part = [t[:, : shape[4] // 4].contiguous() for t in (cos, sin)]
        check(operands(*shape, cache, dtype), cos=part[0], sin=part[1], interleaved=interleaved)


@pytest.mark.parametrize("cache", CACHES)
def test_pages(cache):
    b, h, s, d, page = 3, 2, 21, 16, 8
    _, _, k, v, start, _, _ = operands(b, h, s, 64, d, cache)
    table = torch.randperm(30, dtype=torch.int32)[:24].view(3, 8)
    caches = [torch.ones(30, h, page, d).to(cache) for _ in "kv"]
    scales = [torch.ones(30, h, page) for _ in "kv"] if cache == torch.int8 else [None, None]
    check([*caches, k, v, start, *scales], block_table=table)


def test_int8_rounds_as_quantize_int8():
    arguments = operands(2, 3, 4, 20, 32, torch.int8)
    arguments[2][0, 0, 0] = 0.0
    arguments[3][1, 1, 1, 5] = torch.inf
    ops.kv_append(*arguments)
    for cache, scale, x in ((0, 5, 2), (1, 6, 3)):
        q, s = ops.quantize_int8(arguments[x])
        for b, at in enumerate(arguments[4].tolist()):
            assert torch.equal(arguments[cache][b, :, at : at + 4], q[b])
            assert torch.equal(arguments[scale][b, :, at : at + 4], s[b])


def test_views_and_empty():
    arguments = operands(2, 3, 4, 20, 32)
    merged = torch.randn(2, 4, 2, 3, 32)
    arguments[2], arguments[3] = (merged[:, :, i].transpose(1, 2) for i in range(2))
    arguments[0] = torch.ones(2, 20, 3, 40).transpose(1, 2)[..., 4:36]
    check(arguments)
    arguments[2] = arguments[2].transpose(2, 3).contiguous().transpose(2, 3)
    check(arguments)
    empty = operands(2, 3, 0, 20, 32)
    check(empty)


@pytest.mark.parametrize("cache", [torch.float32, torch.int8])
def test_opcheck_and_functionalisation(cache):
    arguments = operands(2, 3, 4, 20, 32, cache)
    cos, sin = tables(20, 16)
    torch.library.opcheck(ops.kv_append.default, arguments, {"cos": cos, "sin": sin})

    def step(k_cache, v_cache, *rest):
        ops.kv_append(k_cache, v_cache, *rest)
        return k_cache.float().sum() + v_cache.float().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    copies = [None if t is None else t.clone() for t in arguments]
    assert torch.equal(compiled(*copies), step(*arguments))
    for x, y in zip(copies, arguments, strict=True):
        assert x is y or torch.equal(x, y)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"start": torch.tensor([0, 17], dtype=torch.int32)}, "start must lie in 0 .. 16"),
        ({"start": torch.tensor([-1, 0], dtype=torch.int32)}, "start must lie in 0 .. 16"),
        ({"start": torch.tensor([0, 0])}, "start must be contiguous int32"),
        ({"k": torch.ones(2, 3, 4, 16)}, "v must have the dtype and shape of k"),
        ({"k_cache": torch.ones(2, 3, 20, 16)}, "k_cache must be"),
        ({"k_cache": torch.ones(1, 3, 20, 32).expand(2, 3, 20, 32)}, "k_cache must have stride 1"),
        ({"v_cache": torch.ones(2, 3, 21, 32)}, "v_cache must have the dtype and shape"),
        ({"k_scale": torch.ones(2, 3, 20)}, "k_scale and v_scale must be absent"),
        ({"cos": torch.ones(19, 16)}, "sin must be"),
        ({"cos": torch.ones(30, 17), "sin": torch.ones(30, 17)}, "cos must be contiguous float32"),
        ({"cos": torch.ones(12, 16), "sin": torch.ones(12, 16)}, "cos must have a row for every position"),
        ({"block_table": torch.ones(2, 3)}, "block_table must be contiguous int32"),
    ],
)
def test_bad_input_writes_nothing(change, message):
    arguments = operands(2, 3, 4, 20, 32)
    arguments[4] = torch.tensor([0, 16], dtype=torch.int32)
    good = dict(zip(("k_cache", "v_cache", "k", "v", "start"), arguments, strict=False)) | change
    before = good["k_cache"].clone()
    with pytest.raises(RuntimeError, match=f"kv_append: {message}"):
        ops.kv_append(**good)
    assert torch.equal(good["k_cache"], before)


def test_overlaps_are_refused():
    k_cache, v_cache, k, v, start = operands(2, 3, 4, 20, 32)[:5]
    with pytest.raises(RuntimeError, match="v_cache must not overlap k_cache"):
        ops.kv_append(k_cache, k_cache, k, v, start)
    with pytest.raises(RuntimeError, match="k must not overlap a cache"):
        ops.kv_append(k_cache, v_cache, k_cache[:, :, :4], v, start)


# --- 4-bit codes ------------------------------------------------------------------------------------


def check_nibbles(arguments, **options):
    """What is written stands for values as near as the reference's; no other slot is touched."""
    before = [None if t is None else t.clone() for t in arguments]
    expected = ref.kv_append(*arguments, **options)
    ops.kv_append(*arguments, **options)
    exact = ref.kv_append(*(torch.full_like(t, torch.nan).double() for t in options_wide(before)), *before[2:5],
                          **{n: t for n, t in options.items() if n != "k_shift"})  # fmt: skip
    for side, (codes, grid) in enumerate(((0, 5), (1, 6))):
        want = exact[side].clone()
        if side == 0 and options.get("k_shift") is not None:
            want = want - options["k_shift"].double()[:, None]
        written = ~want.isnan().any(-1)
        got = ref.from_nibbles(arguments[codes], arguments[grid])[written]
        best = ref.from_nibbles(expected[2 * side], expected[2 * side + 1])[written]
        ours, theirs = ((x - want[written]).square().sum(-1) for x in (got, best))
        assert bool((ours <= theirs * 1.001 + 1e-9).all())
        assert torch.equal(arguments[codes][~written], before[codes][~written])
        assert torch.equal(arguments[grid][~written], before[grid][~written])


def options_wide(arguments):
    """Float64 caches of the same slots."""
    return [t.new_empty((*t.shape[:-1], 2 * t.shape[-1]), dtype=torch.float64) for t in arguments[:2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 32), (2, 3, 5, 17, 64), (3, 2, 1, 40, 128), (1, 2, 3, 9, 256)]
)
def test_nibbles(dtype, shape):
    check_nibbles(operands(*shape, torch.uint8, dtype))
    cos, sin = tables(shape[3] + 3, shape[4] // 2)
    shift = torch.randn(shape[1], shape[4])
    check_nibbles(operands(*shape, torch.uint8, dtype), cos=cos, sin=sin, k_shift=shift)


def test_nibbles_in_pages():
    b, h, s, d, page = 3, 2, 21, 64, 8
    k, v, start = operands(b, h, s, 64, d, torch.uint8)[2:5]
    table = torch.randperm(30, dtype=torch.int32)[:24].view(3, 8)
    caches = [torch.ones(30, h, page, d // 2, dtype=torch.uint8) for _ in "kv"]
    grids = [torch.ones(30, h, page, d // 16).bfloat16() for _ in "kv"]
    check_nibbles([*caches, k, v, start, *grids], block_table=table)


def test_nibbles_of_odd_rows():
    arguments = operands(1, 1, 4, 4, 64, torch.uint8)
    arguments[4].zero_()
    arguments[2][0, 0, 0] = 0.0
    arguments[2][0, 0, 1, 5] = torch.nan
    arguments[2][0, 0, 2] = 3e38
    arguments[2][0, 0, 3, 7] = -torch.inf
    counted = ops.nan_count()
    ops.kv_append(*arguments)
    assert ops.nan_count() == counted + 1
    rows = ref.from_nibbles(arguments[0], arguments[5])[0, 0]
    assert bool(rows.isfinite().all()) and not rows[0].any()
    assert_close(rows[1].float(), arguments[2][0, 0, 1].nan_to_num(0.0), bound=0.2)


def test_nibbles_opcheck():
    arguments = operands(2, 3, 4, 20, 32, torch.uint8)
    torch.library.opcheck(ops.kv_append.default, arguments, {"k_shift": torch.randn(3, 32)})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k_cache": torch.ones(2, 3, 20, 32, dtype=torch.uint8)}, "k_cache must be"),
        ({"k_scale": torch.ones(2, 3, 20)}, r"k_scale must be bfloat16 \[.., D / 16\]"),
        ({"v_scale": None}, r"v_scale must be bfloat16 \[.., D / 16\]"),
        ({"k_shift": torch.ones(3, 33)}, r"k_shift must be contiguous float32 \[3, 32\]"),
        (
            {"k": torch.ones(2, 3, 4, 48), "v": torch.ones(2, 3, 4, 48)},
            "k_cache must be uint8 only for head sizes",
        ),
    ],
)
def test_bad_nibbles_write_nothing(change, message):
    names = ("k_cache", "v_cache", "k", "v", "start", "k_scale", "v_scale")
    good = dict(zip(names, operands(2, 3, 4, 20, 32, torch.uint8), strict=True)) | change
    before = good["k_cache"].clone()
    with pytest.raises(RuntimeError, match=f"kv_append: {message}"):
        ops.kv_append(**good)
    assert torch.equal(good["k_cache"], before)
    floats = operands(2, 3, 4, 20, 32)
    with pytest.raises(RuntimeError, match="k_shift must be absent for float32 caches"):
        ops.kv_append(*floats, k_shift=torch.ones(3, 32))
