"""What the Triton kernels share: rounding, activations, the epilogue, launching, and what to compile ahead of time.

The numerics are those of epilogue.h: products and sums in the written order, never fused (every launch
passes ``enable_fp_fusion=False``), divisions exact, so that the same bits come from every backend.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning

TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
}

# In a kernel


@triton.jit
def round_half_even(v):
    """Of |v| up to 2^22: above 1.5 * 2^23 the spacing of float32 is 1."""
    return (v + 12582912.0) - 12582912.0


@triton.jit
def clamp(v, LOW: tl.constexpr, HIGH: tl.constexpr):
    return tl.minimum(tl.maximum(v, LOW), HIGH)


@triton.jit
def is_finite(v):
    return tl.abs(v) < float("inf")  # not so for NaN either


@triton.jit
def codes(v, zero_point, LOW: tl.constexpr, HIGH: tl.constexpr):
    """saturate(round_half_even(v) + zero_point) as int32; NaN becomes the zero point."""
    v = tl.where(v == v, v, 0.0)
    return clamp(round_half_even(clamp(v, -1024.0, 1024.0)).to(tl.int32) + zero_point, LOW, HIGH)


@triton.jit
def scale_of(range_, LEVELS: tl.constexpr):
    """range / LEVELS, or 1 where that is below the smallest normal float32."""
    scale = tl.div_rn(range_, LEVELS + tl.zeros_like(range_))
    return tl.where(scale >= 1.1754943508222875e-38, scale, 1.0)


@triton.jit
def inverse_of(scale):
    return tl.div_rn(1.0 + tl.zeros_like(scale), scale)


@triton.jit
def sigmoid(v):
    return 1.0 / (1.0 + tl.exp(-v))


@triton.jit
def activate(v, ACTIVATION: tl.constexpr):
    """The formulas of activation.h on float32; comparisons are written so that NaN stays NaN."""
    if ACTIVATION == "relu":
        v = tl.where(v < 0, 0.0, v)
    elif ACTIVATION == "relu6":
        v = tl.where(v < 0, 0.0, tl.where(v > 6, 6.0, v))
    elif ACTIVATION == "hardswish":
        gate = v + 3.0
        gate = tl.where(gate < 0, 0.0, tl.where(gate > 6, 6.0, gate))
        v = v * gate * 0.16666667163372040
    elif ACTIVATION == "silu":
        v = v * sigmoid(v)
    elif ACTIVATION == "gelu":
        v = 0.5 * v * (1.0 + tl.erf(v * 0.70710678118654752))
    elif ACTIVATION == "gelu_tanh":  # 0.5 (1 + tanh(u)) = sigmoid(2 u)
        v = v * sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
    return v


@triton.jit
def finish(
    v, m, n, in_m, in_n, bias, residual, out, ld_residual, ld_out, inverse_out_scale, out_zero_point,
    ACTIVATION: tl.constexpr, POST_ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Epilogue of a tile: v float32 [M, N] = acc * scales, rows m (int64) and columns n of the result.

    bias [N] and residual [M, N] may be None. An int8 or uint8 ``out`` is requantised.
    """
    inside = in_m[:, None] & in_n[None, :]
    if bias is not None:
        v = v + tl.load(bias + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    v = activate(v, ACTIVATION)
    if residual is not None:
        at = residual + m[:, None] * ld_residual + n[None, :]
        v = v + tl.load(at, mask=inside, other=0.0).to(tl.float32)
    v = activate(v, POST_ACTIVATION)
    store(out + m[:, None] * ld_out + n[None, :], v, inside, inverse_out_scale, out_zero_point)


@triton.jit
def store(at, v, inside, inverse_out_scale, out_zero_point):
    """float32 to what the pointers point to, requantised for int8 and uint8."""
    if at.dtype.element_ty == tl.int8:
        tl.store(at, codes(v * inverse_out_scale, out_zero_point, -127, 127).to(tl.int8), mask=inside)
    elif at.dtype.element_ty == tl.uint8:
        tl.store(at, codes(v * inverse_out_scale, out_zero_point, 0, 255).to(tl.uint8), mask=inside)
    else:
        tl.store(at, v.to(at.dtype.element_ty), mask=inside)


@triton.jit
def tile_of(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Tile number -> (row, column) in strips of GROUP_M rows, whose operands stay in the L2 cache."""
    strip = GROUP_M * tiles_n
    first = tile // strip * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    return first + tile % strip % height, tile % strip // height


# Launching


@dataclass(frozen=True)
class Config:
    """One way to cut the work; its constants are keyword arguments of the kernel."""

    constants: tuple[tuple[str, Any], ...]
    num_warps: int = 4
    num_stages: int = 2

    @staticmethod
    def of(num_warps: int = 4, num_stages: int = 2, **constants: Any) -> Config:
        return Config(tuple(constants.items()), num_warps, num_stages)

    def options(self) -> dict[str, Any]:
        return {**dict(self.constants), "num_warps": self.num_warps, "num_stages": self.num_stages}

    def __getitem__(self, constant: str) -> Any:
        return dict(self.constants)[constant]

    def __str__(self) -> str:
        return " ".join(f"{k}={v}" for k, v in self.options().items())


def interpreted() -> bool:
    """Whether kernels run on the CPU, by TRITON_INTERPRET=1."""
    return triton.knobs.runtime.interpret


def launch(kernel, grid: tuple[int, ...], *arguments: Any, on: Tensor, **options: Any) -> None:
    """Starts a kernel on the device of a tensor. Without fused products unless the caller asks for them."""
    options.setdefault("enable_fp_fusion", False)
    here = torch.cuda.device(on.device) if on.is_cuda else contextlib.nullcontext()
    with here:
        kernel[grid](*arguments, **options)


def tuned(kernel, key: Sequence[Any], configs: Sequence[Config], run: Callable[[Config], Any], on: Tensor):
    """Runs the config that was measured to be the fastest for this key on this GPU model.

    Outside the kernel, because the interpreter knows no autotuner. A changed kernel starts afresh. Keep keys few: shape
    classes, not shapes.
    """
    config = configs[0]
    if len(configs) > 1 and on.is_cuda:
        label = f"{kernel.__name__}-{source_hash(kernel)}-{triton.__version__}"
        config = tuning.choose(" ".join(map(str, (label, *key))), configs, run, on.device)
    return run(config)


def source_hash(kernel) -> str:
    return hashlib.sha256(kernel.src.encode()).hexdigest()[:12]


def multiprocessors(on: Tensor) -> int:
    return torch.cuda.get_device_properties(on.device).multi_processor_count if on.is_cuda else 4


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


# Ahead of time

_TYPE = re.compile(r"(\*?(?:i|u|fp|bf)\d+)(:16)?$")


@dataclass(frozen=True)
class Ahead:
    """A specialisation that ``tools/gates.py triton`` compiles for sm_80, sm_90 and sm_100.

    arguments: name -> type ("*fp16", "i32", "fp32"; "i32:16" for a multiple of 16) or the value of a constant. Pointers are
    taken to be multiples of 16. tensor_cores: such an instruction must appear; a name of a type, such as "s8": and
    every one multiplies that. registers: the most a thread may use. architectures:
    where its tile is used.
    """

    kernel: Any
    arguments: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    tensor_cores: bool | str = False
    wide_loads: bool = False
    registers: int = 255
    fp_fusion: bool = False
    architectures: tuple[int, ...] = (80, 90, 100)

    def is_type(self, value: Any) -> bool:
        return isinstance(value, str) and _TYPE.match(value) is not None

    @property
    def label(self) -> str:
        types = [v for v in self.arguments.values() if self.is_type(v) and v.startswith("*")]
        return f"{self.kernel.__name__}({', '.join(types[:3])})"

    def signature(self) -> dict[str, str]:
        given = self.arguments
        unknown = sorted(set(given) ^ set(self.kernel.arg_names))
        if unknown:
            raise ValueError(f"{self.kernel.__name__}: arguments differ from the kernel's: {unknown}")
        return {
            name: _TYPE.match(given[name])[1] if self.is_type(given[name]) else "constexpr"
            for name in self.kernel.arg_names
        }

    def constants(self) -> dict[str, Any]:
        return {name: value for name, value in self.arguments.items() if not self.is_type(value)}

    def divisible(self) -> dict[tuple[int, ...], list]:
        aligned = {}
        for i, name in enumerate(self.kernel.arg_names):
            value = self.arguments[name]
            if self.is_type(value) and (value.startswith("*") or value.endswith(":16")):
                aligned[(i,)] = [["tt.divisibility", 16]]
        return aligned


def ahead(kernel, arguments: dict[str, Any], config: Config | None = None, **options: Any) -> Ahead:
    """An :class:`Ahead`; the constants of a config are added to the arguments."""
    if config is None:
        return Ahead(kernel, arguments, **options)
    arguments = {**arguments, **dict(config.constants)}
    return Ahead(kernel, arguments, config.num_warps, config.num_stages, **options)
