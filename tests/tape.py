"""CUDA graphs without CUDA: takes the place of ``CudaGraphs`` on the CPU, with the traps of a graph and nothing else of it.

A recording computes nothing: what an op wrote in place is put back, and the results hold rubbish. A replay calls the
recorded ops with the very tensors and numbers of the recording, so a number that Python chose then is the same for ever.
Between two launches everything that the recording did not declare readable holds rubbish again. Ops in ``waiting`` raise as
torch does for one that waits for the device; ops in ``alone`` are said not to be capturable.
"""

from __future__ import annotations

import contextlib
import time

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from narrowcast.runtime.cuda_graphs import WAITS
from narrowcast.runtime.trace import short_name, storage_key, tensors

HOST_READS = {"aten._local_scalar_dense", "aten.nonzero"}


def name_of(func) -> str:
    return func.name().removeprefix("narrowcast::").replace("::", ".")


def spoil(t: Tensor) -> None:
    t.fill_(
        torch.nan if t.is_floating_point() else torch.iinfo(t.dtype).max if t.dtype != torch.bool else True
    )


class Refusing(TorchDispatchMode):
    """Ops of these names raise."""

    def __init__(self, names, text: str):
        super().__init__()
        self.names, self.text = names, text

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if name_of(func) in self.names:
            raise RuntimeError(f"called a {self.text}")
        return func(*args, **(kwargs or {}))


class Recording(TorchDispatchMode):
    def __init__(self, refused):
        super().__init__()
        self.calls, self.undo, self.refused = [], [], refused
        self.fresh: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if name_of(func) in HOST_READS | self.refused:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        for i, argument in enumerate(func._schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write and value is not None:
                self.undo.append((value, value.clone()))
        results = tensors(func(*args, **kwargs))
        given = {storage_key(t) for t in tensors((args, kwargs))}
        own = [t for t in results if storage_key(t) not in given]
        self.fresh |= {storage_key(t): t for t in own}
        if own or func._schema.is_mutable:
            self.calls.append((func, args, kwargs, own))
        return results[0] if len(results) == 1 and len(func._schema.returns) == 1 else _like(func, results)


def _like(func, results):
    return tuple(results) if results else None


class Tape:
    """See above. launches: replays so far; uploads: copies of inputs from the host."""

    def __init__(self, alone=(), waiting=(), failing=()):
        self.device = torch.device("cpu")
        self.alone, self.waiting, self.failing = set(alone), set(waiting), set(failing)
        self.launches = self.uploads = self.recordings = 0

    @contextlib.contextmanager
    def turn(self):
        yield

    aside = turn

    def without_waiting(self):
        return Refusing(self.waiting, WAITS)

    def record(self, work):
        self.recordings += 1
        recording = Recording(self.failing)
        with recording:
            readable = {storage_key(t) for t in work()}
        for target, before in reversed(recording.undo):
            target.copy_(before)
        hidden = [t for key, t in recording.fresh.items() if key not in readable]
        for t in recording.fresh.values():
            spoil(t)

        @torch.inference_mode()  # a launch knows of no modes
        def replay():
            self.launches += 1
            for func, args, kwargs, own in recording.calls:
                results = tensors(func(*args, **kwargs))
                for place, result in zip(own, results if own else []):
                    place.copy_(result)
            for t in hidden:
                spoil(t)

        return replay

    def backend_of(self, step, given):
        if short_name(step.node.target) in self.alone:
            return "eager", "said to be alone"
        return "graph", "the CPU's kernel"

    def settle(self):
        pass

    def copies(self):
        return Copies(self)

    def reserved(self):
        return 0

    def moment(self):
        return time.perf_counter()

    def hold(self):
        pass


class Copies:
    def __init__(self, tape):
        self.tape = tape

    def to_device(self, position, target, source):
        self.tape.uploads += 1
        target.copy_(source)

    def to_host(self, results):
        return [t.clone() for t in results]
