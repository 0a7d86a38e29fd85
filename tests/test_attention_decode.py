import pytest
import torch

from attention_decode_cases import operands, pages_of
from conftest import forced, variants
from narrowcast.kernels.attention_decode import attention_decode as public
from narrowcast.kernels.attention_decode import attention_decode_ref as ref
from steps import run_step
from tolerances import BOUND, assert_close

ops = torch.ops.narrowcast
VARIANTS = variants("attention_decode")
CACHES = [torch.float32, torch.float16, torch.bfloat16, torch.int8]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 1, 1),
        (3, 9, 3, 1, 700, 64),
        (2, 4, 4, 1, 256, 17),
        (2, 6, 2, 5, 300, 32),
        (1, 4, 2, 70, 90, 40),
    ],
)
def test_caches(variant, cache, shape):
    inputs = operands(*shape, cache)
    with forced("attention_decode", variant):
        out = ops.attention_decode(*inputs)
    assert_close(out, ref.attention_decode(*inputs))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize("sq", [1, 3, 20])
def test_options(variant, dtype, sq):
    inputs = operands(2, 6, 2, sq, 600, 32, torch.bfloat16, dtype)
    options = {"scale": 0.4, "window": 270, "softcap": 3.0, "sinks": torch.randn(6)}
    with forced("attention_decode", variant):
        out = ops.attention_decode(*inputs, **options)
    assert out.dtype == dtype
    assert_close(out, ref.attention_decode(*inputs, **options))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("sq", [1, 9])
def test_pages(variant, cache, sq):
    q, k, v, lengths, k_scale, v_scale = operands(3, 4, 2, sq, 320, 32, cache)
    table = torch.randperm(70, dtype=torch.int32)[:60].view(3, 20)
    paged = [None if t is None else pages_of(t, table, 16) for t in (k, v, k_scale, v_scale)]
    with forced("attention_decode", variant):
        dense = ops.attention_decode(q, k, v, lengths, k_scale, v_scale)
        out = ops.attention_decode(q, *paged[:2], lengths, *paged[2:], block_table=table)
    assert torch.equal(out, dense)
    assert_close(out, ref.attention_decode(q, *paged[:2], lengths, *paged[2:], block_table=table))


def test_same_bits_whatever_the_batch_and_threads():
    inputs = operands(4, 6, 2, 1, 1500, 64)
    whole = ops.attention_decode(*inputs)
    for b in range(4):
        alone = ops.attention_decode(*(t[b : b + 1].contiguous() for t in inputs[:4]))
        assert torch.equal(alone, whole[b : b + 1])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(ops.attention_decode(*inputs), whole)
    finally:
        torch.set_num_threads(threads)


def test_views_out_and_empty():
    inputs = operands(2, 4, 2, 3, 50, 16)
    q, k, v, lengths = inputs[:4]
    expected = ref.attention_decode(q, k, v, lengths)
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert_close(ops.attention_decode(*turned, lengths), expected)
    backwards = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v)]
    assert_close(ops.attention_decode(*backwards, lengths), expected)
    out = torch.full_like(q, torch.nan)
    ops.attention_decode.out(q, k, v, lengths, out=out)
    assert_close(out, expected)
    assert ops.attention_decode(q[:0], k[:0], v[:0], lengths[:0]).shape == (0, 4, 3, 16)
    assert ops.attention_decode(q[:, :, :0], k, v, lengths * 0).shape == (2, 4, 0, 16)


def test_opcheck_and_compile():
    inputs = operands(2, 4, 2, 3, 50, 16)
    torch.library.opcheck(ops.attention_decode.default, inputs)
    torch.library.opcheck(ops.attention_decode.out, inputs, {"out": torch.empty_like(inputs[0])})
    compiled = torch.compile(lambda *a: public(*a) + 1, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*inputs), ref.attention_decode(*inputs) + 1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lengths": torch.tensor([3, 51], dtype=torch.int32)}, "lengths must lie in 3 .. 50"),
        ({"lengths": torch.tensor([2, 50], dtype=torch.int32)}, "lengths must lie in 3 .. 50"),
        ({"lengths": torch.tensor([-1, 50], dtype=torch.int32)}, "lengths must lie in 3 .. 50"),
        ({"lengths": torch.tensor([9, 9])}, "lengths must be contiguous int32"),
        ({"q": torch.ones(2, 4, 3, 8)}, "k_cache must have the batch and head size"),
        ({"q": torch.ones(2, 3, 3, 16)}, "k_cache must have a number of heads"),
        ({"v_cache": torch.ones(2, 2, 50, 16).half()}, "v_cache must have the dtype"),
        ({"k_cache": torch.ones(2, 2, 50, 16).double()}, "k_cache must be float32"),
        ({"k_scale": torch.ones(2, 2, 50)}, "k_scale and v_scale must be absent"),
        ({"sinks": torch.ones(4).half()}, "sinks must be"),
        ({"window": -1}, "window must be"),
    ],
)
def test_bad_input(change, message):
    names = ("q", "k_cache", "v_cache", "lengths")
    good = dict(zip(names, operands(2, 4, 2, 3, 50, 16), strict=False))
    with pytest.raises(RuntimeError, match=f"attention_decode: {message}"):
        ops.attention_decode(**(good | change))


def test_bad_int8_and_pages():
    q, k, v, lengths, k_scale, v_scale = operands(2, 4, 2, 1, 32, 16, torch.int8)
    with pytest.raises(RuntimeError, match="k_scale and v_scale must be given"):
        ops.attention_decode(q, k, v, lengths)
    with pytest.raises(RuntimeError, match="k_scale must be float32"):
        ops.attention_decode(q, k, v, lengths, k_scale[..., :5], v_scale)
    full = torch.tensor([32, 32], dtype=torch.int32)
    for entry in (-1, 2):
        table = torch.tensor([[0], [entry]], dtype=torch.int32)
        with pytest.raises(RuntimeError, match=r"block_table must hold pages 0 \.\. 1"):
            ops.attention_decode(q, k, v, full, k_scale, v_scale, block_table=table)


def test_steps_read_lengths_when_they_run():
    q, k, v, lengths = operands(2, 4, 2, 1, 300, 32)[:4]
    none, out = None, torch.empty_like(q)
    run_step("attention_decode", [q, k, v, lengths, none, none, none, none], [out])
    assert torch.equal(out, ops.attention_decode(q, k, v, lengths))
    with pytest.raises(RuntimeError, match="lengths must lie in"):
        run_step("attention_decode", [q, k, v, lengths + 400, none, none, none, none], [out])
    k, v = (t[:, :, :9].nan_to_num() for t in (k, v))
    run_step("attention", [q, k, v, none, none, none, none], [out], causal=True)
    assert torch.equal(out, ops.attention(q, k, v, causal=True))


def test_append_step():
    caches = [torch.zeros(2, 2, 20, 16) for _ in range(4)]
    k, v, start = torch.randn(2, 2, 3, 16), torch.randn(2, 2, 3, 16), torch.tensor([0, 17], dtype=torch.int32)
    run_step("kv_append", [*caches[:2], k, v, start, *[None] * 6], [])
    ops.kv_append(*caches[2:], k, v, start)
    assert torch.equal(caches[0], caches[2]) and torch.equal(caches[1], caches[3])
    with pytest.raises(RuntimeError, match="start must lie in"):
        run_step("kv_append", [*caches[:2], k, v, start + 1, *[None] * 6], [])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16])
def test_rows_behind_a_mask_do_not_leak(variant, cache):
    q, k, v, lengths = operands(1, 2, 2, 3, 300, 24, cache)[:4]
    lengths[:] = 300
    k, v = k.nan_to_num(), v.nan_to_num()
    k[:, :, -1], v[:, :, -1], v[:, :, :40] = torch.nan, torch.nan, torch.inf
    with forced("attention_decode", variant):
        out = ops.attention_decode(q, k, v, lengths, window=200)
    expected = ref.attention_decode(
        q[:, :, :2], k[:, :, :-1], v[:, :, :-1].nan_to_num(0, 0, 0), lengths - 1, window=200
    )
    assert_close(out[:, :, :2], expected)
    assert out[:, :, 2].isnan().all()


# --- 4-bit codes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 1, 32),
        (3, 9, 3, 1, 700, 64),
        (2, 4, 4, 2, 256, 128),
        (2, 6, 2, 5, 300, 32),
        (1, 4, 2, 70, 90, 256),
    ],
)
def test_nibbles(variant, dtype, shape):
    inputs = operands(*shape, torch.uint8, dtype)
    with forced("attention_decode", variant):
        out = ops.attention_decode(*inputs, scale=0.1)
    assert_close(out, ref.attention_decode(*inputs, scale=0.1))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sq", [1, 9])
def test_nibbles_in_pages_and_options(variant, sq):
    q, k, v, lengths, k_scale, v_scale = operands(3, 4, 2, sq, 320, 64, torch.uint8)
    table = torch.randperm(70, dtype=torch.int32)[:60].view(3, 20)
    paged = [pages_of(t, table, 16) for t in (k, v, k_scale, v_scale)]
    options = {"window": 40, "softcap": 3.0, "sinks": torch.randn(4)}
    with forced("attention_decode", variant):
        dense = ops.attention_decode(q, k, v, lengths, k_scale, v_scale, **options)
        out = ops.attention_decode(q, *paged[:2], lengths, *paged[2:], block_table=table, **options)
    assert torch.equal(out, dense)
    assert_close(out, ref.attention_decode(q, k, v, lengths, k_scale, v_scale, **options))


def test_nibbles_read_what_kv_append_writes():
    """Scores and sums over a cache of 4 bits are near those of the rows that went in."""
    q, k, v = torch.randn(2, 6, 1, 64), torch.randn(2, 2, 80, 64), torch.randn(2, 2, 80, 64)
    codes = [torch.zeros(2, 2, 80, 32, dtype=torch.uint8) for _ in "kv"]
    grids = [torch.zeros(2, 2, 80, 4, dtype=torch.bfloat16) for _ in "kv"]
    shift = torch.randn(2, 64) * 3
    start, lengths = torch.zeros(2, dtype=torch.int32), torch.full((2,), 80, dtype=torch.int32)
    ops.kv_append(*codes, k + shift[:, None], v, start, *grids, k_shift=shift)
    out = ops.attention_decode(q, *codes, lengths, *grids)
    assert_close(out, ref.attention_decode(q, k, v, lengths), bound=0.2)


def test_bad_nibbles():
    q, k, v, lengths, k_scale, v_scale = operands(2, 4, 2, 1, 32, 64, torch.uint8)
    with pytest.raises(RuntimeError, match="k_scale and v_scale must be given for uint8"):
        ops.attention_decode(q, k, v, lengths)
    with pytest.raises(RuntimeError, match="k_scale must be bfloat16"):
        ops.attention_decode(q, k, v, lengths, k_scale.float(), v_scale)
    with pytest.raises(RuntimeError, match="k_cache must have a head size of 32, 64"):
        ops.attention_decode(
            q[..., :48].contiguous(), k[..., :24].contiguous(), v[..., :24].contiguous(), lengths
        )
    torch.library.opcheck(ops.attention_decode.default, (q, k, v, lengths, k_scale, v_scale))
