"""Runs a graph: one program per set of input shapes, kept in an LRU."""

from __future__ import annotations

import contextlib
import functools
import operator
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, fx

from .. import dispatch
from ..errors import ArgumentError, UnsupportedError
from ..graph.int4_codes import resolved
from ..graph.ir import Graph
from ..graph.plan import Plan
from . import explain as _explain
from .captured import CapturedProgram, Finish
from .cuda_graphs import CudaGraphs, is_served, layouts
from .encoding import Encoder
from .generation import Decoder
from .program import Program
from .sampling import Sampling
from .threads import default_threads, threads
from .trace import Shared, written_placeholders


class Executor:
    """Runs a plan or a graph.

    source: a ``Plan``, a ``narrowcast.graph.Graph`` or a ``torch.fx.GraphModule`` in its dialect.
    device: "cpu", "cuda", or "auto": CUDA when there is one and a backend that is proven on it, or that is asked for
        (NARROWCAST_BACKEND), serves every op of the graph. An explicit "cuda" without a CUDA device raises; nothing
        falls back in silence, and ``explain()`` names what runs how.
    threads: CPU threads of a call; default: the container's CPU quota capped by the affinity mask.
    batch_invariant: rows of a batch run one at a time, so that their results do not depend on what
        shares the batch (bit for bit), at the price of speed.
    max_programs, max_bytes: how many shapes stay prepared, and how many bytes they may hold; the
        least recently used go first.

    A call takes tensors and returns a tensor, or a tuple when the graph has several outputs; results are where the
    first input is. Inputs that the graph writes (caches) must be on the executor's device. Calls from several threads
    are serialised. On a GPU a shape is captured in a CUDA graph when it comes for the second time.
    """

    def __init__(
        self,
        source: Any,
        device: str | torch.device = "auto",
        threads: int | None = None,
        batch_invariant: bool = False,
        *,
        max_programs: int = 32,
        max_bytes: int = 2 << 30,
    ):
        if threads is not None and threads < 1:
            raise ArgumentError(f"threads must be at least 1, got {threads}")
        nodes, weights = resolved(*_contents(source))
        self.device = resolve_device(device)
        if device == "auto" and self.device.type == "cuda" and not is_served(nodes, self.device):
            self.device = torch.device("cpu")
        self.threads = threads or default_threads()
        self.batch_invariant = batch_invariant
        self.max_programs, self.max_bytes = max_programs, max_bytes
        self.kind: str = getattr(source, "kind", "generic")
        self.config: dict = getattr(source, "config", None) or {}
        self.assets: dict[str, bytes] = getattr(source, "assets", None) or {}
        #: Tokens asked for and tokens computed, padding included (decoders and encoders).
        self.waste = {"tokens": 0, "computed": 0}
        #: Captures programs; None on the CPU, whose loop needs no launches.
        self.graphs = CudaGraphs(self.device) if self.device.type == "cuda" else None
        formats = layouts(nodes, self.device) if self.graphs else None
        with self.graphs.turn() if self.graphs else contextlib.nullcontext():
            self._shared = Shared(nodes, weights, self.device, formats)
        self.source = source if self.graphs is None else _without_weights(source)
        self._programs: OrderedDict[tuple, Program | CapturedProgram] = OrderedDict()
        self._lock = threading.RLock()
        self._inputs = [n for n in self._shared.nodes.nodes if n.op == "placeholder"]
        written = written_placeholders(nodes)
        self._written = [i for i, n in enumerate(self._inputs) if n in written]
        self._placeholders = [n.name for n in self._inputs]
        self._expected = [_expected(n) for n in self._inputs]

    def __call__(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Runs the graph. Raises ArgumentError for a wrong number, rank or dtype of inputs."""
        prepared = self._prepare(inputs)
        rows = prepared[0].shape[0] if prepared and prepared[0].dim() else 1
        if self.batch_invariant and rows > 1 and self.kind in ("encoder", "image"):
            parts = [self._run([t[i : i + 1] for t in prepared]) for i in range(rows)]
            outputs = [torch.cat(column) for column in zip(*parts)]
        else:
            outputs = self._run(prepared)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    @property
    def batch_size(self) -> int | None:
        """Rows that the first input must have (files are often made for one); None: any number."""
        shape = self._expected[0][1] if self._expected else ()
        return shape[0] if shape and isinstance(shape[0], int) else None

    def _run(self, prepared: Sequence[Tensor]) -> list[Tensor]:
        with self._lock, threads(self.threads):
            return self._program(prepared).run(prepared)

    def program(self, *inputs: Tensor, finish: Finish | None = None) -> Program | CapturedProgram:
        """The program for these shapes, built when it is new. finish: see :mod:`captured`."""
        with self._lock, threads(self.threads):
            return self._program(self._prepare(inputs), finish)

    def run_program(
        self, program: Program | CapturedProgram, inputs: Sequence[Any], **options: Any
    ) -> list[Tensor]:
        """Runs what :meth:`program` returned, without checking the inputs again."""
        with self._lock, threads(self.threads):
            return program.run(inputs, **options)

    def _program(self, inputs: Sequence[Tensor], finish: Finish | None = None) -> Program | CapturedProgram:
        key: tuple = tuple((t.shape, t.dtype) for t in inputs)
        if self.graphs:
            key += (finish, dispatch.forced(), *(inputs[i].data_ptr() for i in self._written))
        program = self._programs.get(key)
        if program is None:
            if self.graphs:
                program = CapturedProgram(self._shared, inputs, self.graphs, finish)
            else:
                program = Program(self._shared, inputs)
            self._programs[key] = program
            self._trim()
        self._programs.move_to_end(key)
        return program

    def _trim(self) -> None:
        while len(self._programs) > 1 and (
            len(self._programs) > self.max_programs
            or sum(p.bytes for p in self._programs.values()) > self.max_bytes
        ):
            self._programs.popitem(last=False)[1].release()

    def _prepare(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        if len(inputs) != len(self._placeholders):
            raise ArgumentError(
                f"inputs must be {len(self._placeholders)} tensors "
                f"({', '.join(self._placeholders)}), got {len(inputs)}"
            )
        prepared = []
        for i, (name, (dtype, shape), tensor) in enumerate(zip(self._placeholders, self._expected, inputs)):
            if not isinstance(tensor, Tensor):
                raise ArgumentError(f"{name} must be a tensor, got {type(tensor).__name__}")
            if dtype is not None and (
                tensor.dtype != dtype
                or tensor.dim() != len(shape)
                or any(isinstance(n, int) and n != m for n, m in zip(shape, tensor.shape))
            ):
                sizes = ", ".join(str(n) if isinstance(n, int) else "*" for n in shape)
                raise ArgumentError(
                    f"{name} must be {_dtype(dtype)} [{sizes}], "
                    f"got {_dtype(tensor.dtype)} {list(tensor.shape)}"
                )
            tensor = tensor.detach() if tensor.requires_grad else tensor
            if tensor.device != self.device:
                if i in self._written:
                    raise ArgumentError(
                        f"{name} must be on {self.device}, since the graph writes to it, got {tensor.device}"
                    )
                if self.graphs is None:  # else a program copies it to its place
                    tensor = tensor.to(self.device)
            prepared.append(tensor)
        return prepared

    # Encoders

    @functools.cached_property
    def encoder(self) -> Encoder:
        """Tokenizer and batches of a graph of kind "encoder"."""
        return Encoder(self)

    def encode(self, texts: str | Sequence[str], batch_size: int = 32) -> Tensor:
        """One row per text: [N, H] of a pooling encoder, else hidden states [N, S, H], zero behind the end.

        Texts are sorted by length and padded, under the mask, to the next multiple of 16 tokens. One text
        (a str) gives its row alone.
        """
        single = isinstance(texts, str)
        rows = self.encoder.encode([texts] if single else texts, batch_size)
        return rows[0] if single else rows

    # Decoders

    @functools.cached_property
    def decoder(self) -> Decoder:
        """Tokenizer, caches and generation of a graph of kind "decoder"."""
        return Decoder(self)

    def generate(
        self,
        prompt: Any,
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> Iterator[Any]:
        """Yields text pieces as they become certain; together they are the answer.

        prompt: a text, a list of messages ({"role", "content"}; the model's chat template applies), or
            token ids. A list of texts, of message lists or of id lists is a batch: then (index, piece)
            is yielded. Every sequence gets what it would get alone.
        max_new_tokens: per sequence; default: until the model ends it or its positions are used up.
        temperature, top_k, top_p, seed: see :class:`narrowcast.runtime.sampling.Sampling`; the default
            takes the most likely token.
        stop: generation ends before any of these strings.

        Raises ArgumentError, or UnsupportedError for a graph that is no decoder or has no tokenizer.
        """
        prompts, batch = self._prompts(prompt)
        sampling = Sampling(temperature, top_k, top_p, seed)
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        pieces = self.decoder.texts(prompts, sampling, max_new_tokens, stop)
        return pieces if batch else (piece for _, piece in pieces)

    def generate_ids(
        self,
        prompt: Any,
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        eos: Sequence[int] | None = None,
    ) -> Iterator[Any]:
        """Like :meth:`generate`, but yields token ids, or (index, id) for a batch.

        eos: ids that end a sequence (they are not yielded); default: the model's.
        """
        prompts, batch = self._prompts(prompt)
        sampling = Sampling(temperature, top_k, top_p, seed)
        ends = None if eos is None else frozenset(eos)
        tokens = self.decoder.tokens(prompts, sampling, max_new_tokens, eos=ends)
        return tokens if batch else (token for _, token in tokens)

    def logits(self, ids: Tensor) -> Tensor:
        """Logits float32 [B, S, V] of every position of ids [B, S]; for evaluation."""
        return self.decoder.logits(ids)

    def _prompts(self, prompt: Any) -> tuple[list[list[int]], bool]:
        batch = (
            isinstance(prompt, (list, tuple))
            and len(prompt) > 0
            and isinstance(prompt[0], (str, list, tuple, Tensor))
        )
        prompts = prompt if batch else [prompt]
        return [self.decoder.encode(p) for p in prompts], batch

    def cache_layout(self) -> list[tuple[torch.dtype, int, int | None]]:
        """(dtype, Hkv, D) of every cache input of a decoder, D None for scales."""
        layout = []
        for name, (dtype, shape) in list(zip(self._placeholders, self._expected))[3:]:
            if len(shape) not in (3, 4) or any(isinstance(n, str) for n in shape[1:2] + shape[3:]):
                raise UnsupportedError(f"{name} must be a cache [B, heads, C, D], got {list(shape)}")
            layout.append((dtype, int(shape[1]), int(shape[3]) if len(shape) == 4 else None))
        return layout

    # What runs, and at what cost

    def explain(self, *inputs: Tensor) -> _explain.Explanation:
        """Every node for these inputs' shapes: backend and why, precision, bytes, MACs, source."""
        return _explain.explain(self.program(*inputs))

    def profile(self, *inputs: Tensor, repeats: int = 20, warmup: int = 3) -> _explain.Profile:
        """Milliseconds, GB/s and GMAC/s of every step, medians of `repeats` runs."""
        with self._lock, threads(self.threads), torch.no_grad():
            prepared = self._prepare(inputs)
            program = self._program(prepared)
            times = []
            for _ in range(warmup + repeats):
                times.append(program.run_timed(prepared))
            return _explain.profile(program, [median(t) for t in zip(*times[warmup:])])

    def memory(self, *inputs: Tensor) -> dict[str, int]:
        """Exact bytes for these inputs' shapes.

        arena: every intermediate result and copied input; lower_bound: the least any plan needs;
        scratch: buffers of the steps; folded: precomputed results; weights: the graph's parameters;
        packed: their copies in the order of the kernels, made so far; programs: all prepared shapes.
        """
        return self.program(*inputs).memory() | {
            "packed": self._shared.packed.bytes + self._shared.prepared.bytes,
            "weights": self._shared.weight_bytes,
            "programs": sum(p.bytes for p in self._programs.values()),
        }


def resolve_device(device: str | torch.device) -> torch.device:
    """The device of a name. Raises ArgumentError, or UnsupportedError where there is none."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ArgumentError(f'device must be "auto", "cpu" or "cuda", got {device!r}') from error
    if resolved.type not in ("cpu", "cuda"):
        raise ArgumentError(f'device must be "auto", "cpu" or "cuda", got {device!r}')
    if resolved.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UnsupportedError(
            "device must be one this machine has, got cuda: torch sees no CUDA device "
            f"(torch {torch.__version__})"
        )
    return torch.device("cuda", torch.cuda.current_device() if resolved.index is None else resolved.index)


def _contents(source: Any) -> tuple[fx.Graph, dict[str, Tensor]]:
    """Nodes and weights of a Plan, a Graph or a GraphModule."""
    if isinstance(source, fx.GraphModule):
        names = {n.target for n in source.graph.nodes if n.op == "get_attr"}
        return source.graph, {name: operator.attrgetter(name)(source) for name in names}
    graph = source if isinstance(source, Graph) else getattr(source, "graph", None)
    if not isinstance(graph, Graph):
        raise ArgumentError(
            f"source must be a Plan, a Graph or a torch.fx.GraphModule, got {type(source).__name__}"
        )
    return graph.fx, graph.weights


def _without_weights(source: Any) -> Any:
    """What an executor keeps of a plan when its weights are elsewhere: not the canonical ones a second time."""
    if isinstance(source, Plan):
        return replace(source, graph=_without_weights(source.graph))
    return Graph(source.fx, {}) if isinstance(source, Graph) else source


def _expected(node: fx.Node) -> tuple[torch.dtype | None, Sequence[Any]]:
    """dtype and sizes of an input, sizes that vary as anything but int; (None, ()) when unknown."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape)
    return node.meta.get("dtype"), node.meta.get("shape", ())


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
