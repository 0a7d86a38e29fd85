"""A traced graph on a device that captures: the same steps as on the CPU, called through the dispatcher.

The first run goes step by step (kernels are compiled and tuned, ops that wait for the device are found out), the second is
captured, later ones are launches: one where every step can be captured, which is the rule. What kernels make of a weight
before they multiply by it (kernels/common/prepared.py) is made in the first run and stays. A step that cannot (it runs on
copies on the CPU, or waits for the device) runs by itself between two graphs, and ``explain()`` says why.

Intermediate results lie where the graphs' pool puts them, inputs and results in buffers of the program. Inputs that the
graph writes (caches) are used where they are, so a program belongs to their addresses.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from .. import dispatch
from ..errors import ArgumentError
from . import memory
from .cuda_graphs import WAITS
from .trace import Shared, StepRecord, Trace, is_room, tensors

if TYPE_CHECKING:
    from .cuda_graphs import CudaGraphs

#: What follows the graph's last node in the same launch: (buffers of the inputs, results) -> results.
Finish = Callable[[list[Tensor], list[Tensor]], list[Tensor]]


class CapturedProgram(Trace):
    """A program for inputs of the given shapes; written inputs: of the given addresses."""

    copied_up_to = math.inf

    def __init__(
        self, shared: Shared, inputs: Sequence[Tensor], graphs: CudaGraphs, finish: Finish | None = None
    ):
        self.graphs, self.finish = graphs, finish
        #: Fake tensor -> the real one: of inputs and of results that are still needed; of what never changes.
        self._real: dict[int, Tensor] = {}
        self._fixed: dict[int, Tensor] = {}
        self._copies = graphs.copies()
        with torch.inference_mode(False), torch.no_grad(), graphs.turn():
            super().__init__(shared, inputs)
            self._inputs = self._make_inputs()
        for step in self.steps:
            given = self._given(step) if is_room(step.node.target) else {}
            step.backend, step.why = graphs.backend_of(step, given)
            self.kinds[step.node] = step.backend
        by_node = {step.node: step for step in self.steps}
        self._calls = [
            (node, by_node.get(node))
            for node in shared.nodes.nodes
            if node.op == "call_function" and self.kinds[node] not in ("folded", "host")
        ]
        self._ends = self._lifetimes()
        self._results: list[Tensor] = []
        self._parts: list[Callable[[], None]] | None = None
        self._ran = False
        self._captured_bytes = 0

    def _make_inputs(self) -> list[tuple[int, Tensor | None]]:
        """Per input its fake tensor's key, and its buffer unless it is used in place."""
        made: list[tuple[int, Tensor | None]] = []
        for node in self.shared.nodes.nodes:
            if node.op == "placeholder":
                fake, copied = self.values[node], self.kinds[node] == "input"
                buffer = torch.zeros(fake.shape, dtype=fake.dtype, device=self.device) if copied else None
                made.append((id(fake), buffer))
        return made

    def _given(self, step: StepRecord) -> dict[str, Any]:
        args, kwargs = self._arguments(step.node, lambda fake: fake, self.device)
        return dispatch.bind(step.node.target._opname, args, kwargs)

    def _lifetimes(self) -> list[list[int]]:
        """For every call the values that nothing reads after it."""
        last: dict[int, int] = {}
        for i, (node, _) in enumerate(self._calls):
            read = tensors(self._arguments(node, lambda fake: fake, self.device))
            last.update((id(fake), i) for fake in [*read, *tensors(self.values[node])])
        kept = {id(fake) for fake in self.outputs} | {key for key, _ in self._inputs}
        ends: list[list[int]] = [[] for _ in self._calls]
        for key, i in last.items():
            if key not in kept:
                ends[i].append(key)
        return ends

    def _tensor(self, fake: Tensor) -> Tensor:
        real = self._real.get(id(fake))
        if real is None:  # a weight or a folded value
            real = self._fixed.get(id(fake))
        if real is None:
            real = self._fixed[id(fake)] = super()._tensor(fake)
        return real

    # Running

    def run(self, inputs: Sequence[Tensor | None], to_host: bool | None = None) -> list[Tensor]:
        """Outputs as new tensors, where the first input is unless ``to_host`` says.

        An input of None keeps what its buffer holds.
        """
        if to_host is None:
            to_host = bool(inputs) and inputs[0] is not None and inputs[0].device != self.device
        with torch.no_grad(), self.graphs.turn():
            try:
                self._load(inputs)
                self._launch()
                if to_host:
                    return self._copies.to_host(self._results)
                return [t.clone() for t in self._results]
            finally:
                self._real.clear()
                if self._parts is None:
                    self._results = []

    def _load(self, inputs: Sequence[Tensor | None]) -> None:
        for position, ((key, buffer), given) in enumerate(zip(self._inputs, inputs)):
            if buffer is not None:
                self._real[key] = buffer
                if given is not None:
                    self._copies.to_device(position, buffer, given)
            elif given is not None:
                self._real[key] = self._in_place(position, given)

    def _in_place(self, position: int, given: Tensor) -> Tensor:
        name = self._input_names[position]
        if not given.is_contiguous():
            raise ArgumentError(
                f"{name} must be contiguous, since the graph writes to it, got strides {list(given.stride())}"
            )
        return given

    def _launch(self) -> None:
        if self._parts is None and self._ran and any(step.backend == "graph" for step in self.steps):
            self._capture()
        if self._parts is None:
            self._step_by_step()
        else:
            for part in self._parts:
                part()
        self._ran = True

    def _step_by_step(self) -> None:
        with self.graphs.aside(), self.shared.prepared.use():
            for i, (node, step) in enumerate(self._calls):
                if step is not None and step.backend == "graph" and not is_room(node.target):
                    self._compute_warily(i, step)
                else:
                    self._compute(i)
            self._results = self._finished()

    def _compute_warily(self, i: int, step: StepRecord) -> None:
        """Finds out whether an ATen op waits for the device, which ops of the rooms tell by themselves."""
        try:
            with self.graphs.without_waiting():
                self._compute(i)
        except RuntimeError as error:
            if WAITS not in str(error):
                raise
            step.backend, step.why = "eager", "waits for the device"
            self.kinds[step.node] = "eager"
            self._compute(i)

    def _compute(self, i: int) -> None:
        node, step = self._calls[i]
        args, kwargs = self._arguments(node, self._tensor, self.device)
        results = tensors(self._called(node, args, kwargs))
        for fake, real in zip(tensors(self.values[node]), results):
            self._real[id(fake)] = real if step is None else _as_traced(real, fake)
        self._drop(i)

    def _called(self, node: fx.Node, args: tuple, kwargs: dict) -> Any:
        try:
            return node.target(*args, **kwargs)
        except RuntimeError as error:
            raise RuntimeError(f"node {node.name}: {error}") from error

    def _drop(self, i: int) -> None:
        for key in self._ends[i]:
            self._real.pop(key, None)

    def _finished(self) -> list[Tensor]:
        results = [self._tensor(fake) for fake in self.outputs]
        if self.finish is None:
            return results
        return self.finish([buffer for _, buffer in self._inputs if buffer is not None], results)

    # Capturing

    def _capture(self) -> None:
        """Records the parts of a run, in order; nothing is computed yet."""
        before, given = self.graphs.reserved(), dict(self._real)
        try:
            self._parts = self._recorded_parts()
        except RuntimeError as error:
            self._parts, self._real, self._results = None, given, []
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            warnings.warn(f"a plan runs step by step, {reason}", RuntimeWarning, stacklevel=2)
            for step in self.steps:
                step.backend, step.why = "eager", f"capture failed: {reason}"
                self.kinds[step.node] = "eager"
        self._captured_bytes = max(0, self.graphs.reserved() - before)

    def _recorded_parts(self) -> list[Callable[[], None]]:
        parts: list[Callable[[], None]] = []
        last = len(self._calls)
        for alone, run in itertools.groupby(range(last), self._is_eager):
            if alone:
                parts += [self._eager_part(i) for i in run]
                continue
            indices = list(run)
            ends = indices[-1] == last - 1
            if any(self._calls[i][1] for i in indices) or (ends and self.finish):
                parts.append(self.graphs.record(lambda ends=ends, i=indices: self._work(i, ends)))
            else:
                self._work(indices, ends)  # views: addresses, nothing to launch
        if not self._calls or self._is_eager(last - 1):
            if self.finish:
                parts.append(self.graphs.record(lambda: self._work([], True)))
            else:
                self._work([], True)
        return parts

    def _is_eager(self, i: int) -> bool:
        step = self._calls[i][1]
        return step is not None and step.backend == "eager"

    def _work(self, indices: Sequence[int], ends: bool) -> list[Tensor]:
        """Computes these calls, and what follows the last; returns all that is read later."""
        with self.shared.prepared.use(keep=False):
            for i in indices:
                self._compute(i)
        if ends:
            self._results = self._finished()
        return [*self._real.values(), *self._results]

    def _eager_part(self, i: int) -> Callable[[], None]:
        """A call of one op on the tensors around it; its results go to places that the next graph reads."""
        node, step = self._calls[i]
        args, kwargs = self._arguments(node, self._tensor, self.device)
        places: list[Tensor] = []
        schema = getattr(node.target, "_schema", None)
        if step is not None and not (schema is not None and schema.is_mutable):
            with torch.inference_mode(False):
                places = [
                    torch.empty_strided(f.shape, f.stride(), dtype=f.dtype, device=self.device)
                    for f in step.writes
                ]
            self._real.update((id(fake), place) for fake, place in zip(step.writes, places))
        self._drop(i)

        def call() -> None:
            with self.shared.prepared.use():
                results = tensors(self._called(node, args, kwargs))
            for place, result in zip(places, results):
                place.copy_(result)

        return call

    def release(self) -> None:
        """Gives back the graphs and their memory; another run captures again."""
        if self._parts is not None:
            self.graphs.settle()
        self._parts, self._results, self._captured_bytes = None, [], 0

    # What it costs

    @property
    def launches(self) -> int | None:
        """Graphs and single ops of a run; None until it is captured."""
        return None if self._parts is None else len(self._parts)

    def run_timed(self, inputs: Sequence[Tensor]) -> list[float]:
        """Seconds of every step, one by one."""
        with torch.no_grad(), self.graphs.turn():
            try:
                self._load(inputs)
                self.graphs.hold()
                moments = [self.graphs.moment()]
                with self.shared.prepared.use():
                    for i, (_, step) in enumerate(self._calls):
                        self._compute(i)
                        if step is not None:
                            moments.append(self.graphs.moment())
                return [later - earlier for earlier, later in itertools.pairwise(moments)]
            finally:
                self._real.clear()

    @property
    def bytes(self) -> int:
        """Input buffers, folded values, and what capturing added to the pool."""
        found = self.memory()
        return found["arena"] + found["folded"]

    def memory(self) -> dict[str, int]:
        """As :meth:`Executor.memory` tells it; the arena is the inputs' buffers and the growth of the pool."""
        placed = [b for b in self.buffers if b.kind in ("arena", "input")]
        inputs = sum(buffer.nbytes for _, buffer in self._inputs if buffer is not None)
        return {
            "arena": inputs + self._captured_bytes,
            "lower_bound": memory.lower_bound([memory.Interval(b.bytes, b.first, b.last) for b in placed]),
            "scratch": 0,
            "folded": self.folded_bytes,
        }


def _as_traced(real: Tensor, fake: Tensor) -> Tensor:
    """A result with the strides that the trace foretold, which later views rely on."""
    different = any(n > 1 and a != b for n, a, b in zip(fake.shape, real.stride(), fake.stride()))
    if not different or real.numel() == 0:
        return real
    return torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=real.device).copy_(real)
