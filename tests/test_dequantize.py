import pytest
import torch

from conftest import forced, variants
from dequantize_cases import group_inputs
from narrowcast.kernels.dequantize import dequantize_ref as ref

ops = torch.ops.narrowcast


@pytest.mark.parametrize("variant", variants("dequantize_groups"))
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("n, k, group", [(1, 2, 2), (3, 32, 32), (5, 96, 6), (17, 768, 256), (2, 1200, 600)])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_groups_bit_equal_reference(variant, bits, n, k, group, scale_dtype, out_dtype):
    for with_offset in (False, True):
        inputs = group_inputs(n, k, group, bits, scale_dtype, with_offset)
        with forced("dequantize_groups", variant):
            out = ops.dequantize_groups(*inputs, out_dtype)
        assert torch.equal(out, ref.dequantize_groups(*inputs, out_dtype))


def test_groups_empty_and_strided():
    assert ops.dequantize_groups(*group_inputs(0, 64, 32, 4, torch.float32, True)).shape == (0, 64)
    packed, scale, offset, group, bits = group_inputs(8, 64, 32, 4, torch.float32, True)
    out = ops.dequantize_groups(packed[::2], scale[::2], offset[::2], group, bits)
    assert torch.equal(out, ref.dequantize_groups(packed[::2], scale[::2], offset[::2], group, bits))


def test_groups_opcheck_and_compile():
    inputs = group_inputs(6, 64, 32, 4, torch.float16, True)
    torch.library.opcheck(ops.dequantize_groups.default, inputs)
    compiled = torch.compile(lambda *a: ops.dequantize_groups(*a) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), ref.dequantize_groups(*inputs) + 1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bits": 3}, "bits must be 4 or 8, got 3"),
        ({"group_size": 7}, "group_size must be positive"),
        ({"scale": torch.ones(6, 1)}, r"scale must be \[N, K / group_size\]"),
        ({"packed": torch.ones(6, 32)}, "packed must be uint8"),
        ({"offset": torch.ones(6, 2, dtype=torch.float64)}, "offset must have the shape and dtype"),
        ({"out_dtype": torch.int8}, "out_dtype must be"),
    ],
)
def test_groups_bad_input(change, message):
    packed, scale, offset, group, bits = group_inputs(6, 64, 32, 4, torch.float32, True)
    arguments = {
        "packed": packed,
        "scale": scale,
        "offset": offset,
        "group_size": group,
        "bits": bits,
    }
    with pytest.raises(RuntimeError, match=f"dequantize_groups: {message}"):
        ops.dequantize_groups(**(arguments | change))


def test_gradients_are_refused():
    packed, scale, _, group, bits = group_inputs(6, 64, 32, 4, torch.float32, False)
    with pytest.raises(RuntimeError, match="no gradient"):
        ops.dequantize_groups(packed, scale.requires_grad_(), None, group, bits)
    with torch.no_grad():
        ops.dequantize_groups(packed, scale, None, group, bits)
