import operator

import pytest
import torch

from narrowcast.errors import ArgumentError, UnsupportedError
from narrowcast.graph import Graph


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 8, 3)
        self.norm = torch.nn.BatchNorm2d(8)
        self.head = torch.nn.Linear(8, 4)
        self.dropout = torch.nn.Dropout(0.1)
        self.register_buffer("unused", torch.arange(10))

    def forward(self, x):
        y = torch.relu(self.norm(self.convolution(x))).mean((2, 3))
        y = self.dropout(self.head(y))
        return y.view(y.shape[0], 2, -1) + torch.tensor(1.0), y


@pytest.fixture
def module():
    return Small().eval()


@pytest.fixture
def graph(module):
    dynamic = ({0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO},)
    return Graph.from_exported(
        torch.export.export(module, (torch.randn(2, 3, 8, 8),), dynamic_shapes=dynamic)
    )


def test_runs_like_the_module_at_other_sizes(module, graph):
    x = torch.randn(5, 3, 12, 8)
    for ours, expected in zip(graph.run(x), module(x)):
        torch.testing.assert_close(ours, expected)


def test_names_and_cleanliness(graph):
    assert {"convolution.weight", "norm.running_mean", "head.bias"} <= set(graph.weights)
    assert "unused" not in graph.weights
    targets = {str(node.target) for node in graph.calls()}
    assert not any("dropout" in t or "lift" in t or "detach" in t for t in targets)
    assert next(graph.calls(torch.ops.aten.linear.default)).meta["source"] == "head"


def test_observe_sees_arguments(graph):
    seen = {}
    graph.run(
        torch.randn(2, 3, 8, 8),
        observe=lambda node, args, kwargs, result: seen.update({node.name: args}),
    )
    assert seen["linear"][0].shape == (2, 8)


def test_clone_is_independent(graph):
    copy = graph.clone()
    for node in copy.calls(torch.ops.aten.relu.default):
        copy.replace(node, node.args[0])
    copy.clean()
    assert len(list(graph.calls(torch.ops.aten.relu.default))) == 1
    assert not list(copy.calls(torch.ops.aten.relu.default))
    assert all(node.meta.get("source") is not None for node in copy.calls())


def test_add_weight_and_call(graph):
    node = next(graph.calls(torch.ops.aten.relu.default))
    weight = graph.add_weight("head.weight", torch.ones(1), before=node)
    assert weight.target == "head.weight_2"
    graph.replace(node, graph.add_call(operator.mul, (node.args[0], weight), like=node))
    graph.fx.lint()
    graph.run(torch.randn(1, 3, 8, 8))


def test_wrong_number_of_inputs(graph):
    with pytest.raises(ArgumentError, match="expected 1 inputs"):
        graph.run()


def exported(function, *inputs):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, *inputs):
            return function(self, *inputs)

    module = Module().eval()
    return module, torch.export.export(module, inputs)


def test_calls_in_place_become_functional():
    def forward(m, x):
        y = m.linear(x)
        part = y[:, :4]
        part.mul_(2)  # seen through y
        torch.relu_(y)
        y[:, 0] = 1
        return y, part + 1

    module, program = exported(forward, torch.randn(3, 8))
    graph = Graph.from_exported(program)
    assert not any(node.target._schema.is_mutable for node in graph.calls())
    assert list(graph.calls(torch.ops.aten.linear.default))
    x = torch.randn(3, 8)
    for ours, expected in zip(graph.run(x), module(x), strict=True):
        torch.testing.assert_close(ours, expected)


def test_regions_are_inlined():
    def forward(m, x):
        with torch.autocast("cpu", enabled=False), torch.no_grad():
            y = m.linear(x.float())
        with torch.no_grad():
            return torch.relu(y) + x

    module, program = exported(forward, torch.randn(3, 8))
    graph = Graph.from_exported(program)
    x = torch.randn(3, 8)
    torch.testing.assert_close(graph.run(x)[0], module(x))
    assert all(isinstance(node.target, torch._ops.OpOverload) for node in graph.calls())


def test_what_cannot_be_a_graph_says_why():
    def counts(m, x):
        m.count.add_(1)
        return x + m.count

    def overwrites(m, x):
        return x.mul_(2)

    def mixed(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            return m.linear(x)

    def branches(m, x):
        return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))

    for function, message in [
        (counts, "writes to its buffer count"),
        (overwrites, "writes to its input"),
        (mixed, "autocast"),
        (branches, "control flow"),
    ]:
        with pytest.raises(UnsupportedError, match=message):
            Graph.from_exported(exported(function, torch.randn(3, 8))[1])
