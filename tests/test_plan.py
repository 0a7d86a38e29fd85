"""The plan file: what goes in comes out, bit for bit; what was damaged is refused with a clear text."""

from __future__ import annotations

import json
import random

import pytest
import torch
from torch import nn

from narrowcast.errors import ArgumentError, Error, FormatError, UnsupportedError, VerificationError
from narrowcast.graph import Graph, Plan
from narrowcast.graph.passes import optimize
from narrowcast.graph.report import layers_of
from narrowcast.graph.serialize import from_json, to_json

AUTO = torch.export.Dim.AUTO


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        y = self.b(torch.relu(self.a(x))) + x
        return y.view(y.shape[0], 2, -1).clamp(max=float("inf")), torch.arange(y.shape[0] * 2)


@pytest.fixture
def plan():
    exported = torch.export.export(Net().eval(), (torch.randn(3, 8),), dynamic_shapes=({0: AUTO},))
    graph, _ = optimize(Graph.from_exported(exported))
    return Plan(
        graph, "generic", "int8", config={"width": 8}, record={"calibration": "none"},
        certificate={"error": 0.5}, samples={"x": torch.randn(2, 8)},
        assets={"labels": b"a\nb", "empty": b""}, source={"name": "net"},
    )  # fmt: skip


def test_graph_round_trip(plan):
    data = json.loads(json.dumps(to_json(plan.graph)))
    again = from_json(data, plan.graph.weights)
    assert to_json(again) == data
    x = torch.randn(5, 8)
    for a, b in zip(again.run(x), plan.graph.run(x)):
        assert torch.equal(a, b)


def test_plan_round_trip(plan, tmp_path):
    path = tmp_path / "net.plan"
    plan.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["net.plan"]
    again = Plan.load(path)
    x = torch.randn(5, 8)
    for a, b in zip(again.graph.run(x), plan.graph.run(x)):
        assert torch.equal(a, b)
    for name in ("kind", "recipe", "config", "record", "certificate", "assets", "source"):
        assert getattr(again, name) == getattr(plan, name)
    assert torch.equal(again.samples["x"], plan.samples["x"])
    again.save(tmp_path / "again.plan")
    assert Plan.load(tmp_path / "again.plan").weight_bytes == plan.weight_bytes


def test_every_flipped_byte_and_every_cut_is_noticed(plan, tmp_path, seed):
    path = tmp_path / "net.plan"
    plan.save(path)
    good = path.read_bytes()
    draw = random.Random(seed)
    refused = 0
    for _ in range(150):
        data = bytearray(good)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        try:
            Plan.load(path)
        except Error:
            refused += 1
    assert refused >= 100  # the rest are flips inside texts and numbers that mean nothing to the format
    for cut in [0, 1, 8, 9, 100, len(good) // 2, len(good) - 1]:
        path.write_bytes(good[:cut])
        with pytest.raises(FormatError):
            Plan.load(path)


def test_flipped_weight_names_the_tensor(plan, tmp_path):
    path = tmp_path / "net.plan"
    plan.save(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"tensor \S+ was altered"):
        Plan.load(path)


def test_save_is_atomic(plan, tmp_path, monkeypatch):
    path = tmp_path / "net.plan"
    plan.save(path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    plan.recipe = "int4"
    with pytest.raises(OSError, match="disk full"):
        plan.save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def rewritten(plan, tmp_path, change):
    """A plan file whose document was edited."""
    import safetensors.torch

    path = tmp_path / "net.plan"
    plan.save(path)
    with safetensors.safe_open(str(path), "pt") as file:
        document = json.loads(file.metadata()["narrowcast"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(document)
    safetensors.torch.save_file(tensors, str(path), metadata={"narrowcast": json.dumps(document)})
    return path


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda d: d.update(format_version=99), UnsupportedError, "plan format 99"),
        (lambda d: d.update(graph={"nodes": []}), FormatError, "graph has 0 nodes"),
        (lambda d: d.pop("kind"), FormatError, "no valid kind"),
        (
            lambda d: _first_call(d).update(target="aten.system.default"),
            FormatError,
            "not one that a plan may call",
        ),
        (lambda d: _first_call(d).update(target="os.system"), FormatError, "not one that a plan may call"),
        (lambda d: _first_call(d).update(args={"tuple": [{"node": "later"}]}), FormatError, "not known here"),
        (lambda d: d["sha256"].popitem(), FormatError, "not the ones its document names"),
        (lambda d: _first_call(d).update(target="narrowcast._cap_isa.default"), FormatError, "may call"),
        (lambda d: _first_call(d).update(target="narrowcast.linear.out"), FormatError, "may call"),
        (lambda d: _first_call(d).update(target="aten.relu_.default"), FormatError, "may call"),
        (lambda d: _first_call(d).update(target="aten.relu.out"), FormatError, "may call"),
        (lambda d: _first_call(d).update(target="aten.rand.default"), FormatError, "may call"),
        (lambda d: _first_call(d).update(target="aten.add.__class__"), FormatError, "may call"),
        (lambda d: _first_call(d).update(args={"tuple": []}), FormatError, "the arguments are not those"),
        (lambda d: _first_call(d).update(kwargs={"alpha": 1}), FormatError, "the arguments are not those"),
        (lambda d: _first_call(d).update(args={"tuple": [_nested(200)]}), FormatError, "nested"),
        (lambda d: _first_call(d).update(args={"tuple": [10**40]}), FormatError, "64 bits"),
        (lambda d: _first_call(d).update(name="no name"), FormatError, "not a valid node name"),
        (lambda d: d["graph"]["nodes"].insert(0, d["graph"]["nodes"][0]), FormatError, "two nodes"),
        (lambda d: d["graph"]["nodes"].insert(0, d["graph"]["nodes"].pop(-2)), FormatError, "not known here"),
        (lambda d: _first_input(d).update(shape=[2**31]), FormatError, "no valid shape"),
        (lambda d: _first_input(d).update(shape=[1] * 9), FormatError, "no valid shape"),
        (lambda d: _first_input(d).update(dtype="object"), FormatError, "unknown dtype"),
        (lambda d: d.update(config={"x": float("nan")}), FormatError, "not JSON"),
    ],
)
def test_hostile_documents(plan, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        Plan.load(rewritten(plan, tmp_path, change))


def _nested(depth):
    return [] if depth == 0 else [_nested(depth - 1)]


def _first_input(document):
    return next(n for n in document["graph"]["nodes"] if n["op"] == "placeholder")


def _first_call(document):
    return next(n for n in document["graph"]["nodes"] if n["op"] == "call_function")


def test_only_what_reads_back_is_written(plan, tmp_path):
    plan.config["width"] = float("nan")
    with pytest.raises(ArgumentError, match="plain JSON"):
        plan.save(tmp_path / "net.plan")
    plan.config["width"] = 8
    node = next(plan.graph.calls())
    plan.graph.replace(node, plan.graph.add_call(torch.ops.aten.rand_like.default, node.args[:1], like=node))
    with pytest.raises(FormatError, match="cannot hold a call"):
        plan.save(tmp_path / "net.plan")
    assert not list(tmp_path.iterdir())


def test_saving_twice_gives_the_same_bytes(plan, tmp_path):
    plan.save(tmp_path / "a.plan")
    Plan.load(tmp_path / "a.plan").save(tmp_path / "b.plan")
    assert (tmp_path / "a.plan").read_bytes() == (tmp_path / "b.plan").read_bytes()


def test_a_signature_outlives_the_release_that_made_it(plan, tmp_path):
    from cryptography.hazmat.primitives.asymmetric import ed25519

    key = ed25519.Ed25519PrivateKey.generate()
    plan.written_by = "narrowcast 0.0.1"
    plan.sign(key.private_bytes_raw())
    plan.save(tmp_path / "old.plan")
    again = Plan.load(tmp_path / "old.plan")
    again.verify_signature(key.public_key().public_bytes_raw())
    again.config["width"] = 9
    with pytest.raises(VerificationError, match="changed since"):
        again.verify_signature(key.public_key().public_bytes_raw())


def test_not_a_plan(tmp_path):
    with pytest.raises(ArgumentError, match="no file"):
        Plan.load(tmp_path / "none.plan")
    (tmp_path / "text.plan").write_text("hello, this is no plan at all")
    with pytest.raises(FormatError, match="not a plan"):
        Plan.load(tmp_path / "text.plan")
    with pytest.raises(ArgumentError, match="does not exist"):
        Plan(Graph(torch.fx.Graph(), {}), "generic", "int8").save(tmp_path / "no" / "x.plan")


def test_signature(plan, tmp_path):
    from cryptography.hazmat.primitives.asymmetric import ed25519

    key = ed25519.Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes_raw()
    with pytest.raises(VerificationError, match="no signature"):
        plan.verify_signature(public)
    plan.sign(key.private_bytes_raw())
    plan.save(tmp_path / "signed.plan")
    again = Plan.load(tmp_path / "signed.plan")
    again.verify_signature(public)
    next(iter(again.graph.weights.values())).view(torch.uint8).view(-1)[0] ^= 1
    with pytest.raises(VerificationError, match="not signed with this key"):
        again.verify_signature(public)


def test_layers_that_were_left_in_float_are_listed_too(plan):
    rows = {row["name"]: row for row in layers_of(plan)}
    assert {(r["op"], r["precision"]) for r in rows.values()} == {("linear", "float32")}
    assert sorted(r["bytes"] for r in rows.values()) == [4 * (16 * 8 + 8), 4 * (16 * 8 + 16)]
