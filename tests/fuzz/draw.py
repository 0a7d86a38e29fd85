"""What a case is made of, drawn from a seed: sizes, dtypes, layouts, values, and spoilt arguments."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from .memory import Memory

SIZES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)
PRIMES = (5, 11, 13, 19, 23, 29, 37, 67, 97, 131)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
BYTES = (torch.int8, torch.uint8)
DTYPES = (
    *FLOATS, *BYTES, torch.float64, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64,
)  # fmt: skip
ACTIVATIONS = ("none", "relu", "relu6", "hardswish", "silu", "gelu", "gelu_tanh")
INTS = (-1, 0, 1, 2, 3, 5, 7, 32, 48, 255, 256, -128, -129, 1 << 20, 1 << 31, (1 << 63) - 1, -(1 << 63))
NUMBERS = (
    0.0, -0.0, 1.0, -1.0, 0.37, 1e-30, 1e-42, 1e-60, 1e39, 1e300, -1e39,
    float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
STRINGS = ("", "none", "tanh", "relu", "RELU", "gelu_tanh ", "swish", "Q4_0", "x" * 300, "nul\0", "é")

_POOL = 1 << 18
_generator = torch.Generator().manual_seed(20)
_normal = torch.randn(_POOL, generator=_generator)
_integers = torch.randint(0, 256, (_POOL,), generator=_generator, dtype=torch.int32)


class Draw(random.Random):
    """The random choices of one case, and the guarded memory that its tensors live in."""

    def __new__(cls, seed: str, memory: Memory):
        return super().__new__(cls)

    def __init__(self, seed: str, memory: Memory):
        super().__init__(seed)
        self.memory = memory

    def chance(self, p: float) -> bool:
        return self.random() < p

    def size(self, most: int = 131, empty: float = 0.03) -> int:
        if self.chance(empty):
            return 0
        return min(self.choice(PRIMES if self.chance(0.25) else SIZES), most)

    def leading(self, last: int, budget: int = 8192) -> list[int]:
        """Zero to three leading sizes, such that the tensor stays small."""
        sizes: list[int] = []
        room = max(1, budget // max(last, 1))
        for _ in range(self.choice((0, 1, 1, 1, 1, 2, 2, 3))):
            n = self.size(max(1, room))
            sizes.append(n)
            room //= max(n, 1)
        self.shuffle(sizes)
        return sizes

    def floating(self) -> torch.dtype:
        return self.choice(FLOATS)

    def tensor(
        self, sizes, dtype: torch.dtype, *, layout: str | None = None, nonfinite: float = 0.0,
        scale: float = 1.0, low: int = -128, high: int = 127, positive: bool = False,
    ) -> Tensor:  # fmt: skip
        """Random values in a random layout, flush against a guard page.

        scale multiplies normal values, low and high bound integers, nonfinite is the chance of NaN and
        infinities somewhere.
        """
        t = self.empty(sizes, dtype, layout)
        self.fill(t, nonfinite=nonfinite, scale=scale, low=low, high=high, positive=positive)
        return t

    def empty(self, sizes, dtype: torch.dtype, layout: str | None = None) -> Tensor:
        sizes = tuple(sizes)
        layout = layout or self.choice(("contiguous",) * 4 + ("permuted", "strided", "rows", "expanded"))
        strides = self._strides(sizes, layout)
        extent = 1 + sum((n - 1) * s for n, s in zip(sizes, strides) if n > 1)
        if not self.memory.fits(extent, dtype):
            strides = self._strides(sizes, "contiguous")
        front = self.chance(0.4)
        t = self.memory.place(sizes, strides, dtype, front, self.choice((0, 0, self.randrange(16))))
        return t

    def _strides(self, sizes: tuple[int, ...], layout: str) -> tuple[int, ...]:
        order = list(range(len(sizes)))
        if layout == "permuted":
            self.shuffle(order)
        if layout == "channels_last" and len(sizes) == 4:
            order = [0, 2, 3, 1]
        strides = [0] * len(sizes)
        step = self.choice((2, 3)) if layout == "strided" else 1
        for position, d in enumerate(reversed(order)):
            strides[d] = step
            step *= max(sizes[d], 1)
            if layout == "rows" and position == 0:
                step += self.randrange(1, 20)
        if layout == "expanded":
            for d in range(len(sizes)):
                if self.chance(0.5):
                    strides[d] = 0
        if layout != "contiguous":
            for d, n in enumerate(sizes):  # the stride of a size of one says nothing
                if n == 1 and self.chance(0.5):
                    strides[d] = self.choice((0, 1, 7, 1 << 40))
        return tuple(strides)

    def fill(self, t: Tensor, *, nonfinite=0.0, scale=1.0, low=-128, high=127, positive=False) -> None:
        if t.numel() == 0:
            return
        single = t[tuple(slice(0, 1) if s == 0 else slice(None) for s in t.stride())] if t.dim() else t
        n = single.numel()
        at = self.randrange(_POOL - n) if n < _POOL else 0
        if t.is_floating_point() or t.is_complex():
            values = _normal[at : at + n] * scale
            if positive:
                values = values.abs() + 0.01 * scale
            if self.chance(0.05):
                values = torch.zeros(n)
            if self.chance(nonfinite):
                for _ in range(self.choice((1, 1, 2, n))):
                    values[self.randrange(n)] = self.choice((float("nan"), float("inf"), float("-inf")))
        else:
            values = _integers[at : at + n] % (high - low + 1) + low
        single.copy_(values.view(single.shape))

    def out(self, sizes, dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
        """A destination that holds rubbish."""
        t = self.empty(sizes, dtype, layout)
        self.fill(t, scale=1e4)
        return t


def _spoilt_tensor(draw: Draw, t: Tensor) -> Tensor:
    sizes = list(t.shape)
    kind = draw.choice(("dtype", "length", "length", "rank", "rank", "values", "empty"))
    dtype = draw.choice(DTYPES) if kind == "dtype" else t.dtype
    if kind == "length" and sizes:
        d = draw.randrange(len(sizes))
        sizes[d] = max(0, draw.choice((sizes[d] + 1, sizes[d] - 1, 1, 2 * sizes[d], sizes[d] // 2)))
    elif kind == "rank":
        sizes = draw.choice(([], sizes[1:], sizes[:-1], [1, *sizes], [*sizes, 1], [t.numel()], [1] * 9))
    elif kind == "empty":
        sizes = [0] if draw.chance(0.5) or not sizes else [*sizes[:-1], 0]
    n = 1
    for size in sizes:
        n *= size
    if not draw.memory.fits(n, dtype):
        return t
    spoilt = draw.empty(sizes, dtype)
    draw.fill(spoilt, nonfinite=0.5, scale=draw.choice((1.0, 1e3)), low=draw.choice((-128, 0, -5)), high=127)
    return spoilt


def spoil(draw: Draw, arguments: dict[str, Any]) -> None:
    """Changes one argument to something that is probably illegal."""
    name = draw.choice(list(arguments))
    value = arguments[name]
    tensors = [t for n, t in arguments.items() if isinstance(t, Tensor) and n != name]
    if isinstance(value, Tensor) and name == "out" and draw.chance(0.5):
        kind = draw.choice(("alias", "layout", "dtype"))
        if kind == "alias":
            source = draw.choice(tensors)
            extent = (source.untyped_storage().nbytes()) // value.element_size()
            start = source.data_ptr() - source.untyped_storage().data_ptr()
            start //= value.element_size()
            if source.numel() and 0 <= start <= extent - value.numel():
                flat = torch.empty(0, dtype=value.dtype).set_(source.untyped_storage())
                arguments[name] = torch.as_strided(flat, value.shape, value.stride(), start)
        elif kind == "layout":
            arguments[name] = draw.out(
                value.shape, value.dtype, draw.choice(("permuted", "rows", "expanded"))
            )
        else:
            arguments[name] = draw.out(value.shape, draw.choice(DTYPES))
    elif isinstance(value, Tensor):
        arguments[name] = _spoilt_tensor(draw, value)
    elif value is None:
        if name.endswith("dtype"):
            arguments[name] = draw.choice(DTYPES)
        elif name == "scale":  # a number that may be left out
            arguments[name] = draw.choice(NUMBERS)
        elif tensors:
            arguments[name] = _spoilt_tensor(draw, draw.choice(tensors))
    elif isinstance(value, bool):
        arguments[name] = not value
    elif isinstance(value, int):
        arguments[name] = draw.choice(INTS)
    elif isinstance(value, float):
        arguments[name] = draw.choice(NUMBERS)
    elif isinstance(value, str):
        arguments[name] = draw.choice(STRINGS)
    elif isinstance(value, torch.dtype):
        arguments[name] = draw.choice(DTYPES)
    elif isinstance(value, list):
        arguments[name] = [draw.choice(INTS) for _ in range(draw.choice((0, 2, 2, 2, 2, 1, 3)))]
