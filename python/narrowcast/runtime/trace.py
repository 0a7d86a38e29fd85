"""A graph made concrete: one program per set of input shapes.

Sizes become integers by running the graph on meta tensors, which have shapes, strides and shared
storage but no data. A node is then one of

- a view: its result shares the storage of an argument; no step, only an address,
- folded: it depends on no input and is small; computed once, here,
- native: a ``narrowcast`` op whose room has a step; called by the C++ loop on raw pointers,
- a callback: any other op, bound once to its tensors in the arena.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .. import _runtime
from ..errors import UnsupportedError
from ..kernels.common.prepared import Prepared

#: Inputs up to this size are copied into the arena; larger ones are read in place, at the price of
#: building the steps that read them again when their address changes.
COPY_BYTES = 1 << 20
#: Results that depend on no input are computed when the program is built, up to this size.
FOLD_BYTES = 4 << 20


META = torch.device("meta")


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
    reads: list[Tensor]
    writes: list[Tensor]
    buffers: set[int] = field(default_factory=set)
    why: str = ""  # of a callback


class Shared:
    """What all programs of an executor share: weights, their packed and their meta forms."""

    def __init__(
        self,
        nodes: fx.Graph,
        weights: dict[str, Tensor],
        device: torch.device,
        formats: Mapping[str, torch.memory_format] | None = None,
    ):
        self.nodes, self.device = nodes, device
        self.formats = formats or {}
        moved: dict[tuple, Tensor] = {}
        self.packed = _runtime.PackCache()
        self.weights: dict[str, Tensor] = {}
        self.metas: dict[str, Tensor] = {}
        storages: dict[int, torch.UntypedStorage] = {}
        for node in nodes.nodes:
            if node.op == "get_attr" and node.target not in self.weights:
                source, format = weights[node.target].detach(), self._format(node.target)
                # Weights that are one stay one on another device.
                same = (source.data_ptr(), source.dtype, source.shape, source.stride(), format)
                if same not in moved:
                    moved[same] = _dense(source.to(device), format)
                weight = moved[same]
                self.weights[node.target] = weight
                storage = weight.untyped_storage()
                if storage.data_ptr() not in storages:
                    storages[storage.data_ptr()] = torch.UntypedStorage(storage.nbytes(), device=META)
                empty = torch.empty(0, dtype=weight.dtype, device=META)
                self.metas[node.target] = empty.set_(
                    storages[storage.data_ptr()],
                    weight.storage_offset(),
                    weight.shape,
                    weight.stride(),
                )
        #: What the kernels of a GPU made of the weights, once.
        self.prepared = Prepared(self.weights.values())
        # A pack cache is keyed by address: only the first layout seen there may use it.
        self.layouts: dict[int, tuple] = {}

    def _format(self, name: str) -> torch.memory_format:
        return self.formats.get(name, torch.contiguous_format)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, shared storage counted once."""
        return sum({w.data_ptr(): w.nbytes for w in self.weights.values()}.values())

    def may_pack(self, view: tuple) -> bool:
        return self.layouts.setdefault(view[0], view) == view


def _dense(weight: Tensor, format: torch.memory_format) -> Tensor:
    """Steps read weights in one order: another order of dimensions is laid out anew, once. Expanded ones stay."""
    return (
        weight.contiguous(memory_format=format)
        if weight.nbytes <= weight.untyped_storage().nbytes()
        else weight
    )


def tensors(value: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def _to_meta(t: Tensor) -> Tensor:
    return t if t.is_meta else t.to(META)


def storage_key(t: Tensor) -> int:
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


def is_room(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "narrowcast"


def written_placeholders(graph: fx.Graph) -> set[fx.Node]:
    """Placeholders that some op writes to, directly or through views: never copied."""
    written = set()
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not schema.is_mutable:
            continue
        for i, argument in enumerate(schema.arguments):
            value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write:
                while isinstance(value, fx.Node) and _is_view(value):
                    value = value.args[0]
                if isinstance(value, fx.Node) and value.op == "placeholder":
                    written.add(value)
    return written


def _is_view(node: fx.Node) -> bool:
    """Whether a node's result may share the memory of its first argument: a part of a tuple, or as its schema says."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or not node.args:
        return False
    return schema is None or schema.arguments[0].alias_info is not None


class Trace:
    """The graph with concrete shapes: a value per node, a buffer per storage, the steps in order."""

    #: Bytes of an input that is copied to a place of the program; larger ones are read where they are.
    copied_up_to: float = COPY_BYTES

    def __init__(self, shared: Shared, inputs: Sequence[Tensor]):
        self.shared, self.device = shared, shared.device
        self.values: dict[fx.Node, Any] = {}
        self.kinds: dict[fx.Node, str] = {}
        self.buffers: list[Buffer] = []
        self.steps: list[StepRecord] = []
        self._buffer_of: dict[int, int] = {}
        # Shapes need no autograd layer, which costs more than the rest of a meta call.
        with torch._C._AutoDispatchBelowAutograd():
            self._propagate(inputs)

    def _propagate(self, inputs: Sequence[Tensor]) -> None:
        graph = self.shared.nodes
        written = written_placeholders(graph)
        varying: set[fx.Node] = set()
        self._input_names: list[str] = []
        self._written: set[int] = set()
        position = 0
        for node in graph.nodes:
            if node.op == "placeholder":
                given = inputs[position]
                fake = torch.empty(given.shape, dtype=given.dtype, device=META)
                self._input_names.append(node.name)
                if node in written:
                    self._written.add(position)
                copied = given.nbytes <= self.copied_up_to and node not in written
                buffer = Buffer("input" if copied else "bound", given.nbytes, position=position)
                self._own(fake, buffer)
                self.values[node], self.kinds[node] = fake, buffer.kind
                varying.add(node)
                position += 1
            elif node.op == "get_attr":
                fake, weight = self.shared.metas[node.target], self.shared.weights[node.target]
                if storage_key(fake) not in self._buffer_of:
                    storage = weight.untyped_storage()
                    self._own(fake, Buffer("constant", 0, storage=storage, tensor=weight))
                self.values[node], self.kinds[node] = fake, "constant"
            elif node.op == "call_function":
                self._propagate_call(node, varying)
            elif node.op == "output":
                self.outputs = tensors(fx.node.map_arg(node.args[0], self.values.__getitem__))
                self.single = not isinstance(node.args[0], (tuple, list)) or len(node.args[0]) == 1
                for fake in self.outputs:
                    self._buffer(fake).last = len(self.steps)
            else:
                raise UnsupportedError(
                    f"node {node.name}: graphs hold call_function nodes only, got {node.op}; "
                    "export the model with torch.export"
                )

    def _propagate_call(self, node: fx.Node, varying: set[fx.Node]) -> None:
        args, kwargs = self._arguments(node, lambda fake: fake, META)
        try:
            # Constants made by an op that names no device would come out on the CPU.
            value = pytree.tree_map_only(Tensor, _to_meta, node.target(*args, **kwargs))
        except Exception as error:
            raise UnsupportedError(
                f"node {node.name} ({short_name(node.target)}): its shape cannot be known before "
                f"the run: {error}"
            ) from error
        self.values[node] = value
        reads, writes = tensors((args, kwargs)), tensors(value)
        mutable = getattr(node.target, "_schema", None) is not None and node.target._schema.is_mutable
        if not writes and not mutable:
            self.kinds[node] = "host"
            return
        known = {storage_key(t) for t in reads}
        if not mutable and all(storage_key(t) in known for t in writes):
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
            step.why = "no native step" if is_room(node.target) else "runs as its ATen op"
        index = len(self.steps)
        for fake in writes:
            if storage_key(fake) not in self._buffer_of:
                self._own(fake, Buffer("arena", fake.untyped_storage().nbytes(), index, index))
        for fake in reads + writes:
            buffer = self._buffer(fake)
            buffer.last = index
            step.buffers.add(self._buffer_of[storage_key(fake)])
        if mutable:
            self._refuse_written_constants(node, reads)
        self.kinds[node] = step.backend
        self.steps.append(step)

    def _refuse_written_constants(self, node: fx.Node, reads: list[Tensor]) -> None:
        for argument, value in zip(node.target._schema.arguments, node.args):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes and any(
                self._buffer(t).kind in ("constant", "folded")
                for t in tensors(fx.node.map_arg(value, self.values.__getitem__))
            ):
                raise UnsupportedError(
                    f"node {node.name} ({short_name(node.target)}) writes to a weight; "
                    "make the state an input of the model"
                )

    def _fold(self, node: fx.Node, varying: set[fx.Node], writes: list[Tensor]) -> bool:
        target = node.target
        if (
            any(n in varying for n in node.all_input_nodes)
            or is_room(target)
            or torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())
            or sum(t.untyped_storage().nbytes() for t in writes) > FOLD_BYTES
        ):
            return False
        args, kwargs = self._arguments(node, self._tensor, self.device)
        results = tensors(target(*args, **kwargs))
        for fake, real in zip(writes, results):
            if storage_key(fake) in self._buffer_of:
                continue
            if real.stride() != fake.stride() or real.storage_offset() != fake.storage_offset():
                real = torch.empty_strided(
                    fake.shape, fake.stride(), dtype=fake.dtype, device=self.device
                ).copy_(real)
            storage = real.untyped_storage()
            self._own(fake, Buffer("folded", storage.nbytes(), storage=storage, tensor=real))
        self.kinds[node] = "folded"
        return True

    # Storage

    def _own(self, fake: Tensor, buffer: Buffer) -> None:
        self._buffer_of[storage_key(fake)] = len(self.buffers)
        self.buffers.append(buffer)

    def _buffer(self, fake: Tensor) -> Buffer:
        return self.buffers[self._buffer_of[storage_key(fake)]]

    def is_constant(self, fake: Tensor) -> bool:
        """Is this value, or what it is a view of, a weight or folded?"""
        return self._buffer(fake).kind in ("constant", "folded")

    @property
    def folded_bytes(self) -> int:
        """Bytes of results that were computed once, while tracing."""
        return sum(b.bytes for b in self.buffers if b.kind == "folded")

    def _place(self, fake: Tensor) -> int:
        """Bytes from the start of the storage behind `fake` to its first element."""
        return self._buffer(fake).offset + fake.storage_offset() * fake.element_size()

    def _tensor(self, fake: Tensor) -> Tensor:
        """The real tensor of a value."""
        storage, start = self._buffer(fake).storage, self._place(fake)
        empty = torch.empty(0, dtype=fake.dtype, device=self.device)
        return empty.set_(storage, start // fake.element_size(), fake.shape, fake.stride())

    def _arguments(
        self, node: fx.Node, real: Callable[[Tensor], Any], on: torch.device
    ) -> tuple[tuple, dict]:
        """The arguments of a node: meta tensors mapped by `real`, every device replaced by `on`."""

        def value(n: fx.Node) -> Any:
            return pytree.tree_map_only(Tensor, real, self.values[n])

        def device(leaf: Any) -> Any:
            return on if isinstance(leaf, torch.device) else leaf

        args = fx.node.map_aggregate(node.args, lambda a: value(a) if isinstance(a, fx.Node) else device(a))
        kwargs = fx.node.map_aggregate(
            node.kwargs, lambda a: value(a) if isinstance(a, fx.Node) else device(a)
        )
        return tuple(args), dict(kwargs)
