"""What a compression would need and make, before it is done: bytes of the plan, time, and the peak of memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from narrowcast.errors import UnsupportedError
from narrowcast.graph import Graph
from narrowcast.graph.ir import last_uses
from narrowcast.graph.passes.match import Layer

from . import embedding
from .adaround import NUMBERS
from .calibrate import SAMPLE_ROWS
from .cnn import (
    EIGHT_BIT_SHARE,
    FLOAT_BUDGET,
    can_have_4_bits,
)
from .forms import FORMS, ConvInt8, Form, Grouped, Int8, Item, Native, Table, items_of
from .preflight_seconds import pruning_seconds, seconds_of
from .search import STATISTICS_BATCHES
from .transformer import layer_name

aten = torch.ops.aten
ops = torch.ops.narrowcast

_PAGE = os.sysconf("SC_PAGE_SIZE")
#: What an allocator and torch's own buffers add to the memory that is counted here, as a share of it.
SLACK = 0.05
#: Bytes that the steps of an executor keep per element of a dense layer's input, int8 codes or 16-bit ones (the default).
SCRATCH = {"fp32": 0.0, "int8": 1.25, "int4": 1.25}


@dataclass
class Prediction:
    """bytes: of the plan's weights, least and most; they are equal where no measurement has a say. seconds: of the
    work after import, at the speed measured here. peak: of the process' resident memory, in bytes; available: what
    the machine has for it, the memory that the process holds already included."""

    recipe: str
    bytes: tuple[int, int]
    seconds: float
    peak: int
    available: int
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


# --- bytes ----------------------------------------------------------------------------------------


def bytes_of(
    graph: Graph, kind: str, recipe: str, group_size: int | None, symmetric: bool = False,
    keep_float: Collection[str] = (),
) -> tuple[int, int]:  # fmt: skip
    """Bytes of the weights of the plan that a recipe makes of a float graph: least and most."""
    graph = graph.clone()
    if recipe == "fp32":
        return (graph.weight_bytes,) * 2
    if recipe == "auto":
        items = [item for item in items_of(graph, FORMS) if item.name not in keep_float]
        saved = [
            min(f.weight_bytes(graph, i) for f in i.forms) - FORMS[0].weight_bytes(graph, i) for i in items
        ]
        return graph.weight_bytes + sum(saved), graph.weight_bytes
    least = most = graph.weight_bytes
    for item, form in _forms(graph, kind, recipe, group_size or 32, symmetric):
        if item.name in keep_float:
            continue
        change = form.weight_bytes(graph, item) - graph.weights[item.weight].nbytes
        least += change
        most += change
    if kind == "image" and recipe == "int4":
        # The share of them that keeps 8 bits is chosen by what it loses; whole layers only.
        narrow = [
            graph.weights[Layer(n)["weight"].target].numel()
            for n in graph.calls(ops.conv2d.default)
            if can_have_4_bits(graph, n) and layer_name(Layer(n)) not in keep_float
        ]
        most += int(EIGHT_BIT_SHARE * sum(narrow)) // 2 + 4
        least += 4 if len(narrow) > 1 else 0  # the scale of 1 that packed codes share
    if kind == "image" and recipe in ("int8", "int4"):
        # Which layers stand out, and stay in float, is measured; and each float reader of an int8 edge takes a scale.
        convolutions = list(graph.calls(ops.conv2d.default))
        floats = sorted((graph.weights[Layer(n)["weight"].target].nbytes for n in convolutions), reverse=True)
        most += int(sum(floats) * FLOAT_BUDGET) + 8 * len(convolutions) + (floats[0] if floats else 0)
    return least, most


def _forms(graph: Graph, kind: str, recipe: str, size: int, symmetric: bool) -> list[tuple[Item, Form]]:
    """The form that a recipe gives to each layer it changes."""
    native, grouped = Native(), Grouped(recipe, 4 if recipe == "int4" else 8, size, 16, symmetric)
    convolution = {"int8": ConvInt8("int8", 8), "int4": ConvInt8("int4", 4)}.get(recipe)
    if kind == "image" and recipe == "int4":
        recipe = "int8"  # of dense layers
    tables = {node.args[0].target for node in embedding.large_tables(graph)}
    found = []
    for item in items_of(graph, [Form(), *FORMS], least=0):
        form: Form | None = None
        if item.kind == "table":
            form = _table(graph, item, recipe) if item.weight in tables else None
        elif item.kind == "conv":
            form = convolution
            if form is not None and not form.fits(graph, item):
                form = ConvInt8("int8", 8)
        elif recipe == "int8":
            form = Int8()
        elif recipe == "native":
            form = native if native.fits(graph, item) else None
        elif graph.weights[item.weight].shape[1] % 32 == 0:
            tied = item.weight in tables
            exact = tied and native.fits(graph, item) and graph.native[item.weight].bits == 8
            form = native if exact else Grouped("int8", 8, 32, 16) if tied else grouped
        if form is not None:
            found.append((item, form))
    return found


def _table(graph: Graph, item: Item, recipe: str) -> Form | None:
    if recipe == "int8":
        return Table("int8", 8, 0)
    if item.weight in graph.native:
        return Native()
    return None if recipe == "native" else Grouped("int8", 8, 32, 16)


# --- memory ---------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of this process that lie in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


def most_resident() -> int:
    """The most that :func:`resident` has been."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return resident()


def available() -> int:
    """Bytes that this process could hold: free memory and caches of the machine, or what its container has left."""
    fields = {
        line.split(":")[0]: int(line.split()[1]) << 10
        for line in Path("/proc/meminfo").read_text().splitlines()
    }
    room = fields["MemAvailable"]
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            room = min(room, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue  # no container, or "max"
    return resident() + max(room, 0)


def live_bytes(graph: Graph, inputs: tuple[Tensor, ...], outputs: bool = True, kept: bool = False) -> int:
    """The most bytes of intermediate results that are alive at once while ``graph.run`` evaluates these inputs.

    Shapes only: nothing is computed. outputs: whether they count. kept: every result lives to the end.
    """
    shapes = Graph(graph.fx, {name: w.to("meta") for name, w in graph.weights.items()})
    sizes: dict[int, int] = {}  # storage -> bytes
    of: dict[Any, list[int]] = {}
    weights = {w.untyped_storage()._cdata for w in shapes.weights.values()}
    held: list[Any] = []  # a storage that is freed could lend its number to the next

    def observe(node: Any, args: tuple, kwargs: dict, result: Any) -> None:
        parts = result if isinstance(result, tuple | list) else [result]
        held.extend(parts)
        tensors = [t for t in parts if isinstance(t, Tensor)]
        of[node] = [t.untyped_storage()._cdata for t in tensors]
        for t in tensors:
            if t.untyped_storage()._cdata not in weights:
                sizes[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()

    given = [x.to("meta") for x in inputs]
    held.extend(given)
    shapes.run(*given, observe=observe)
    if kept:
        return sum(sizes.values())
    last, users, alive, most = last_uses(graph.fx), {}, set(), 0
    for numbers in of.values():
        for number in numbers:
            users[number] = users.get(number, 0) + 1
    final = {x for node in graph.outputs if node in of for x in of[node]}
    for node in graph.calls():
        alive |= {number for number in of[node] if number in sizes and (outputs or number not in final)}
        most = max(most, sum(sizes[number] for number in alive))
        for dead in last.get(node, ()):
            for number in of.get(dead, ()):
                users[number] -= 1
                if not users[number]:
                    alive.discard(number)
    return most


@dataclass(frozen=True)
class Trial:
    """One run of the float graph on the largest batch: it takes ``seconds``, needs ``transient`` bytes while it
    runs, and leaves ``base`` bytes resident, libraries and weights that a file had kept on disk included."""

    seconds: float
    transient: int
    base: int


def trial(graph: Graph, data: Any) -> Trial:
    batches = [*data.calibration, *data.held_out]
    if not batches:
        return Trial(0.0, 0, resident())
    inputs = max(batches, key=lambda batch: sum(t.nbytes for t in batch))
    transient = live_bytes(graph, inputs)
    before = most_resident()
    began = time.perf_counter()
    graph.run(*(x.clone() for x in inputs))
    seconds = time.perf_counter() - began
    base, most = resident(), most_resident()
    return Trial(seconds, max(transient, most - base if most > before else 0), base)


def added_bytes(
    graph: Graph,
    kind: str,
    recipe: str,
    data: Any,
    size: int,
    run: int,
    prune: bool = False,
    distill: bool = False,
) -> dict[str, int]:
    """What each stage of a recipe holds beyond what is there after a trial run.

    size: of the plan's weights. run: what a run of the float graph needs. prune, distill: whether they come first.
    """
    dense = [graph.weights[Layer(n)["weight"].target] for n in graph.calls(ops.linear.default)]
    largest = max((w.nbytes for w in graph.weights.values()), default=0)
    trying = recipe not in ("fp32", "native")
    statistics = sum(SAMPLE_ROWS * w.shape[1] * 4 for w in dense) if trying else 0
    stages = {"calibration": run + statistics if trying else 0}
    # Errors of a weight are summed in float64: two copies of that size beside the weight restored and its error.
    stages["quantising"] = statistics + size + (5 * largest if trying else 0)
    convolutions = kind == "image" and recipe in ("int8", "int4", "auto")
    if (convolutions or prune) and data.calibration:
        # Both graphs hold what all pictures make of a layer; the rows that a layer is fitted to come to that.
        seen = data.calibration[: STATISTICS_BATCHES["image"] if recipe == "auto" else None]
        alive = live_bytes(graph, data.calibration[0], outputs=False)
        stages["rounding" if convolutions else "pruning"] = 2 * alive * len(seen) + run + size + 4 * NUMBERS
    if distill and data.calibration:
        every = live_bytes(graph, data.calibration[0], kept=True)
        stages["distilling"] = 2 * every + 4 * graph.weight_bytes
    if recipe in ("int4", "auto") and dense and data.calibration and kind != "image":
        alive = live_bytes(graph, data.calibration[0], outputs=False)
        deep = max(w.shape[1] for w in dense)
        stages["rounding"] = 2 * alive * len(data.calibration) + size // 2 + 5 * 8 * deep * deep
    if data.held_out:
        # An executor has the weights in the order of its kernels, and an arena for every shape that it meets.
        measured = {
            tuple(t.shape for t in b): b for b in (*data.held_out, *data.calibration[: len(data.held_out)])
        }
        each = SCRATCH.get(recipe, 2.5)
        arenas = sum(
            live_bytes(graph, inputs) + each * _multiplied(graph, inputs) for inputs in measured.values()
        )
        arenas = min(arenas, 2 << 30)
        output = _output_bytes(graph, data.held_out[0])
        stages["measuring"] = 2 * size + arenas + run + (3 if kind == "decoder" else 1) * output
        if recipe == "auto":
            tables = [item for item in items_of(graph, FORMS) if item.kind == "table"]
            made = sum(
                FORMS[0].weight_bytes(graph, item) * 2 // 5 for item in tables
            )  # kept from plan to plan
            stages["searching"] = stages["measuring"] + statistics + made
    return {name: int(value * (1 + SLACK)) for name, value in stages.items()}


def _multiplied(graph: Graph, inputs: tuple[Tensor, ...]) -> int:
    """Elements of the inputs of all dense layers; an executor keeps a copy of each in the order of its kernels."""
    first = inputs[0]
    if first.dim() > 2:
        return 0  # pictures: a classifier's input is small
    rows = first.shape[0] if first.is_floating_point() else first.numel()
    return sum(
        rows * graph.weights[Layer(n)["weight"].target].shape[1] for n in graph.calls(ops.linear.default)
    )


def _output_bytes(graph: Graph, inputs: tuple[Tensor, ...]) -> int:
    shapes = Graph(graph.fx, {name: w.to("meta") for name, w in graph.weights.items()})
    return sum(t.nbytes for t in shapes.run(*(x.to("meta") for x in inputs)) if isinstance(t, Tensor))


# --- together ------------------------------------------------------------------------------------


def predict(
    graph: Graph, kind: str, recipe: str, data: Any, group_size: int | None, time_it: bool = True,
    symmetric: bool = False, variants: Sequence[tuple[Graph, Collection[str]]] = (), prune: bool = False,
    distill: int = 0, rotate: bool = False,
) -> Prediction:  # fmt: skip
    """For an imported model in memory; ``data``: what :class:`.calibration_data.Data` split.

    variants: the graphs that the recipe may begin with, and their layers that stay in float; none: ``graph``.
    """
    variants = variants or [(graph, ())]
    found = [bytes_of(g, kind, recipe, group_size, symmetric, kept) for g, kept in variants]
    least, most = min(x for x, _ in found), max(x for _, x in found)
    first = trial(graph, data)
    size = most if recipe != "auto" else (least + most) // 2
    stages = added_bytes(graph, kind, recipe, data, size, first.transient, prune, distill > 0)
    peak = max(first.base + max(stages.values()), most_resident())
    seconds = 0.0
    if time_it:
        turns = 2 if rotate else 1
        seconds = turns * seconds_of(graph, kind, recipe, data, most, first.seconds)
        if prune:
            seconds += pruning_seconds(graph, data, first.seconds)
        seconds += 3 * distill * first.seconds
    notes = [f"most memory while {max(stages, key=stages.__getitem__)}"]
    if least != most:
        notes.append("what the layers need is measured by the work itself: the bytes are a range")
    return Prediction(recipe, (least, most), seconds, peak, available(), notes)


def refuse_without_memory(prediction_peak: int, room: int) -> None:
    """Raises UnsupportedError when a compression would need more memory than there is."""
    if prediction_peak > room:
        raise UnsupportedError(
            f"memory: about {prediction_peak / 1e9:.2f} GB would be needed, {room / 1e9:.2f} GB are available; "
            "give fewer or smaller batches of data, another recipe, or a machine with more memory"
        )


def release() -> None:
    """Gives freed memory back to the system: glibc keeps blocks below 32 MB, and graph runs free many of them."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
