"""A traced graph with its memory and its loop: what a call runs.

Every result has its place in one arena before the first run; nothing is allocated while running,
except inside ATen ops that have no ``out=`` form.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _runtime
from ..errors import ArgumentError
from . import memory
from .trace import Buffer, Shared, StepRecord, Trace, storage_key, tensors

#: Ops that only move or convert what they are given: one copy into the arena does it.
_COPIES = ("aten::reshape", "aten::contiguous", "aten::to.dtype", "aten::_to_copy")

_DTYPE_CODE = {getattr(torch, name): code for code, name in enumerate(_runtime.DTYPES)}


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


def _implemented(target: torch._ops.OpOverload, device: torch.device) -> bool:
    """A room may declare an out form that a device has no kernel for; ATen's all have one."""
    key = device.type.upper()
    return target.namespace != "narrowcast" or torch._C._dispatch_has_kernel_for_dispatch_key(
        target.name(), key
    )


class Program(Trace):
    """Steps, arena and bindings for inputs of the given shapes."""

    def __init__(self, shared: Shared, inputs: Sequence[Tensor]):
        self.loop = _runtime.Program()
        before = _runtime.buffer_bytes() - shared.packed.bytes
        # Memory made under inference_mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            super().__init__(shared, inputs)
            self._plan_memory()
            self._bind(inputs)
        self.scratch_bytes = _runtime.buffer_bytes() - shared.packed.bytes - before

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

    def _view(self, fake: Tensor | None) -> tuple | None:
        """The same as address, dtype, sizes and strides, for the C++ loop."""
        if fake is None:
            return None
        address = self._buffer(fake).storage.data_ptr() + self._place(fake) if fake.numel() else 0
        code = _DTYPE_CODE.get(fake.dtype, len(_DTYPE_CODE))
        return address, code, tuple(fake.shape), fake.stride()

    def _bind(self, inputs: Sequence[Tensor]) -> None:
        self._inputs: list[tuple[int, Tensor]] = []  # copied: position, its place in the arena
        self._bound: list[tuple[int, int]] = []  # in place: position, buffer
        fakes = [self.values[n] for n in self.shared.nodes.nodes if n.op == "placeholder"]
        for position, fake in enumerate(fakes):
            index = self._buffer_of[storage_key(fake)]
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
        args, kwargs = self._arguments(step.node, lambda fake: fake, self.device)
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
        args, kwargs = self._arguments(node, self._tensor, self.device)
        places = [self._tensor(fake) for fake in step.writes]
        overload = isinstance(target, torch._ops.OpOverload)
        if overload and target._schema.is_mutable:
            return functools.partial(target, *args, **kwargs)
        if overload and target.name() in _COPIES:
            place, source = places[0], args[0]
            return functools.partial(place.view_as(source).copy_, source)
        form = out_overload(target) if overload else None
        if form is not None and len(form[1]) == len(places) and _implemented(form[0], self.device):
            return functools.partial(form[0], *args, **kwargs, **dict(zip(form[1], places)))

        def compute_and_copy() -> None:
            for place, result in zip(places, tensors(target(*args, **kwargs))):
                place.copy_(result)

        return compute_and_copy

    def release(self) -> None:
        """Called when the executor lets go of it; what it holds goes with it."""

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
            with torch.inference_mode(False):  # as in __init__
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

    def run_timed(self, inputs: Sequence[Tensor]) -> list[float]:
        """Seconds of every step."""
        self.load(inputs)  # a run reuses the place of its inputs
        return self.loop.run_timed()

    @property
    def bytes(self) -> int:
        """Arena, folded values and scratch of this program."""
        found = self.memory()
        return found["arena"] + found["folded"] + found["scratch"]

    def memory(self) -> dict[str, int]:
        """As :meth:`Executor.memory` tells it."""
        return {
            "arena": self.arena.bytes,
            "lower_bound": self.arena.lower_bound,
            "scratch": self.scratch_bytes,
            "folded": self.folded_bytes,
        }
