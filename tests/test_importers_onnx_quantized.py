"""Quantised ONNX files: weights bit for bit by the specification, and graphs that run on their codes."""

import pytest
import torch

import narrowcast
from narrowcast.errors import FormatError, UnsupportedError
from narrowcast.graph import Graph
from narrowcast.importers import load_model

onnx = pytest.importorskip("onnx")
helper, numpy_helper, TensorProto = onnx.helper, onnx.numpy_helper, onnx.TensorProto
node = helper.make_node
ops = torch.ops.narrowcast


def save(path, nodes, depth, weights, opset=21):
    initializers = []
    for name, t in weights.items():
        if isinstance(t, tuple):  # four bits
            kind, codes = t
            raw = (codes.flatten()[::2] & 15 | codes.flatten()[1::2] << 4).to(torch.uint8).numpy().tobytes()
            initializers.append(helper.make_tensor(name, kind, list(codes.shape), raw, raw=True))
        else:
            initializers.append(numpy_helper.from_array(t.contiguous().numpy(), name))
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", depth])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        initializers,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    path.write_bytes(helper.make_model(graph, opset_imports=opsets).SerializeToString())
    return path


def check(path, expected, bits, extra=lambda x: x, bias=None):
    """The one layer of the file has exactly the expected weight [N, K], and runs on its codes."""
    model = load_model(path)
    (native,) = model.native.values()
    assert native.bits == bits and torch.equal(native.dequantize(), expected)
    plan = narrowcast.compress(model, recipe="native")
    assert len(list(plan.graph.calls(ops.linear_grouped.default))) == 1
    x = torch.randn(5, expected.shape[1])
    reference = torch.nn.functional.linear(extra(x), expected, bias)
    # linear_grouped keeps its inputs as 16-bit integers per row.
    for graph, bound in ((Graph.from_exported(model.exported), 1e-5), (plan.graph, 1e-4)):
        assert float((graph.run(x)[0] - reference).norm() / reference.norm()) < bound


@pytest.mark.parametrize("how", ["MatMul", "Gemm", "Gemm transB", "Transpose"])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("unsigned", [False, True])
def test_weights_in_rows(tmp_path, how, per_channel, unsigned):
    n, k = 24, 64
    low, dtype = (0, torch.uint8) if unsigned else (-128, torch.int8)
    codes = torch.randint(low, low + 256, (n, k))
    scale = torch.rand(n if per_channel else ()).half().float() + 0.5
    zero = torch.full(scale.shape, 128 if unsigned else 0)
    expected = ((codes - zero.reshape(-1, 1)).double() * scale.double().reshape(-1, 1)).float()
    rows = how in ("Gemm transB", "Transpose")
    stored = codes if rows else codes.t()
    weights = {"q": stored.to(dtype), "s": scale, "z": zero.to(dtype), "b": torch.randn(n)}
    nodes = [node("DequantizeLinear", ["q", "s", "z"], ["w"], axis=0 if rows else 1)]
    if how == "Transpose":
        nodes += [node("Transpose", ["w"], ["t"]), node("MatMul", ["x", "t"], ["y"])]
    elif how == "MatMul":
        nodes += [node("MatMul", ["x", "w"], ["y"])]
    else:
        nodes += [node("Gemm", ["x", "w", "b"], ["y"], transB=int(rows))]
    bias = weights["b"] if "Gemm" in how else None
    check(save(tmp_path / "m.onnx", nodes, k, weights), expected, 8, bias=bias)


@pytest.mark.parametrize("kind", ["INT4", "UINT4"])
def test_weights_in_blocks_of_four_bits(tmp_path, kind):
    n, k, block = 24, 96, 32
    low = -8 if kind == "INT4" else 0
    codes, scale = torch.randint(low, low + 16, (k, n)), torch.randn(k // block, n).half().float()
    zero = torch.randint(low, low + 16, scale.shape)
    index = torch.arange(k) // block
    expected = ((codes - zero[index]).double() * scale[index].double()).float().t()
    weights = {"q": (getattr(TensorProto, kind), codes), "s": scale, "z": (getattr(TensorProto, kind), zero)}
    nodes = [
        node("DequantizeLinear", ["q", "s", "z"], ["w"], axis=0, block_size=block),
        node("MatMul", ["x", "w"], ["y"]),
    ]
    check(save(tmp_path / "m.onnx", nodes, k, weights), expected, 4)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zeros", ["none", "packed", "float"])
def test_mat_mul_n_bits(tmp_path, bits, zeros):
    n, k, block = 7, 96, 32
    blocks = k // block
    codes, scale = torch.randint(0, 1 << bits, (n, k)), torch.randn(n, blocks).half().float()
    zero = torch.randint(0, 1 << bits, (n, blocks))
    per = 8 // bits

    def pack(t):
        t = torch.nn.functional.pad(t, (0, -t.shape[1] % per)).unflatten(1, (-1, per))
        return (t << torch.arange(per) * bits).sum(-1).to(torch.uint8)

    weights = {"q": pack(codes).view(n, blocks, -1), "s": scale.flatten()}
    inputs = ["x", "q", "s"]
    if zeros == "none":
        zero = torch.full_like(zero, 1 << (bits - 1))
    else:
        zero = zero + 0.5 if zeros == "float" and bits < 8 else zero
        weights["z"] = pack(zero).flatten() if zeros == "packed" else zero.float()
        inputs.append("z")
    index = torch.arange(k) // block
    expected = ((codes - zero[:, index]).double() * scale[:, index].double()).float()
    layer = node("MatMulNBits", inputs, ["y"], domain="com.microsoft", K=k, N=n, bits=bits, block_size=block)
    check(save(tmp_path / "m.onnx", [layer], k, weights), expected, 8 if bits == 8 else 4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_activations_between_quantize_and_dequantize(tmp_path, dtype):
    """Halves go to even, and what is too large stays at the end of the range."""
    n, k, low = 8, 64, 0 if dtype == torch.uint8 else -128
    codes, scale = torch.randint(-127, 128, (k, n)).to(torch.int8), torch.rand(n)
    zero, step = 100 if low == 0 else -3, 0.02
    weights = {"q": codes, "s": scale, "xs": torch.tensor(step), "xz": torch.tensor(zero, dtype=dtype)}
    nodes = [
        node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
        node("DequantizeLinear", ["q", "s"], ["w"], axis=1),
        node("MatMul", ["xd", "w"], ["y"]),
    ]

    def rounded(x):
        return (((x / step).round() + zero).clamp(low, low + 255) - zero) * step

    check(save(tmp_path / "m.onnx", nodes, k, weights), codes.t() * scale[:, None], 8, extra=rounded)


def test_what_does_not_fit_is_named(tmp_path):
    weights = {"q": torch.zeros(8, 3, 16, dtype=torch.uint8), "s": torch.ones(23)}
    options = {"domain": "com.microsoft", "K": 96, "N": 8, "bits": 4, "block_size": 32, "name": "layer"}
    path = save(tmp_path / "m.onnx", [node("MatMulNBits", ["x", "q", "s"], ["y"], **options)], 96, weights)
    with pytest.raises(FormatError, match=r"'layer' \(MatMulNBits\): scales must be 24 floats"):
        load_model(path)
    save(path, [node("MatMulNBits", ["x", "x", "s"], ["y"], **options)], 96, weights)
    with pytest.raises(UnsupportedError, match="must be constants"):
        load_model(path)
