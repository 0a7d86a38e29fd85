"""A compressed network written as ONNX in QDQ form computes what the plan computes."""

import pytest
import torch
from torch import nn

import narrowcast
from narrowcast.errors import UnsupportedError
from narrowcast.exporters import write_onnx
from narrowcast.graph import Graph
from narrowcast.importers import load_model

onnx = pytest.importorskip("onnx")


class Network(nn.Module):
    """Plain, depthwise and pointwise layers, a residual, both poolings and a dense layer."""

    def __init__(self, pooled: bool):
        super().__init__()

        def layer(i, o, k, **options):
            return [nn.Conv2d(i, o, k, padding=k // 2, bias=False, **options), nn.BatchNorm2d(o)]

        self.pooled = pooled
        self.first = nn.Sequential(*layer(3, 16, 3, stride=2), nn.ReLU6())
        self.block = nn.Sequential(*layer(16, 16, 3, groups=16), nn.Hardswish(), *layer(16, 16, 1))
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = self.first(x)
        x = x + self.block(x)
        if self.pooled:
            x = nn.functional.max_pool2d(x, 2)
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.mark.parametrize("recipe", ["int8", "fp32"])
@pytest.mark.parametrize("pooled", [False, True])
def test_network(tmp_path, recipe, pooled):
    pictures = torch.randn(20, 3, 32, 32)
    dynamic = ({0: torch.export.Dim("n", max=1 << 20)},)
    source = load_model(Network(pooled).eval(), (pictures[:2],), dynamic_shapes=dynamic, kind="image")
    plan = narrowcast.compress(source, recipe=recipe, data=pictures)
    write_onnx(tmp_path / "m.onnx", plan)
    proto = onnx.load(tmp_path / "m.onnx")
    kinds = [n.op_type for n in proto.graph.node]
    assert kinds.count("Conv") == 3 and ("QuantizeLinear" in kinds) == (recipe == "int8")
    again = load_model(tmp_path / "m.onnx")
    (ours,), (theirs,) = plan.graph.run(pictures[:7]), Graph.from_exported(again.exported).run(pictures[:7])
    # A value halfway between two steps may go either way, and the dense layer's inputs stay in float.
    assert float((ours - theirs).norm() / ours.norm()) < (0.02 if recipe == "int8" else 1e-5)


def test_a_call_without_a_form_is_named(tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.cumsum(x, 1)

    source = load_model(Odd(), (torch.randn(2, 3),))
    with pytest.raises(UnsupportedError, match="cumsum"):
        write_onnx(tmp_path / "m.onnx", Graph.from_exported(source.exported))
    assert not (tmp_path / "m.onnx").exists()
