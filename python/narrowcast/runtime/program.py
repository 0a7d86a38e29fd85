"""A graph made concrete: one program per set of input shapes.

Sizes become integers by running the graph on fake tensors. A node is then one of

- a view: its result shares the storage of an argument; no step, only an address,
- folded: it depends on no input and is small; computed once, here,
- native: a ``narrowcast`` op whose room has a step; called by the C++ loop on raw pointers,
- a callback: any other op, bound once to its tensors in the arena.

Every result has its place in one arena before the first run; nothing is allocated while running,
except inside ATen ops that have no ``out=`` form.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from .. import _runtime
from ..errors import ArgumentError, UnsupportedError
from . import memory

#: Inputs up to this size are copied into the arena; larger ones are read in place, at the price of
#: building the steps that read them again when their address changes.
COPY_BYTES = 1 << 20
#: Results that depend on no input are computed when the program is built, up to this size.
FOLD_BYTES = 4 << 20

#: Ops that only move or convert what they are given: one copy into the arena does it.
_COPIES = ("aten::reshape", "aten::contiguous", "aten::to.dtype", "aten::_to_copy")

_DTYPE_CODE = {getattr(torch, name): code for code, name in enumerate(_runtime.DTYPES)}


@dataclass(eq=False)
class Buffer:
    """Memory behind one or more values. kind: "input", "bound", "constant", "folded" or "arena"."""

    kind: str
    bytes: int
    first: int = 0
    last: int = 0
    position: int = -1  # of an input
    offset: int = 0  # in the arena
    storage: torch.UntypedStorage | None = None
    tensor: Tensor | None = None  # that owns the storage of a bound input, constant or folded value


@dataclass(eq=False)
class StepRecord:
    """One step of the loop, in order."""

    node: fx.Node
    op: str
    backend: str  # "native" or "callback"
    reads: list[FakeTensor]
    writes: list[FakeTensor]
    buffers: set[int] = field(default_factory=set)
    why: str = ""  # of a callback


class Shared:
    """What all programs of an executor share: weights, their packed forms, fake weights."""

    def __init__(self, module: fx.GraphModule, device: torch.device):
        self.module, self.device = module, device
        self.packed = _runtime.PackCache()
        self.mode = FakeTensorMode(allow_non_fake_inputs=False)
        self.weights: dict[str, Tensor] = {}
        self.fakes: dict[str, FakeTensor] = {}
        for node in module.graph.nodes:
            if node.op == "get_attr" and node.target not in self.weights:
                weight = operator.attrgetter(node.target)(module).detach().to(device)
                self.weights[node.target] = weight
                self.fakes[node.target] = self.mode.from_tensor(weight)
        # A pack cache is keyed by address: only the first layout seen there may use it.
        self.layouts: dict[int, tuple] = {}

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, shared storage counted once."""
        return sum({w.data_ptr(): w.nbytes for w in self.weights.values()}.values())

    def may_pack(self, view: tuple) -> bool:
        return self.layouts.setdefault(view[0], view) == view


def _tensors(value: Any) -> list[FakeTensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def _storage_key(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def short_name(target: Any) -> str:
    """ "linear_int8" of torch.ops.narrowcast.linear_int8.default, "aten.mean.dim" of that."""
    if isinstance(target, torch._ops.OpOverload):
        name = target.name().removeprefix("narrowcast::").replace("::", ".")
        return name if target._overloadname == "default" else str(target)
    return getattr(target, "__name__", str(target))


def _is_native(target: Any, device: torch.device) -> bool:
    return (
        device.type == "cpu"
        and isinstance(target, torch._ops.OpOverload)
        and target.namespace == "narrowcast"
        and target._overloadname == "default"
        and _runtime.has_native(target._opname)
    )


@functools.cache
def out_overload(target: torch._ops.OpOverload) -> tuple[torch._ops.OpOverload, list[str]] | None:
    """The overload of an ATen op that writes into given tensors, and these arguments' names."""
    schema = target._schema
    wanted = [(a.name, str(a.type)) for a in schema.arguments]
    for name in target.overloadpacket.overloads():
        candidate = getattr(target.overloadpacket, name)
        arguments = candidate._schema.arguments
        outs = [a.name for a in arguments if a.is_out]
        if (
            len(outs) == len(schema.returns)
            and outs
            and all(str(a.type) == "Tensor" for a in arguments if a.is_out)
        ):
            rest = [(a.name, str(a.type)) for a in arguments if not a.is_out]
            if rest == wanted:
                return candidate, outs
    return None


class Program:
    """Steps, arena and bindings for inputs of the given shapes; see the module."""

    def __init__(self, shared: Shared, inputs: Sequence[Tensor]):
        self.shared, self.device = shared, shared.device
        self.loop = _runtime.Program()
        self.values: dict[fx.Node, Any] = {}
        self.kinds: dict[fx.Node, str] = {}
        self.buffers: list[Buffer] = []
        self.steps: list[StepRecord] = []
        self._buffer_of: dict[int, int] = {}
        before = _runtime.buffer_bytes()
        with torch.no_grad():
            self._propagate(inputs)
            self._plan_memory()
            self._bind(inputs)
        self.scratch_bytes = _runtime.buffer_bytes() - before

    # Shapes

    def _propagate(self, inputs: Sequence[Tensor]) -> None:
        graph = self.shared.module.graph
        written = self._written_placeholders(graph)
        varying: set[fx.Node] = set()
        self._input_names: list[str] = []
        self._written: set[int] = set()
        position = 0
        for node in graph.nodes:
            if node.op == "placeholder":
                given = inputs[position]
                with self.shared.mode:
                    fake = torch.empty(given.shape, dtype=given.dtype, device=self.device)
                self._input_names.append(node.name)
                if node in written:
                    self._written.add(position)
                small = given.nbytes <= COPY_BYTES and node not in written
                buffer = Buffer("input" if small else "bound", given.nbytes, position=position)
                self._own(fake, buffer)
                self.values[node], self.kinds[node] = fake, buffer.kind
                varying.add(node)
                position += 1
            elif node.op == "get_attr":
                fake, weight = self.shared.fakes[node.target], self.shared.weights[node.target]
                if _storage_key(fake) not in self._buffer_of:
                    storage = weight.untyped_storage()
                    self._own(fake, Buffer("constant", 0, storage=storage, tensor=weight))
                self.values[node], self.kinds[node] = fake, "constant"
            elif node.op == "call_function":
                self._propagate_call(node, varying)
            elif node.op == "output":
                self.outputs = _tensors(fx.node.map_arg(node.args[0], self.values.__getitem__))
                self.single = not isinstance(node.args[0], (tuple, list)) or len(node.args[0]) == 1
                for fake in self.outputs:
                    self._buffer(fake).last = len(self.steps)
            else:
                raise UnsupportedError(
                    f"node {node.name}: graphs hold call_function nodes only, got {node.op}; "
                    "export the model with torch.export"
                )

    def _written_placeholders(self, graph: fx.Graph) -> set[fx.Node]:
        """Placeholders that some op writes to, directly or through views: never copied."""
        written = set()
        for node in graph.nodes:
            schema = getattr(node.target, "_schema", None)
            if node.op != "call_function" or schema is None or not schema.is_mutable:
                continue
            for argument, value in zip(schema.arguments, node.args):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    while isinstance(value, fx.Node) and value.op == "call_function" and value.args:
                        value = value.args[0]
                    if isinstance(value, fx.Node) and value.op == "placeholder":
                        written.add(value)
        return written

    def _propagate_call(self, node: fx.Node, varying: set[fx.Node]) -> None:
        args, kwargs = self._arguments(node, lambda fake: fake)
        try:
            with self.shared.mode:
                value = node.target(*args, **kwargs)
        except Exception as error:
            raise UnsupportedError(
                f"node {node.name} ({short_name(node.target)}): its shape cannot be known before "
                f"the run: {error}"
            ) from error
        self.values[node] = value
        reads, writes = _tensors((args, kwargs)), _tensors(value)
        mutable = getattr(node.target, "_schema", None) is not None and node.target._schema.is_mutable
        if not writes and not mutable:
            self.kinds[node] = "host"
            return
        known = {_storage_key(t) for t in reads}
        if not mutable and all(_storage_key(t) in known for t in writes):
            self.kinds[node] = "view"
            if any(n in varying for n in node.all_input_nodes):
                varying.add(node)
            return
        if not mutable and self._fold(node, varying, writes):
            return
        varying.add(node)
        native = _is_native(node.target, self.device)
        step = StepRecord(node, short_name(node.target), "native" if native else "callback", reads, writes)
        if not native:
            step.why = "no native step" if _is_room(node.target) else "runs as its ATen op"
        index = len(self.steps)
        for fake in writes:
            if _storage_key(fake) not in self._buffer_of:
                self._own(fake, Buffer("arena", fake.untyped_storage().nbytes(), index, index))
        for fake in reads + writes:
            buffer = self._buffer(fake)
            buffer.last = index
            step.buffers.add(self._buffer_of[_storage_key(fake)])
        if mutable:
            self._refuse_written_constants(node, reads)
        self.kinds[node] = step.backend
        self.steps.append(step)

    def _refuse_written_constants(self, node: fx.Node, reads: list[FakeTensor]) -> None:
        for argument, value in zip(node.target._schema.arguments, node.args):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes and any(
                self._buffer(t).kind in ("constant", "folded")
                for t in _tensors(fx.node.map_arg(value, self.values.__getitem__))
            ):
                raise UnsupportedError(
                    f"node {node.name} ({short_name(node.target)}) writes to a weight; "
                    "make the state an input of the model"
                )

    def _fold(self, node: fx.Node, varying: set[fx.Node], writes: list[FakeTensor]) -> bool:
        target = node.target
        if (
            any(n in varying for n in node.all_input_nodes)
            or _is_room(target)
            or torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())
            or sum(t.untyped_storage().nbytes() for t in writes) > FOLD_BYTES
        ):
            return False
        args, kwargs = self._arguments(node, self._tensor)
        results = _tensors(target(*args, **kwargs))
        for fake, real in zip(writes, results):
            if _storage_key(fake) in self._buffer_of:
                continue
            if real.stride() != fake.stride() or real.storage_offset() != fake.storage_offset():
                real = torch.empty_strided(
                    fake.shape, fake.stride(), dtype=fake.dtype, device=self.device
                ).copy_(real)
            storage = real.untyped_storage()
            self._own(fake, Buffer("folded", storage.nbytes(), storage=storage, tensor=real))
        self.kinds[node] = "folded"
        return True

    # Memory

    def _own(self, fake: FakeTensor, buffer: Buffer) -> None:
        self._buffer_of[_storage_key(fake)] = len(self.buffers)
        self.buffers.append(buffer)

    def _buffer(self, fake: Tensor) -> Buffer:
        return self.buffers[self._buffer_of[_storage_key(fake)]]

    def is_constant(self, fake: Tensor) -> bool:
        """Is this value, or what it is a view of, a weight or folded?"""
        return self._buffer(fake).kind in ("constant", "folded")

    def _plan_memory(self) -> None:
        placed = [b for b in self.buffers if b.kind in ("arena", "input")]
        intervals = [memory.Interval(b.bytes, b.first, b.last) for b in placed]
        self.arena = memory.plan(intervals)
        memory.verify(intervals, self.arena)
        self.intervals = intervals
        spare = memory.ALIGNMENT - 1
        self.arena_tensor = torch.empty(self.arena.bytes + spare, dtype=torch.uint8, device=self.device)
        start = -self.arena_tensor.data_ptr() % memory.ALIGNMENT
        for buffer, offset in zip(placed, self.arena.offsets):
            buffer.offset = start + offset
            buffer.storage = self.arena_tensor.untyped_storage()

    def _place(self, fake: Tensor) -> int:
        """Bytes from the start of the storage behind `fake` to its first element."""
        return self._buffer(fake).offset + fake.storage_offset() * fake.element_size()

    def _tensor(self, fake: Tensor) -> Tensor:
        """The real tensor of a value."""
        storage, start = self._buffer(fake).storage, self._place(fake)
        empty = torch.empty(0, dtype=fake.dtype, device=self.device)
        return empty.set_(storage, start // fake.element_size(), fake.shape, fake.stride())

    def _view(self, fake: Tensor | None) -> tuple | None:
        """The same as address, dtype, sizes and strides, for the C++ loop."""
        if fake is None:
            return None
        address = self._buffer(fake).storage.data_ptr() + self._place(fake) if fake.numel() else 0
        code = _DTYPE_CODE.get(fake.dtype, len(_DTYPE_CODE))
        return address, code, tuple(fake.shape), fake.stride()

    # Steps

    def _arguments(self, node: fx.Node, real: Callable[[FakeTensor], Any]) -> tuple[tuple, dict]:
        """The arguments of a node with fake tensors mapped by `real`."""

        def value(n: fx.Node) -> Any:
            return pytree.tree_map_only(Tensor, real, self.values[n])

        def device(leaf: Any) -> Any:
            return self.device if isinstance(leaf, torch.device) else leaf

        args = fx.node.map_aggregate(node.args, lambda a: value(a) if isinstance(a, fx.Node) else device(a))
        kwargs = fx.node.map_aggregate(
            node.kwargs, lambda a: value(a) if isinstance(a, fx.Node) else device(a)
        )
        return tuple(args), dict(kwargs)

    def _bind(self, inputs: Sequence[Tensor]) -> None:
        self._inputs: list[tuple[int, Tensor]] = []  # copied: position, its place in the arena
        self._bound: list[tuple[int, int]] = []  # in place: position, buffer
        fakes = [self.values[n] for n in self.shared.module.graph.nodes if n.op == "placeholder"]
        for position, fake in enumerate(fakes):
            index = self._buffer_of[_storage_key(fake)]
            if self.buffers[index].kind == "input":
                self._inputs.append((position, self._tensor(fake)))
            else:
                self._bound.append((position, index))
                self._attach(self.buffers[index], self._contiguous(position, inputs[position]))
        for step in self.steps:
            self._build(step, None)
        self._results = [self._tensor(fake) for fake in self.outputs]

    def _contiguous(self, position: int, tensor: Tensor) -> Tensor:
        if tensor.is_contiguous():
            return tensor
        if position in self._written:
            raise ArgumentError(
                f"{self._input_names[position]} must be contiguous, since the graph writes to it, "
                f"got strides {list(tensor.stride())}"
            )
        return tensor.contiguous()

    def _attach(self, buffer: Buffer, tensor: Tensor) -> None:
        buffer.tensor, buffer.storage = tensor, tensor.untyped_storage()
        buffer.offset = tensor.storage_offset() * tensor.element_size()

    def _build(self, step: StepRecord, index: int | None) -> None:
        """Makes a step, or makes it again in place at `index`."""
        if step.backend == "native":
            name = step.node.name
            spec = self._spec(step)
            try:
                if index is None:
                    self.loop.add_native(name, *spec, self.shared.packed)
                else:
                    self.loop.replace_native(index, *spec, self.shared.packed)
                return
            except RuntimeError as error:
                # The op itself also takes what a step does not (other strides); explain() says so.
                step.backend, step.why = "callback", f"step refused: {error}"
                self.kinds[step.node] = "callback"
        function = self._callback(step)
        if index is None:
            self.loop.add_callback(step.node.name, function)
        else:
            self.loop.replace_callback(index, step.node.name, function)

    def _spec(self, step: StepRecord) -> tuple:
        args, kwargs = self._arguments(step.node, lambda fake: fake)
        inputs, constant, attributes = [], [], {}
        for i, argument in enumerate(step.node.target._schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
            kind = str(argument.real_type)
            if kind in ("Tensor", "Optional[Tensor]"):
                view = self._view(value)
                inputs.append(view)
                constant.append(
                    value is not None
                    and self._buffer(value).kind == "constant"
                    and self.shared.may_pack(view)
                )
            elif value is not None and "ScalarType" not in kind:  # the output says its own dtype
                if argument.N and isinstance(value, int):
                    value = [value] * argument.N
                attributes[argument.name] = list(value) if isinstance(value, (tuple, list)) else value
        outputs = [self._view(fake) for fake in step.writes]
        return step.node.target._opname, inputs, constant, outputs, attributes

    def _callback(self, step: StepRecord) -> Callable[[], Any]:
        target, node = step.node.target, step.node
        args, kwargs = self._arguments(node, self._tensor)
        places = [self._tensor(fake) for fake in step.writes]
        overload = isinstance(target, torch._ops.OpOverload)
        if overload and target._schema.is_mutable:
            return functools.partial(target, *args, **kwargs)
        if overload and target.name() in _COPIES:
            place, source = places[0], args[0]
            return functools.partial(place.view_as(source).copy_, source)
        form = out_overload(target) if overload else None
        if form is not None and len(form[1]) == len(places):
            return functools.partial(form[0], *args, **kwargs, **dict(zip(form[1], places)))

        def compute_and_copy() -> None:
            for place, result in zip(places, _tensors(target(*args, **kwargs))):
                place.copy_(result)

        return compute_and_copy

    # Running

    def load(self, inputs: Sequence[Tensor]) -> None:
        """Brings the inputs to where the steps read them."""
        changed: set[int] = set()
        for position, index in self._bound:
            given, buffer = self._contiguous(position, inputs[position]), self.buffers[index]
            if given.data_ptr() != buffer.tensor.data_ptr():
                self._attach(buffer, given)
                changed.add(index)
        if changed:
            for i, step in enumerate(self.steps):
                if not changed.isdisjoint(step.buffers):
                    self._build(step, i)
            self._results = [self._tensor(fake) for fake in self.outputs]
        for position, place in self._inputs:
            place.copy_(inputs[position])

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Outputs as new tensors. Inputs must have the shapes and dtypes of this program."""
        with torch.no_grad():
            self.load(inputs)
            self.loop.run()
            return [t.clone() for t in self._results]

    @property
    def bytes(self) -> int:
        """Arena, folded values and scratch of this program."""
        folded = sum(b.bytes for b in self.buffers if b.kind == "folded")
        return self.arena.bytes + folded + self.scratch_bytes


def _is_room(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "narrowcast"
