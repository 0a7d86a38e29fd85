"""The graph that importers make, passes rewrite, compression quantises, plans store and executors run.

It is a ``torch.fx.Graph`` in the torch.export ATen dialect plus ``narrowcast`` ops, and its weights by name:

- ``placeholder`` nodes are the user's inputs, in order;
- ``get_attr`` nodes name a weight: ``graph.weights[node.target]``;
- ``call_function`` nodes call an ``OpOverload``, or a function of ``operator`` on sizes and tuples;
- one ``output`` node returns a tuple.

Sizes stay symbolic: ``aten.sym_size.int`` nodes and ``operator`` arithmetic, evaluated for concrete shapes.
``kv_append`` mutates its caches and keeps its place in program order.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from narrowcast.errors import ArgumentError, UnsupportedError
from narrowcast.formats import GroupedWeight, Int8Weight

aten = torch.ops.aten

#: Calls that return their first argument unchanged in an inference graph.
_IDENTITIES = {
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
    aten.lift.default,
}

#: Calls that only check, and whose result nobody uses.
_CHECKS = {
    aten._assert_async.default,
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten._assert_tensor_metadata.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
    torch._check,
}

#: Calls with an effect beside their result: never removed, never reordered.
MUTATING = {torch.ops.narrowcast.kv_append.default}


class Graph:
    """A computation and its weights. See the module's text for the form of the nodes."""

    def __init__(
        self,
        nodes: fx.Graph,
        weights: dict[str, Tensor],
        native: dict[str, GroupedWeight | Int8Weight] | None = None,
    ):
        #: The nodes.
        self.fx = nodes
        #: Every tensor that a ``get_attr`` node names.
        self.weights = weights
        #: Weight name -> the source file's own quantised form, rows in the order of the float weight.
        self.native = native or {}

    # --- making one -------------------------------------------------------------------------------

    @classmethod
    def from_exported(
        cls,
        exported: torch.export.ExportedProgram,
        native: dict[str, GroupedWeight | Int8Weight] | None = None,
    ) -> Graph:
        """The graph of an ``ExportedProgram`` (as ``torch.export.export`` made it, no decompositions).

        Parameters, buffers and constants become weights under their own names; checks, guards and
        calls that do nothing at inference are dropped.
        """
        exported = _without_mutation(exported)
        kinds = torch.export.graph_signature.InputKind
        names, user_inputs = {}, set()
        for spec in exported.graph_signature.input_specs:
            if spec.kind is kinds.USER_INPUT:
                user_inputs.add(getattr(spec.arg, "name", None))
            elif spec.kind in (kinds.PARAMETER, kinds.BUFFER, kinds.CONSTANT_TENSOR):
                names[spec.arg.name] = spec.target
        state = {**exported.constants, **exported.state_dict}

        nodes, weights = fx.Graph(), {}
        new: dict[fx.Node, Any] = {}
        for node in exported.graph.nodes:
            if node.op != "placeholder":
                break
            if node.name in names:
                name = names[node.name]
                if node.users:
                    weights[name] = state[name].detach()
                    new[node] = nodes.get_attr(name)
                    new[node].meta["val"] = node.meta.get("val")
            elif node.name in user_inputs and isinstance(node.meta.get("val"), Tensor):
                new[node] = nodes.placeholder(node.target)
                new[node].meta["val"] = node.meta["val"]
            elif node.users:
                raise ArgumentError(f"input {node.name} must be a tensor")
        results = _copy_calls(nodes, exported.graph_module, new)
        nodes.output(_user_outputs(exported, results))
        graph = cls(nodes, weights, native)
        graph.clean()
        return graph

    def clone(self) -> Graph:
        """An independent graph over the same weight tensors."""
        nodes = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        output = nodes.graph_copy(self.fx, copies)
        nodes.output(output)
        for old, copy in copies.items():
            copy.meta = dict(old.meta)
        return Graph(nodes, dict(self.weights), dict(self.native))

    # --- looking at it ----------------------------------------------------------------------------

    @property
    def inputs(self) -> list[fx.Node]:
        return [node for node in self.fx.nodes if node.op == "placeholder"]

    @property
    def outputs(self) -> tuple:
        return self.fx.output_node().args[0]

    def calls(self, *targets) -> Iterator[fx.Node]:
        """The nodes that call one of ``targets`` (all calls without targets), in program order."""
        for node in list(self.fx.nodes):
            if node.op == "call_function" and (not targets or node.target in targets):
                yield node

    def weight(self, node: Any) -> Tensor | None:
        """The tensor of a ``get_attr`` node, or None for anything else."""
        if isinstance(node, fx.Node) and node.op == "get_attr":
            return self.weights[node.target]
        return None

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(w.nbytes for w in self.weights.values())

    # --- changing it ------------------------------------------------------------------------------

    def add_weight(self, name: str, tensor: Tensor, before: fx.Node) -> fx.Node:
        """A new ``get_attr`` node before ``before`` for a weight of that name (made unique)."""
        unique, count = name, 1
        while unique in self.weights:
            count += 1
            unique = f"{name}_{count}"
        self.weights[unique] = tensor.detach()
        with self.fx.inserting_before(before):
            node = self.fx.get_attr(unique)
        node.meta["val"] = torch.empty_like(tensor, device="meta")
        return node

    def add_call(self, target: Callable, args: tuple, kwargs: dict | None = None, *, like: fx.Node):
        """A new call before ``like`` that inherits where it came from."""
        with self.fx.inserting_before(like):
            node = self.fx.call_function(target, args, kwargs or {})
        node.meta["source"] = like.meta.get("source", "")
        return node

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Every user of ``old`` takes ``new``; ``old`` goes when nothing needs it."""
        if "val" in old.meta:
            new.meta.setdefault("val", old.meta["val"])
        old.replace_all_uses_with(new)
        if not old.users and old.target not in MUTATING:
            self.fx.erase_node(old)

    def clean(self) -> None:
        """Removes calls and weights that nothing uses; keeps calls with effects."""
        for node in reversed(list(self.fx.nodes)):
            removable = node.op in ("call_function", "get_attr") and node.target not in MUTATING
            if removable and not node.users:
                self.fx.erase_node(node)
        used = {node.target for node in self.fx.nodes if node.op == "get_attr"}
        self.weights = {name: w for name, w in self.weights.items() if name in used}
        self.native = {name: w for name, w in self.native.items() if name in used}

    # --- running it, slowly -----------------------------------------------------------------------

    @torch.no_grad()
    def run(
        self, *inputs: Tensor, observe: Callable[[fx.Node, tuple, dict, Any], None] | None = None
    ) -> tuple:
        """Evaluates node by node through torch's dispatcher: what passes and plans are held to.

        ``observe(node, args, kwargs, result)`` is called after every call node, for calibration.
        """
        placeholders = self.inputs
        if len(inputs) != len(placeholders):
            names = ", ".join(node.target for node in placeholders)
            raise ArgumentError(f"expected {len(placeholders)} inputs ({names}), got {len(inputs)}")
        values: dict[fx.Node, Any] = dict(zip(placeholders, inputs))
        last_use = last_uses(self.fx)
        for node in self.fx.nodes:
            if node.op == "get_attr":
                values[node] = self.weights[node.target]
            elif node.op == "call_function":
                args = fx.map_arg(node.args, values.__getitem__)
                kwargs = fx.map_arg(node.kwargs, values.__getitem__)
                values[node] = node.target(*args, **kwargs)
                if observe is not None:
                    observe(node, args, kwargs, values[node])
            elif node.op == "output":
                return tuple(fx.map_arg(node.args[0], values.__getitem__))
            for dead in last_use.get(node, ()):
                values.pop(dead, None)
        raise AssertionError("a graph ends with its output node")

    def __str__(self) -> str:
        return str(self.fx)


def is_size_call(node: fx.Node) -> bool:
    """Whether a node computes an integer (a size) rather than a tensor."""
    return node.target is aten.sym_size.int or (
        getattr(node.target, "__module__", "") == operator.__name__ and node.target is not operator.getitem
    )


def last_uses(nodes: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Node -> the nodes whose values nothing needs after it."""
    last: dict[fx.Node, fx.Node] = {}
    for node in nodes.nodes:
        for used in node.all_input_nodes:
            last[used] = node
    result: dict[fx.Node, list[fx.Node]] = {}
    for used, node in last.items():
        result.setdefault(node, []).append(used)
    return result


# --- out of an exported program -------------------------------------------------------------------


def _without_mutation(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same program with in-place ATen calls made functional; ``kv_append`` stays as it is."""
    calls = [n for g in _graphs(exported.graph_module) for n in g.nodes if n.op == "call_function"]
    in_place = [n for n in calls if _is_mutable(n.target) and n.target not in MUTATING | _IDENTITIES]
    if not in_place:
        return exported
    if any(n.target in MUTATING for n in calls):
        node = in_place[0]
        raise UnsupportedError(
            f"{node.target} writes in place in a graph with a cache ({_source(node) or node.name}): "
            "use the form of the call that returns a new tensor"
        )
    return exported.run_decompositions({})  # decomposes nothing, but makes every call functional


def _graphs(module: fx.GraphModule) -> Iterator[fx.Graph]:
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            yield part.graph


def _is_mutable(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


#: Regions that export wraps into a call of a submodule: where the submodule stands among the arguments.
_REGIONS = {
    torch.ops.higher_order.wrap_with_set_grad_enabled: 1,
    torch.ops.higher_order.wrap_with_autocast: 4,
}


def _copy_calls(nodes: fx.Graph, module: fx.GraphModule, new: dict[fx.Node, Any], outer: str = "") -> Any:
    """Copies the calls of ``module`` into ``nodes``; what its output node returns, in new nodes."""
    for node in module.graph.nodes:
        if node.op == "placeholder" or (node.op == "call_function" and node.target in _CHECKS):
            continue
        if node.op == "get_attr":  # the submodule of a region
            new[node] = getattr(module, node.target)
        elif node.op == "output":
            return fx.map_arg(node.args[0], new.__getitem__)
        elif node.op != "call_function":
            raise UnsupportedError(f"an exported graph may only hold calls, got {node.op} {node.target}")
        elif node.target in _IDENTITIES:
            new[node] = new[node.args[0]]
        elif node.target in _REGIONS:
            new[node] = _inline(nodes, node, new)
        elif node.target is operator.getitem and isinstance(new[node.args[0]], tuple):
            new[node] = new[node.args[0]][node.args[1]]
        elif not isinstance(node.target, torch._ops.OpOverload) and isinstance(
            node.target, torch._ops.OperatorBase
        ):
            raise UnsupportedError(
                f"{node.target} at {_source(node) or node.name}: a graph holds plain calls, no control flow; "
                "export the model without it"
            )
        else:
            new[node] = nodes.node_copy(node, new.__getitem__)
            new[node].meta = {"val": node.meta.get("val"), "source": _source(node) or outer}
    raise AssertionError("a graph ends with its output node")


def _inline(nodes: fx.Graph, node: fx.Node, new: dict[fx.Node, Any]) -> tuple:
    """The calls of a no_grad or autocast region, in place of the call of the region."""
    if node.target is torch.ops.higher_order.wrap_with_autocast and node.args[2]:
        raise UnsupportedError(
            f"autocast at {_source(node) or node.name}: export the model in the precision it shall have"
        )
    at = _REGIONS[node.target]
    body = new[node.args[at]]
    inner = [n for n in body.graph.nodes if n.op == "placeholder"]
    given = [new[x] if isinstance(x, fx.Node) else x for x in node.args[at + 1 :]]
    return tuple(_copy_calls(nodes, body, new | dict(zip(inner, given)), _source(node)))


def _user_outputs(exported: torch.export.ExportedProgram, results: Any) -> tuple:
    """What the model returns, without the new values of what it wrote to."""
    kinds = torch.export.graph_signature.OutputKind
    outputs = []
    for spec, result in zip(exported.graph_signature.output_specs, results):
        if spec.kind is kinds.BUFFER_MUTATION:
            raise UnsupportedError(
                f"the model writes to its buffer {spec.target}: make it an input and an output"
            )
        if spec.kind is kinds.USER_INPUT_MUTATION:
            raise UnsupportedError(
                f"the model writes to its input {spec.target}: return the new value instead"
            )
        outputs.append(result)
    return tuple(outputs)


def _source(node: fx.Node) -> str:
    """The module path that made a node, such as ``encoder.layer.0.attention.self``."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(path) for path, _ in stack.values() if not str(path).startswith("_")]
    return paths[-1].removeprefix("L['self'].") if paths else ""
