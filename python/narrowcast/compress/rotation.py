"""A decoder's hidden states turned by an orthogonal matrix: the same function, and no channel stands out any more.

With an orthogonal Q every hidden state x becomes x Q. RMSNorm without a weight commutes with that, so Q disappears
into the weights: what reads a norm takes W Q, what writes to the residual stream takes Q^T W. The rows of a value
head and the columns that read it are turned the same way, head by head. Nothing is added at run time, except that
a table which is the output layer as well stays as it is, with a float layer for Q behind it and one for Q^T before
the last norm.

Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024 (their R1 and R2).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from narrowcast.errors import UnsupportedError
from narrowcast.graph import Graph, Plan
from narrowcast.graph.passes.match import Layer, argument, calls

aten = torch.ops.aten
ops = torch.ops.narrowcast

#: The float layers that turn a shared table's rows and the last hidden state; they stay in float.
INTO, BACK = "rotation.into", "rotation.back"

#: Calls that keep the last dimension as it is, or only take it apart into heads.
_VIEWS = (
    aten.reshape.default, aten.view.default, aten.transpose.int, aten.flatten.using_ints, aten.contiguous.default,
    aten.clone.default, aten.permute.default,
)  # fmt: skip
_ROWS = (aten.index_select.default, aten.flatten.using_ints, aten.reshape.default, aten.view.default)


# --- orthogonal matrices --------------------------------------------------------------------------


def hadamard(size: int) -> Tensor | None:
    """A matrix of +1 and -1 [size, size] with orthogonal rows, float64; None where the constructions give none.

    Sylvester's doubling of 1 and of Paley's matrices, of the sizes p + 1 for primes p = 3 mod 4 and 2 (p + 1) for
    primes p = 1 mod 4.
    """
    half, doublings = size, 0
    while True:
        core = _paley(half)
        if core is not None:
            break
        if half % 2:
            return None
        half, doublings = half // 2, doublings + 1
    for _ in range(doublings):
        core = torch.cat((torch.cat((core, core), 1), torch.cat((core, -core), 1)))
    return core


def _paley(size: int) -> Tensor | None:
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if size % 4 == 0 and _prime(size - 1):
        skew = _bordered(size - 1)
        skew[:, 0], skew[0, 0] = -skew[:, 0], 0  # (p - 1) / 2 is odd: the border is antisymmetric as well
        return skew + torch.eye(size, dtype=torch.float64)
    if size % 4 == 0 and _prime(size // 2 - 1) and (size // 2 - 1) % 4 == 1:
        one = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        zero = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(_bordered(size // 2 - 1), one) + torch.kron(
            torch.eye(size // 2, dtype=torch.float64), zero
        )
    return None


def _bordered(prime: int) -> Tensor:
    """Legendre symbols of differences [p, p] with a row and a column of ones around them, 0 in the corner."""
    squares = {i * i % prime for i in range(1, prime)}
    symbol = torch.tensor(
        [0.0] + [1.0 if i in squares else -1.0 for i in range(1, prime)], dtype=torch.float64
    )
    index = torch.arange(prime)
    result = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    result[0, 0] = 0
    result[1:, 1:] = symbol[(index[:, None] - index) % prime]
    return result


def _prime(n: int) -> bool:
    return n > 2 and all(n % d for d in range(2, int(n**0.5) + 1))


def orthogonal(size: int, seed: int) -> Tensor:
    """A Hadamard matrix with rows of random sign, over sqrt(size); [size, size], float64, orthogonal.

    Where there is no such matrix of the size, blocks of the largest power of two that divides it.
    """
    block = hadamard(size)
    if block is None:
        block = hadamard(size & -size)
        assert block is not None  # a power of two
        block = torch.block_diag(*[block] * (size // block.shape[0])) * (size / block.shape[0]) ** 0.5
    signs = torch.randint(2, (size, 1), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    return signs * block / size**0.5


# --- in a recipe ----------------------------------------------------------------------------------


def turned(kind: str, graph: Graph, seed: int) -> tuple[Graph, list[str]]:
    """A turned copy of a decoder's graph and the names of its layers that stay in float. Raises UnsupportedError."""
    if kind != "decoder":
        raise UnsupportedError(
            f"rotate must be False for a model of kind {kind}: only decoders can be turned"
        )
    copy = graph.clone()
    return copy, rotate(copy, seed)


def better(plain: Plan, other: Plan) -> Plan:
    """The plan with the smaller loss on held-out data, ``other`` being the turned one; its record tells of both."""
    losses = [plan.certificate["loss"] for plan in (plain, other)]
    used = None not in losses and losses[1] < losses[0]
    chosen = other if used else plain
    for layer in chosen.record["layers"]:
        if layer["name"] in (INTO, BACK):
            layer["why"] = "it turns the hidden states"
    chosen.record["rotation"] = {"used": used, "loss_without": losses[0], "loss_with": losses[1]}
    return chosen


# --- a graph --------------------------------------------------------------------------------------


def rotate(graph: Graph, seed: int = 0) -> list[str]:
    """Turns the hidden states of a decoder's graph, and its values head by head; in place.

    Returns the names of the layers that it added and that should stay in float. Raises UnsupportedError, and
    changes nothing, for a graph whose residual stream is not embedding, RMSNorm and dense layers alone.
    """
    stream = _Stream(graph)
    heads = [_value_head(graph, node) for node in graph.calls(ops.attention_decode.default)]
    width = stream.width
    turn = orthogonal(width, seed)
    added = []
    for norm in stream.norms:
        if norm is not stream.last:
            _fold_norm(graph, norm)
            for reader in norm.users:
                _change(graph, Layer(reader)["weight"], lambda w: w @ turn)
    for layer in map(Layer, stream.writers):
        _change(graph, layer["weight"], lambda w: turn.t() @ w)
        if layer["bias"] is not None:
            _change(graph, layer["bias"], lambda b: b @ turn)
    if stream.last is None:
        _change(graph, stream.table.args[0], lambda w: w @ turn)
    else:
        _insert(graph, stream.table, INTO, turn.t(), list(stream.table.users))
        last = stream.last
        _insert(graph, last.args[0], BACK, turn, [last])
        added = [INTO, BACK]
    for value_layer, first, rows, output_layer, depth in heads:
        small = orthogonal(depth, seed + 1)
        blocks = torch.block_diag(*[small] * (rows // depth))
        for part in ("weight", "bias"):
            if value_layer[part] is not None:
                _change_rows(graph, value_layer[part], first, rows, blocks)
        columns = graph.weight(output_layer["weight"]).shape[1]
        wide = torch.block_diag(*[small] * (columns // depth))
        _change(graph, output_layer["weight"], lambda w, wide=wide: w @ wide)
    graph.fx.lint()
    return added


class _Stream:
    """The residual stream of a decoder: where it begins, what writes to it, the norms that read it."""

    def __init__(self, graph: Graph):
        self.writers: list[fx.Node] = []
        self.norms: list[fx.Node] = []
        self.last: fx.Node | None = None  #: the norm of an output layer that shares the table
        tables = list(graph.calls(aten.embedding.default))
        if len(tables) != 1 or graph.weight(tables[0].args[0]) is None:
            raise UnsupportedError("rotation needs a decoder with one embedding table")
        self.table = tables[0]
        self.width = graph.weight(self.table.args[0]).shape[1]
        waiting, seen = [self.table], {self.table}
        while waiting:
            node = waiting.pop()
            for user in node.users:
                following = self._use(graph, node, user)
                if following is not None and following not in seen:
                    seen.add(following)
                    waiting.append(following)
        if not self.norms or not self.writers:
            raise UnsupportedError("rotation needs a decoder with RMSNorm and residual sums")
        written = {Layer(n)["weight"].target for n in self.writers}
        read = {Layer(r)["weight"].target for n in self.norms for r in n.users}
        if written & read:
            raise UnsupportedError(
                f"rotation cannot serve a weight that reads and writes: {min(written & read)}"
            )

    def _use(self, graph: Graph, node: fx.Node, user: fx.Node) -> fx.Node | None:
        """Files a use of the stream; returns the node where the stream goes on."""
        if calls(user, ops.linear.default) and self._writes(Layer(user), node):
            if user not in self.writers:
                self.writers.append(user)
            return user
        if calls(user, ops.rms_norm.default) and user.args[0] is node:
            self._norm(graph, user)
            return None
        if calls(user, *_ROWS) and user.args[0] is node and self._keeps_width(user):
            return user
        if calls(user, aten.sym_size.int):
            return None
        raise UnsupportedError(f"rotation cannot follow the residual stream through {user.name}")

    def _writes(self, layer: Layer, stream: fx.Node) -> bool:
        """Whether a layer adds its product to the stream, and does nothing else with it."""
        plain = layer["activation"] == "none" and layer["post_activation"] == "none"
        return (
            layer["residual"] is stream
            and layer["x"] is not stream
            and plain
            and len(layer["weight"].users) == 1
        )

    def _keeps_width(self, node: fx.Node) -> bool:
        val = node.meta.get("val")
        return val is not None and str(val.shape[-1]) == str(self.width)

    def _norm(self, graph: Graph, norm: fx.Node) -> None:
        if norm in self.norms:
            return
        readers = list(norm.users)
        if not all(calls(r, ops.linear.default) and Layer(r)["x"] is norm for r in readers):
            raise UnsupportedError(f"rotation cannot follow what reads the norm {norm.name}")
        shared = [Layer(r)["weight"] for r in readers if len(Layer(r)["weight"].users) > 1]
        if shared:
            if self.last is not None or len(readers) != 1 or shared[0].target != self.table.args[0].target:
                raise UnsupportedError(f"rotation cannot serve the shared weight {shared[0].target}")
            self.last = norm
        self.norms.append(norm)


def _value_head(graph: Graph, attention: fx.Node) -> tuple[Layer, int, int, Layer, int]:
    """(layer of the values, its first row for them, how many, layer that reads the attention, size of a head)."""
    cache = attention.args[2]
    appends = [n for n in graph.calls(ops.kv_append.default) if n.args[1] is cache]
    users = {n for n in cache.users if not calls(n, aten.sym_size.int)} - {attention, *appends}
    if len(appends) != 1 or users:
        raise UnsupportedError("rotation needs value caches that one layer writes and reads")
    source, first, rows = appends[0].args[3], 0, None
    depth = int(source.meta["val"].shape[-1])
    while not calls(source, ops.linear.default):
        if calls(source, aten.slice.Tensor) and argument(source, 1, "dim", 0) == -1 and rows is None:
            first, rows = source.args[2], source.args[3] - source.args[2]
        elif not calls(source, *_VIEWS):
            raise UnsupportedError(f"rotation cannot follow the values through {source.name}")
        source = source.args[0]
    layer = Layer(source)
    rows = graph.weight(layer["weight"]).shape[0] if rows is None else rows
    output = attention
    while calls(output, ops.attention_decode.default, *_VIEWS) and len(output.users) == 1:
        output = next(iter(output.users))
    if not calls(output, ops.linear.default) or layer["activation"] != "none" or rows % depth:
        raise UnsupportedError(
            "rotation needs values that go from a dense layer through attention to a dense layer"
        )
    return layer, first, rows, Layer(output), depth


def _fold_norm(graph: Graph, norm: fx.Node) -> None:
    """The weight of a norm moves into the layers that read it."""
    gamma = graph.weight(norm.args[1])
    for reader in norm.users:
        _change(graph, Layer(reader)["weight"], lambda w: w * gamma.double())
    ones = graph.add_weight(f"{norm.args[1].target}.folded", torch.ones_like(gamma), before=norm)
    norm.args = (norm.args[0], ones, *norm.args[2:])


def _change(graph: Graph, attribute: fx.Node, function) -> None:
    old = graph.weights[attribute.target]
    graph.weights[attribute.target] = function(old.double()).to(old.dtype)
    graph.native.pop(attribute.target, None)


def _change_rows(graph: Graph, attribute: fx.Node, first: int, count: int, turn: Tensor) -> None:
    def change(w: Tensor) -> Tensor:
        w = w.clone()
        w[first : first + count] = turn.t() @ w[first : first + count]
        return w

    _change(graph, attribute, change)


def _insert(graph: Graph, node: fx.Node, name: str, weight: Tensor, users: Iterable[fx.Node]) -> None:
    """A dense layer between a node and the given users of it."""
    users = list(users)
    before = node.next
    dtype = node.meta["val"].dtype if "val" in node.meta else torch.float32
    attribute = graph.add_weight(f"{name}.weight", weight.to(dtype).contiguous(), before=before)
    layer = graph.add_call(ops.linear.default, (node, attribute), like=before)
    layer.meta["val"] = node.meta.get("val")
    for user in users:
        user.replace_input_with(node, layer)
