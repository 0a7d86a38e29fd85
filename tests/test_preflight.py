"""A compression foretold: bytes, and the peak of memory, beside what the compression then does."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import narrowcast as nc
from command_line import one_line, runner
from narrowcast.compress import preflight
from narrowcast.errors import ArgumentError, UnsupportedError
from narrowcast.graph import Graph
from narrowcast.graph.passes import optimize
from narrowcast.importers.model import Model

AUTO = torch.export.Dim.AUTO


class Net(nn.Module):
    """A convolution with bias and one without, a table of the size that is quantised, dense layers of odd depth."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4096, 64)
        self.wide, self.odd = nn.Linear(64, 96), nn.Linear(96, 33)
        self.last, self.plain = nn.Linear(33, 12), nn.Linear(64, 160, bias=False)

    def forward(self, ids):
        x = self.table(ids)
        return self.last(torch.relu(self.odd(torch.relu(self.wide(x))))), self.plain(x)


class Cnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.next = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 48, 1, bias=False)
        self.last, self.head = nn.Conv2d(48, 32, 1), nn.Linear(32, 10)

    def forward(self, x):
        x = torch.relu(self.last(torch.relu(self.next(torch.relu(self.stem(x))))))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def net():
    ids = torch.randint(4096, (3, 8))
    return Model(torch.export.export(Net().eval(), (ids,), dynamic_shapes=({0: AUTO},)), "generic")


@pytest.fixture(scope="module")
def cnn():
    exported = torch.export.export(Cnn().eval(), (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: AUTO},))
    return Model(exported, "image", {"image": {"size": 8}})


@pytest.mark.parametrize("recipe", ["fp32", "int8"])
def test_bytes_are_exact(net, recipe):
    data = [(torch.randint(4096, (3, 8)),) for _ in range(3)]
    told = nc.predict(net, recipe=recipe, data=data)
    assert told.bytes == (nc.compress(net, recipe=recipe, data=data).weight_bytes,) * 2


@pytest.mark.parametrize("recipe", ["int8", "int8-weight", "int4"])
def test_bytes_of_a_graph_are_exact(net, recipe):
    """Also for recipes that this kind of model is not compressed with: the arithmetic is that of the layers."""
    from narrowcast.compress.transformer import quantize_grouped, quantize_int8

    graph, _ = optimize(Graph.from_exported(net.exported))
    least, most = preflight.bytes_of(graph, "encoder", recipe, None)
    if recipe == "int8":
        quantize_int8(graph, {}, 64, set())
    else:
        quantize_grouped(graph, {}, 4 if recipe == "int4" else 8, 32, 8, set())
    graph.clean()
    assert least == most == graph.weight_bytes


@pytest.mark.parametrize(
    "options",
    [
        {"recipe": "int8"},
        {"recipe": "int4"},
        {"recipe": "int8", "prune": 0.3},
        {"recipe": "int4", "prune": 0.2},
    ],
)
def test_bytes_of_a_cnn_are_a_range(cnn, options):
    data = torch.randn(20, 3, 8, 8)
    told = nc.predict(cnn, data=data, **options)
    plan = nc.compress(cnn, data=data, **options)
    print(told.bytes, plan.weight_bytes)
    assert told.bytes[0] <= plan.weight_bytes <= told.bytes[1] and "range" in told.notes[-1]
    assert told.seconds > 0


def test_what_is_asked_for_is_foretold(net, cnn):
    data = [(torch.randint(4096, (3, 8)),) for _ in range(3)]
    kept = nc.predict(net, recipe="int8", data=data, keep_float=["wide"])
    assert kept.bytes == (nc.compress(net, recipe="int8", data=data, keep_float=["wide"]).weight_bytes,) * 2
    pictures = torch.randn(20, 3, 8, 8)
    whole = nc.predict(cnn, recipe="fp32", data=pictures)
    cut = nc.predict(cnn, recipe="fp32", data=pictures, prune=0.3, distill=1000)
    assert cut.bytes[1] < whole.bytes[0] and cut.seconds > whole.seconds
    for options, message in (
        ({"recipe": "int8", "symmetric": True}, "symmetric must be False"),
        ({"recipe": "fp32", "distill": 5}, "distill must be"),
        ({"recipe": "fp32", "prune": 2.0}, "prune must lie between"),
    ):
        with pytest.raises(ArgumentError, match=message):
            nc.predict(cnn, data=pictures, **options)
    with pytest.raises(UnsupportedError, match="rotate must be False"):
        nc.predict(cnn, recipe="int8", data=pictures, rotate=True)


def test_live_bytes_are_those_of_the_largest_moment():
    class Chain(nn.Module):
        def forward(self, x):
            y = torch.cat((x, x, x))  # x is not counted: it is the caller's
            return (y * 2).sum()

    x = torch.randn(100)
    graph = Graph.from_exported(torch.export.export(Chain(), (x,)))
    assert preflight.live_bytes(graph, (x,)) == 2 * 1200


_CHILD = """
import torch, narrowcast as nc
from torch import nn
from narrowcast.compress import preflight
net = nn.Sequential(*(nn.Linear(3072, 3072) for _ in range(4))).eval().requires_grad_(False)
data = [(torch.randn(512, 3072),) for _ in range(4)]
options = {"recipe": "RECIPE", "data": data, "example_inputs": data[0], "dynamic_shapes": ({0: torch.export.Dim.AUTO},)}
told = nc.predict(net, **options)
nc.compress(net, **options)
print(told.peak, preflight.most_resident())
"""


_PICTURES = """
import torch, narrowcast as nc
from torch import nn
from narrowcast.compress import preflight
from narrowcast.importers.model import Model
layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 10)).eval().requires_grad_(False)
exported = torch.export.export(net, (torch.randn(2, 3, 96, 96),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
model, data = Model(exported, "image", {"image": {"size": 96}}), torch.randn(220, 3, 96, 96)
told = nc.predict(model, recipe="RECIPE", data=data)
nc.compress(model, recipe="RECIPE", data=data)
print(told.peak, preflight.most_resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize(
    "child, recipe", [(_CHILD, "fp32"), (_CHILD, "int8"), (_PICTURES, "int8"), (_PICTURES, "int4")]
)
def test_the_peak_of_memory_is_foretold(child, recipe):
    code = child.replace("RECIPE", recipe)
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    told, real = map(int, run.stdout.split())
    print(f"{recipe}: told {told >> 20} MB, was {real >> 20} MB")
    assert 0.8 < told / real < 1.2


def test_no_work_begins_without_memory(cnn, monkeypatch):
    monkeypatch.setattr(preflight, "available", lambda: 1 << 20)
    with pytest.raises(
        UnsupportedError, match=r"memory: about .* GB would be needed, 0\.00 GB are available"
    ):
        nc.compress(cnn, recipe="int8", data=torch.randn(20, 3, 8, 8))


def test_unknown_recipe(cnn):
    with pytest.raises(ArgumentError, match="recipe must be one of"):
        nc.predict(cnn, recipe="int3")


def test_dry_run_writes_nothing(cnn, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("narrowcast.compress.api.load_model", lambda source, **options: cnn)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    cli, out = runner(monkeypatch, capsys), tmp_path / "x.plan"
    told = cli("compress", "model", "-o", out, "--recipe", "fp32", "--dry-run", "--json")
    assert told.code == 0 and told.json["bytes"][0] == told.json["bytes"][1] > 0
    assert "peak of memory" in cli("compress", "model", "-o", out, "--recipe", "fp32", "--dry-run").out
    assert not out.exists()
    one_line(cli("compress", "model", "-o", out, "--recipe", "int3", "--dry-run"), 2, "recipe must be one of")
