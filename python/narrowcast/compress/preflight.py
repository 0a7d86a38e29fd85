"""What a compression would need and make, before it is done: bytes of the plan, time, and the peak of memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Sequence
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
from .calibrate import SAMPLE_ROWS
from .cnn import FLOAT_BUDGET, absorb_padding
from .forms import FORMS, ConvInt8, Form, Grouped, Int8, Item, Native, Table, items_of
from .gptq import INT4, round_weight

aten = torch.ops.aten
ops = torch.ops.narrowcast

_PAGE = os.sysconf("SC_PAGE_SIZE")
#: What an allocator and torch's own buffers add to the memory that is counted here, as a share of it.
SLACK = 0.05
#: Bytes that the steps of an executor keep per element of a dense layer's input, int8 codes or 16-bit ones (the default).
SCRATCH = {"fp32": 0.0, "int8": 1.25, "int4": 1.25}
#: Plans that a search makes and measures, as a rule.
PLANS = 5


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


def bytes_of(graph: Graph, kind: str, recipe: str, group_size: int | None) -> tuple[int, int]:
    """Bytes of the weights of the plan that a recipe makes of a float graph: least and most."""
    graph = graph.clone()
    if kind == "image":
        absorb_padding(graph)
    if recipe == "fp32":
        return (graph.weight_bytes,) * 2
    if recipe == "auto":
        items = items_of(graph, FORMS)
        saved = [
            min(f.weight_bytes(graph, i) for f in i.forms) - FORMS[0].weight_bytes(graph, i) for i in items
        ]
        return graph.weight_bytes + sum(saved), graph.weight_bytes
    least = most = graph.weight_bytes
    for item, form in _forms(graph, recipe, group_size or 32):
        change = form.weight_bytes(graph, item) - graph.weights[item.weight].nbytes
        least += change
        most += change
    if kind == "image" and recipe == "int8":
        # Which layers stand out, and stay in float, is measured; and each float reader of an int8 edge takes a scale.
        convolutions = list(graph.calls(ops.conv2d.default))
        floats = sorted((graph.weights[Layer(n)["weight"].target].nbytes for n in convolutions), reverse=True)
        most += int(sum(floats) * FLOAT_BUDGET) + 8 * len(convolutions) + (floats[0] if floats else 0)
    return least, most


def _forms(graph: Graph, recipe: str, size: int) -> list[tuple[Item, Form]]:
    """The form that a recipe gives to each layer it changes."""
    native, grouped = Native(), Grouped(recipe, 4 if recipe == "int4" else 8, size, 16)
    tables = {node.args[0].target for node in embedding.large_tables(graph)}
    found = []
    for item in items_of(graph, [Form(), *FORMS], least=0):
        form: Form | None = None
        if item.kind == "table":
            form = _table(graph, item, recipe) if item.weight in tables else None
        elif item.kind == "conv":
            form = ConvInt8("int8", 8) if recipe == "int8" else None
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


def live_bytes(graph: Graph, inputs: tuple[Tensor, ...], outputs: bool = True) -> int:
    """The most bytes of intermediate results that are alive at once while ``graph.run`` evaluates these inputs.

    Shapes only: nothing is computed. outputs: whether they count.
    """
    shapes = Graph(graph.fx, {name: w.to("meta") for name, w in graph.weights.items()})
    sizes: dict[int, int] = {}  # storage -> bytes
    of: dict[Any, list[int]] = {}
    weights = {w.untyped_storage()._cdata for w in shapes.weights.values()}
    kept: list[Any] = []  # a storage that is freed could lend its number to the next

    def observe(node: Any, args: tuple, kwargs: dict, result: Any) -> None:
        parts = result if isinstance(result, tuple | list) else [result]
        kept.extend(parts)
        tensors = [t for t in parts if isinstance(t, Tensor)]
        of[node] = [t.untyped_storage()._cdata for t in tensors]
        for t in tensors:
            if t.untyped_storage()._cdata not in weights:
                sizes[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()

    given = [x.to("meta") for x in inputs]
    kept.extend(given)
    shapes.run(*given, observe=observe)
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


def added_bytes(graph: Graph, kind: str, recipe: str, data: Any, size: int, run: int) -> dict[str, int]:
    """What each stage of a recipe holds beyond what is there after a trial run.

    size: of the plan's weights. run: what a run of the float graph needs.
    """
    dense = [graph.weights[Layer(n)["weight"].target] for n in graph.calls(ops.linear.default)]
    largest = max((w.nbytes for w in graph.weights.values()), default=0)
    trying = recipe not in ("fp32", "native")
    statistics = sum(SAMPLE_ROWS * w.shape[1] * 4 for w in dense) if trying else 0
    stages = {"calibration": run + statistics if trying else 0}
    # Errors of a weight are summed in float64: two copies of that size beside the weight restored and its error.
    stages["quantising"] = statistics + size + (5 * largest if trying else 0)
    if recipe in ("int4", "auto") and dense and data.calibration:
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


# --- time -----------------------------------------------------------------------------------------


def seconds_of(graph: Graph, kind: str, recipe: str, data: Any, bytes_plan: int, run: float) -> float:
    """From rates measured here: ``run`` seconds for the float graph, GPTQ on one layer, a search of scales."""
    if not data.calibration:
        return 0.0
    weights = [graph.weights[Layer(n)["weight"].target] for n in graph.calls(ops.linear.default)]
    weights = [w for w in weights if w.dim() == 2 and w.shape[1] % 32 == 0]
    few = min(len(data.calibration), 8) if kind == "decoder" else len(data.calibration)
    total = (
        0.6 * run * 2 * len(data.held_out) + bytes_plan / 4e8
    )  # float and plan on the held-out part; packing
    if recipe in ("int8", "int8-weight"):
        total += run * few + _search_rate() * sum(w.numel() for w in graph.weights.values())
    if recipe in ("int4", "auto") and weights:
        per = _gptq_rate(weights)
        total += 2 * run * len(data.calibration) + per * sum(w.shape[0] * w.shape[1] ** 2 for w in weights)
    if (
        recipe == "int8"
    ):  # sensitivities of convolutions, each on eight pictures, half of the graph before it reused
        total += (
            run * sum(1 for _ in graph.calls(ops.conv2d.default)) * 8 / max(len(data.calibration[0][0]), 8)
        )
    if recipe == "auto":
        total += run * few + PLANS * (0.6 * run * len(data.selection) + bytes_plan / 4e8)
        forms = [len([f for f in item.forms if not f.exact]) for item in items_of(graph, FORMS)]
        rows = 160 / 512 if kind == "decoder" else 1
        total += sum(forms) * run * rows / 2
    return total


def _search_rate() -> float:
    """Seconds per weight."""
    from .weights import int8_rows

    weight = torch.randn(256, 1024)
    began = time.perf_counter()
    int8_rows(weight)
    return (time.perf_counter() - began) / weight.numel()


def _gptq_rate(weights: Sequence[Tensor]) -> float:
    """Seconds per N * K^2, measured on a layer of a middling depth."""
    k = sorted(w.shape[1] for w in weights)[len(weights) // 2]
    n = min(256, max(w.shape[0] for w in weights))
    weight, x = torch.randn(n, k), torch.randn(2 * k, k)
    hessian = x.t() @ x / (2 * k)
    began = time.perf_counter()
    round_weight(weight, hessian, INT4, 32)
    return (time.perf_counter() - began) / (n * k * k)


def predict(
    graph: Graph, kind: str, recipe: str, data: Any, group_size: int | None, time_it: bool = True
) -> Prediction:
    """For an imported model in memory; ``data``: what :class:`narrowcast.compress.api.Data` split."""
    least, most = bytes_of(graph, kind, recipe, group_size)
    first = trial(graph, data)
    stages = added_bytes(
        graph, kind, recipe, data, most if recipe != "auto" else (least + most) // 2, first.transient
    )
    peak = max(first.base + max(stages.values()), most_resident())
    seconds = seconds_of(graph, kind, recipe, data, most, first.seconds) if time_it else 0.0
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
