"""What a plan needs of a CUDA device beyond its ops: graphs and their pool, streams in order, copies through pinned memory.

All that only a GPU has is behind :class:`CudaGraphs`; :mod:`captured` decides what is captured, and runs anywhere that
something else takes this class's place.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .. import dispatch
from .trace import StepRecord, is_room

#: What torch says, with its debug mode "error", of an op that waits for the device.
WAITS = "synchronizing CUDA operation"
#: Device time before the steps of a profile, in cycles: all of them are queued by then, so none waits for its launch.
QUEUEING = 60_000_000
#: torch captures one graph at a time in a process.
_capturing = threading.Lock()


class Moment:
    """A point in the stream's time; the difference of two is in seconds, and waits for the later one."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: Moment) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


class PinnedCopies:
    """Page-locked places for what a program takes from the CPU and gives back to it, made when first needed."""

    def __init__(self) -> None:
        self._places: dict[int, tuple[Tensor, torch.cuda.Event]] = {}

    def _place(self, key: int, like: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        if key not in self._places:
            with torch.inference_mode(False):
                place = torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
            self._places[key] = place, torch.cuda.Event()
        return self._places[key]

    def to_device(self, position: int, target: Tensor, source: Tensor) -> None:
        """Copies an input in the order of the stream; the source may change as soon as this returns."""
        if source.device.type != "cpu":
            target.copy_(source)
            return
        place, copied = self._place(position, target)
        copied.synchronize()  # the last copy out of this place
        place.copy_(source)
        target.copy_(place, non_blocking=True)
        copied.record()

    def to_host(self, results: Sequence[Tensor]) -> list[Tensor]:
        """New tensors on the CPU, with one wait for all of them."""
        places = [self._place(-1 - i, t) for i, t in enumerate(results)]
        for (place, copied), result in zip(places, results):
            place.copy_(result, non_blocking=True)
            copied.record()
        if places:
            places[-1][1].synchronize()
        return [place.clone() for place, _ in places]


class CudaGraphs:
    """The graphs of one executor: one pool, one stream to warm up and capture on, one turn at a time.

    Graphs share the pool, so one may use the memory of another's intermediate results. That is sound since runs follow
    each other (:meth:`turn`) and results are copied out before the next begins.
    """

    def __init__(self, device: torch.device):
        self.device = device
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()
            self._pool = torch.cuda.graph_pool_handle()
            self._done = torch.cuda.Event()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """A run. On whatever stream it is called, it comes after the one before: they share their buffers."""
        with torch.cuda.device(self.device):
            here = torch.cuda.current_stream()
            here.wait_event(self._done)
            try:
                yield
            finally:
                self._done.record(here)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """On the stream of captures, whose libraries' workspaces exist afterwards; in order with the current one."""
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            yield
        here.wait_stream(self._stream)

    @contextlib.contextmanager
    def without_waiting(self) -> Iterator[None]:
        """RuntimeError with the text WAITS for an op that waits for the device. Holds for all threads meanwhile."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def record(self, work: Callable[[], list[Tensor]]) -> Callable[[], None]:
        """The launch of a graph that does what ``work`` asks the device for. ``work`` returns what must stay readable."""
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with (
                _capturing,
                torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ),
            ):
                work()
        finally:
            torch.cuda.set_stream(here)  # which torch does not restore when a capture fails
        return graph.replay

    def backend_of(self, step: StepRecord, given: Mapping[str, Any]) -> tuple[str, str]:
        """("graph" or "eager", why) of a step with these arguments by name (of a room's op)."""
        if not is_room(step.node.target):
            return "graph", "runs as its ATen op"
        op = step.node.target._opname
        if op not in dispatch.ROOM_OF:
            return "eager", "not an op of the catalogue"
        choice = dispatch.serving(op, given, self.device)
        if choice.backend == "reference":
            return "eager", f"reference on copies on the CPU: {choice.reason}"
        if given.get("strict"):
            return "eager", f"{choice.backend}: strict waits for what it found"
        return "graph", f"{choice.backend}: {choice.reason}"

    def settle(self) -> None:
        """Waits until the last run is over."""
        self._done.synchronize()

    def copies(self) -> PinnedCopies:
        return PinnedCopies()

    def reserved(self) -> int:
        """Bytes of device memory that this process holds, for differences: what nobody uses is given back first."""
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self.device)

    def moment(self) -> Moment:
        return Moment()

    def hold(self) -> None:
        """Keeps the stream busy while what follows is queued."""
        torch.cuda._sleep(QUEUEING)


def is_served(nodes: fx.Graph, device: torch.device) -> bool:
    """Whether every op of the rooms has a backend there that would be chosen, other than copies on the CPU."""
    found = {n.target._opname for n in nodes.nodes if n.op == "call_function" and is_room(n.target)}
    return all(op in dispatch.ROOM_OF and dispatch.is_trusted(op, device) for op in found)


def layouts(nodes: fx.Graph, device: torch.device) -> dict[str, torch.memory_format]:
    """Weight -> the memory format that the kernels of the device read: filters of convolutions in Triton channels-last.

    Everything else is read row by row. What is laid out here, once, no call has to copy.
    """
    operand = {"conv2d": 1, "conv2d_int8": 3}
    found = {}
    for node in nodes.nodes:
        op = getattr(node.target, "_opname", "")
        if node.op != "call_function" or not is_room(node.target) or op not in operand:
            continue
        weight = node.args[operand[op]] if len(node.args) > operand[op] else None
        if isinstance(weight, fx.Node) and weight.op == "get_attr":
            # Most layers have many rows; where the other order is read, a call copies the filter.
            image = torch.empty(1, 1, 64, 64, device="meta")
            if dispatch.serving(op, dispatch.bind(op, [image], {}), device).backend == "triton":
                found[weight.target] = torch.channels_last
    return found
