import pytest
import torch

from conftest import LOADED, STORED
from narrowcast.kernels.rope import rope_ref
from narrowcast.kernels.rope import rope_triton as ours
from rope_cases import operands
from tolerances import assert_close


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "b, h, s, d, rotated",
    [(1, 1, 1, 2, 2), (2, 3, 5, 64, 64), (3, 2, 7, 80, 34), (1, 9, 1, 192, 192), (2, 1, 3, 7, 0)],
)
def test_reference(dtype, interleaved, b, h, s, d, rotated):
    for table_dtype in LOADED:
        x, cos, sin = operands(b, h, s, d, rotated, dtype, table_dtype)
        for positions in (
            None,
            torch.randint(0, 50 - s, (b,), dtype=torch.int32),
            torch.randint(0, 50 - s, (b,)),
            torch.randint(0, 50, (b, s)),
            torch.randint(0, 50, (s, b), dtype=torch.int32).t(),
        ):
            out = ours.rope(x, cos, sin, positions, interleaved)
            assert out.dtype == dtype
            assert_close(out, rope_ref.rope(x, cos, sin, positions, interleaved))


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
            out = ours.rope(y, *table)
            assert out.is_contiguous()
            assert_close(out, rope_ref.rope(y, *table))


@pytest.mark.parametrize("positions", [[0, 46], [0, 2**62], [-1, 0], [[0] * 5, [50] * 5]])
def test_positions_outside_the_tables_give_nan(positions):
    x, cos, sin = operands(2, 3, 5, 32, 16)
    positions = torch.tensor(positions)
    out = ours.rope(x, cos, sin, positions)
    each = positions[:, None] + torch.arange(5) if positions.dim() == 1 else positions
    outside = ((each < 0) | (each > 49))[:, None, :, None].expand(2, 3, 5, 16)
    assert torch.equal(out[..., :16].isnan(), outside) and out[..., 16:].isfinite().all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(2, 5, 32)}, "x must be float32"),
        ({"x": torch.ones(2, 3, 5, 32, dtype=torch.int32)}, "x must be float32"),
        ({"cos": torch.ones(50, 17)}, "cos must be .* R <= D = 32"),
        ({"cos": torch.ones(50)}, "cos must be"),
        ({"sin": torch.ones(49, 16)}, "sin must have the dtype and shape of cos"),
        ({"sin": torch.ones(50, 16).half()}, "sin must have the dtype and shape of cos"),
        ({"sin": torch.ones(50, 16, device="meta")}, "sin must be on"),
        ({"positions": torch.ones(2)}, "positions must be int32 or int64"),
        ({"positions": torch.ones(3, dtype=torch.int32)}, "positions must be int32 or int64"),
        ({"positions": torch.ones(2, 4, dtype=torch.int32)}, "positions must be int32 or int64"),
        ({"x": torch.ones(2, 3, 51, 32)}, "cos must have a row for each of the 51 positions"),
    ],
)
def test_bad_input(change, message):
    given = {"x": torch.ones(2, 3, 5, 32), "cos": torch.ones(50, 16), "sin": torch.ones(50, 16)}
    device = given["x"].device
    change = {k: v if v.is_meta else v.to(device) for k, v in change.items()}
    with pytest.raises(RuntimeError, match=f"rope: {message}"):
        ours.rope(**(given | change))
