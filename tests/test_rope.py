import pytest
import torch

from conftest import forced, variants
from narrowcast.kernels.rope import rope_ref as ref
from rope_cases import operands
from tolerances import assert_close

ops = torch.ops.narrowcast
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("variant", variants("rope"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "b, h, s, d, rotated",
    [(1, 1, 1, 2, 2), (2, 3, 5, 64, 64), (3, 2, 7, 80, 34), (1, 9, 1, 192, 192), (2, 1, 3, 7, 0)],
)
def test_reference(variant, dtype, interleaved, b, h, s, d, rotated):
    for table_dtype in DTYPES:
        x, cos, sin = operands(b, h, s, d, rotated, dtype, table_dtype)
        for positions in (
            None,
            torch.randint(0, 50 - s, (b,), dtype=torch.int32),
            torch.randint(0, 50 - s, (b,)),
            torch.randint(0, 50, (b, s)),
            torch.randint(0, 50, (s, b), dtype=torch.int32).t(),
        ):
            with forced("rope", variant):
                out = ops.rope(x, cos, sin, positions, interleaved)
            assert out.dtype == dtype
            assert_close(out, ref.rope(x, cos, sin, positions, interleaved))


def test_strided_expanded_empty():
    x, cos, sin = operands(2, 4, 6, 32, 32)
    for y in (
        x.transpose(1, 2).contiguous().transpose(1, 2),
        x[:, ::2, 1:4],
        x[:1, :1].expand(2, 4, 6, 32),
        x.expand(2, 4, 6, 32)[..., :1].expand(2, 4, 6, 32),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        x[:0],
        x[:, :, :0],
    ):
        for table in ((cos, sin), (cos.t().contiguous().t(), sin[:1].expand(50, 16))):
            out = ops.rope(y, *table)
            assert out.is_contiguous()
            assert_close(out, ref.rope(y, *table))


def test_opcheck_and_compile():
    x, cos, sin = operands(2, 3, 4, 32, 16)
    for arguments in ((x, cos, sin), (x, cos, sin, torch.tensor([1, 5]), True)):
        torch.library.opcheck(ops.rope.default, arguments)
    f = torch.compile(lambda y: ops.rope(y, cos, sin) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(f(x), ops.rope(x, cos, sin) + 1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(2, 5, 32)}, "x must be float32"),
        ({"x": torch.ones(2, 3, 5, 32, dtype=torch.int32)}, "x must be float32"),
        ({"cos": torch.ones(50, 17)}, "cos must be .* R <= D = 32"),
        ({"cos": torch.ones(50)}, "cos must be"),
        ({"sin": torch.ones(49, 16)}, "sin must have the dtype and shape of cos"),
        ({"sin": torch.ones(50, 16).half()}, "sin must have the dtype and shape of cos"),
        ({"positions": torch.ones(2)}, "positions must be int32 or int64"),
        ({"positions": torch.ones(3, dtype=torch.int32)}, "positions must be int32 or int64"),
        ({"positions": torch.ones(2, 4, dtype=torch.int32)}, "positions must be int32 or int64"),
        ({"positions": torch.tensor([0, 46])}, r"positions must be 0 .. 45 .* got 46"),
        ({"positions": torch.tensor([0, 2**62])}, "positions must be 0 .. 45"),
        ({"positions": torch.tensor([-1, 0])}, "positions must be 0 .. 45 .* got -1"),
        ({"positions": torch.full((2, 5), 50)}, "positions must be 0 .. 49 .* got 50"),
        ({"x": torch.ones(2, 3, 51, 32)}, "cos must have a row for each of the 51 positions"),
    ],
)
def test_bad_input(change, message):
    arguments = {"x": torch.ones(2, 3, 5, 32), "cos": torch.ones(50, 16), "sin": torch.ones(50, 16)}
    with pytest.raises(RuntimeError, match=f"rope: {message}"):
        ops.rope(**(arguments | change))
