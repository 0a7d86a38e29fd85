"""silu(gate) * up -> silu_mul; gelu(gate) * up -> gelu_mul."""

from __future__ import annotations

from torch import fx

from ..ir import Graph
from .match import Layer, argument, aten, calls, commuted, only_user, ops, same_shape


def fuse_gate(graph: Graph) -> int:
    count = 0
    for node in graph.calls(aten.mul.Tensor):
        for act, up in commuted(node):
            if not isinstance(up, fx.Node) or not isinstance(act, fx.Node) or only_user(act) is not node:
                continue
            if not same_shape(act, up):
                continue
            if calls(act, aten.silu.default):
                call = (ops.silu_mul.default, (act.args[0], up))
            elif calls(act, aten.gelu.default):
                approximate = argument(act, 1, "approximate", "none")
                call = (ops.gelu_mul.default, (act.args[0], up, approximate))
            elif calls(act, ops.linear.default) and Layer(act)["activation"] in ("silu", "gelu"):
                # The activation already sits in the gate's epilogue: undo, so that gate and up can merge.
                layer = Layer(act)
                if layer["residual"] is not None:
                    continue
                target = ops.silu_mul if layer["activation"] == "silu" else ops.gelu_mul
                layer.set(activation="none")
                call = (target.default, (act, up))
            else:
                continue
            graph.replace(node, graph.add_call(*call, like=node))
            count += 1
            break
    graph.clean()
    return count
