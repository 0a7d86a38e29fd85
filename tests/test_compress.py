"""Compression on small random models: bounds that quantisation itself sets, and every refusal."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import narrowcast as nc
from narrowcast.compress import weights
from narrowcast.compress.metrics import bootstrap, image_metrics
from narrowcast.errors import ArgumentError, UnsupportedError
from narrowcast.graph import Plan
from narrowcast.importers.model import Model

AUTO = torch.export.Dim.AUTO
ops = torch.ops.narrowcast


class Cnn(nn.Module):
    """Uneven padding, a residual, a depthwise layer and a global pool, like a mobile network."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.expand, self.depthwise = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 3, stride=2, groups=32)
        self.project, self.again = nn.Conv2d(32, 16, 1), nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = F.relu6(self.expand(F.relu(self.stem(x))))
        x = self.project(F.relu6(self.depthwise(F.pad(x, (0, 1, 0, 1)))))
        x = F.relu(self.again(x) + x)
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def cnn():
    torch.manual_seed(3)
    module = Cnn().eval()
    exported = torch.export.export(module, (torch.randn(2, 3, 16, 16),), dynamic_shapes=({0: AUTO},))
    return Model(exported, "image", {"image": {"size": 16}}), module


def test_cnn_int8(cnn, tmp_path):
    model, module = cnn
    plan = nc.compress(model, recipe="int8", data=torch.randn(60, 3, 16, 16))
    assert len(list(plan.graph.calls(ops.conv2d_int8.default))) >= 4
    assert not list(plan.graph.calls(torch.ops.aten.pad.default))
    plan.save(tmp_path / "cnn.plan")
    exe = nc.load(tmp_path / "cnn.plan", device="cpu")
    x = torch.randn(8, 3, 16, 16)
    with torch.no_grad():
        expected = module(x)
    assert ((exe(x) - expected).norm() / expected.norm()) < 0.05
    assert nc.verify(tmp_path / "cnn.plan").ok


class Block(nn.Module):
    def __init__(self, width=128):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate, self.up = nn.Linear(width, 256, bias=False), nn.Linear(width, 256, bias=False)
        self.down = nn.Linear(256, width)

    def forward(self, x):
        y = self.norm(x)
        return self.down(F.silu(self.gate(y)) * self.up(y)) + x


@pytest.fixture(scope="module")
def block():
    torch.manual_seed(4)
    module = Block().eval()
    with torch.no_grad():  # outlier channels, which smoothing must find
        module.norm.weight[::17] *= 30
    exported = torch.export.export(module, (torch.randn(6, 128),), dynamic_shapes=({0: AUTO},))
    return Model(exported, "generic"), module


def test_transformer_recipes(block):
    model, module = block
    data = [(torch.randn(64, 128),) for _ in range(4)]
    x = torch.randn(40, 128)
    with torch.no_grad():
        expected = module(x)
    plan = nc.compress(model, recipe="int8", data=data)
    exe = nc.Executor(plan, device="cpu")
    assert ((exe(x) - expected).norm() / expected.norm()) < 0.02
    assert exe.explain(x).shares == {"int8": 1.0}
    assert all(layer["sqnr_db"] > 25 for layer in plan.record["layers"])


@pytest.mark.parametrize("bits, symmetric, bound", [(8, True, 0.01), (4, False, 0.11), (4, True, 0.13)])
def test_grouped_weights(bits, symmetric, bound):
    weight = torch.randn(48, 128)
    quantised = weights.grouped(weight, bits, 32, torch.rand(128), symmetric)
    assert ((quantised.dequantize() - weight).norm() / weight.norm()) < bound


def test_int8_rows_beat_plain_rounding_where_it_matters():
    weight, importance = torch.randn(32, 64), torch.rand(64) ** 4
    error = lambda w: ((w - weight).square() @ importance).sum()  # noqa: E731
    plain = weight.abs().amax(1, keepdim=True) / 127
    assert error(weights.int8_rows(weight, importance).dequantize()) <= error(
        (weight / plain).round() * plain
    )


def test_zero_rows_and_groups():
    weight = torch.zeros(4, 64)
    assert torch.equal(weights.int8_rows(weight).dequantize(), weight)
    for bits in (4, 8):
        assert torch.equal(weights.grouped(weight, bits, 32).dequantize(), weight)


def test_metrics():
    logits = torch.randn(50, 10)
    same = image_metrics(logits, logits)
    assert same["agreement"].value == 1 and same["kl"].value == 0
    low, high = bootstrap(torch.rand(400), torch.mean)
    assert low < 0.5 + 0.1 and high > 0.5 - 0.1 and high - low < 0.15


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"recipe": "int7"}, ArgumentError, "recipe must be one of"),
        ({"recipe": "native"}, UnsupportedError, "its own quantised weights"),
        ({"recipe": "int8"}, ArgumentError, "data must be given"),
        ({"recipe": "int8", "data": torch.randn(1, 3, 16, 16)}, ArgumentError, "at least 2 pictures"),
        ({"recipe": "int4"}, ArgumentError, "data must be given"),
        (
            {"recipe": "int8-weight", "data": torch.randn(4, 3, 16, 16)},
            UnsupportedError,
            "recipe int8-weight",
        ),
        ({"kv_cache": "int3"}, ArgumentError, "kv_cache must be"),
        ({"budget": 2.0}, ArgumentError, "budget must lie"),
        ({"recipe": "auto"}, ArgumentError, "needs a budget"),
        ({"device": "tpu"}, ArgumentError, "device must be"),
        (
            {"data": torch.randn(4, 3, 16, 16), "keep_float": ["no_such"]},
            ArgumentError,
            "there is no 'no_such'",
        ),
    ],
)
def test_refusals(cnn, arguments, error, message):
    with pytest.raises(error, match=message):
        nc.compress(cnn[0], **arguments)


def test_a_damaged_weight_is_named(cnn):
    module = Cnn().eval()
    with torch.no_grad():
        module.project.weight[3, 2] = math.nan
    exported = torch.export.export(module, (torch.randn(2, 3, 16, 16),), dynamic_shapes=({0: AUTO},))
    with pytest.raises(ArgumentError, match=r"weight project.weight\S* holds NaN"):
        nc.compress(Model(exported, "image"), recipe="int8", data=torch.randn(20, 3, 16, 16))


def test_reports(cnn, tmp_path):
    from narrowcast.graph.report import layers_of, nodes_of, write_png

    plan = nc.compress(cnn[0], recipe="int8", data=torch.randn(30, 3, 16, 16))
    assert isinstance(plan, Plan) and {layer["precision"] for layer in layers_of(plan)} >= {"int8"}
    assert any(node["op"] == "narrowcast.conv2d_int8.default" for node in nodes_of(plan))
    write_png(plan, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 1000
