"""Ops over rows: quantisers, dequantisers, norms, rope and gated activations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from narrowcast.formats import GGUF_BLOCKS
from narrowcast.kernels.dequantize import dequantize_ref
from narrowcast.kernels.gated_act import gated_act_ref
from narrowcast.kernels.norm import norm_ref
from narrowcast.kernels.quantize import quantize_ref
from narrowcast.kernels.rope import rope_ref
from tolerances import BOUND

from .draw import BYTES, FLOATS, Draw
from .spec import Arguments, Expected, Op, bad_out, is_floating, is_vector

INT8, FLOAT32 = torch.int8, torch.float32
SMALLEST = torch.finfo(FLOAT32).tiny  # with all its digits


def group_of(draw: Draw, k: int) -> int:
    divisors = [d for d in range(1, k + 1) if k % d == 0]
    return draw.choice(divisors) if divisors and draw.chance(0.5) else 0


def bad_group(size: int, k: int) -> bool:
    return size < 0 or (size > 0 and k % size != 0)


def is_rows(x: Tensor) -> bool:
    return is_floating(x) and x.dim() >= 1


def draw_rows(draw: Draw, dtype: torch.dtype, nonfinite: float = 0.0) -> Tensor:
    k = draw.size()
    scale = draw.choice((1.0, 1.0, 30.0, 1e-3, 1e-40 if dtype == FLOAT32 else 1e-6))
    return draw.tensor([*draw.leading(k), k], dtype, nonfinite=nonfinite, scale=scale)


def without_values(x: Tensor) -> bool:
    return x.numel() == 0


# quantize


def quantize_faults(a: Arguments) -> set[str]:
    x = a["x"]
    if not is_rows(x):
        return {"x"}
    faults = {"group_size"} if bad_group(a.get("group_size", 0), x.shape[-1]) else set()
    if a["strict"] and not bool(x.isfinite().all()):
        faults.add("x")
    return faults


def expect_int8(x: Tensor, group_size: int) -> list[Expected]:
    shape = x.shape[:-1] if group_size == 0 else (*x.shape[:-1], x.shape[-1] // group_size)
    if without_values(x):
        return [Expected(torch.ones(x.shape), INT8), Expected(torch.ones(shape), FLOAT32)]
    q, scale = quantize_ref.quantize_int8(x, group_size)
    return [Expected(q, INT8), Expected(scale, FLOAT32)]


def expect_asymmetric(a: Arguments) -> list[Expected]:
    x = a["x"]
    if without_values(x):  # a row without values has the scale of a row of zeros
        q, scale = torch.ones(x.shape), torch.ones(x.shape[:-1])
        return [
            Expected(q, INT8), Expected(scale, FLOAT32), Expected(scale * -128, torch.int32),
        ]  # fmt: skip
    results = quantize_ref.quantize_int8_asymmetric(x)
    return [Expected(r, d) for r, d in zip(results, (INT8, FLOAT32, torch.int32))]


def static_faults(a: Arguments) -> set[str]:
    faults = set()
    if not is_floating(a["x"]):
        faults.add("x")
    if a["dtype"] not in BYTES:
        return faults | {"dtype"}
    low = -128 if a["dtype"] == INT8 else 0
    if not low <= a["zero_point"] <= low + 255:
        faults.add("zero_point")
    scale = torch.tensor(a["scale"], dtype=FLOAT32)
    if not (scale.isfinite() and scale != 0 and (1 / scale).isfinite()):
        faults.add("scale")
    if not faults and a["strict"] and not bool(a["x"].isfinite().all()):
        faults.add("x")
    return faults


def draw_static(draw: Draw) -> Arguments:
    dtype = draw.choice(BYTES)
    return {
        "x": draw_rows(draw, draw.floating(), 0.2),
        "scale": draw.choice((0.01, 0.1, 1.0, -0.05, 1e-10, 3e20)),
        "zero_point": draw.randint(-128, 127) if dtype == INT8 else draw.randint(0, 255),
        "dtype": dtype,
        "strict": draw.chance(0.1),
    }


# dequantize


def draw_int8(draw: Draw) -> Arguments:
    k = draw.size()
    leading = draw.leading(k)
    group = group_of(draw, k)
    sizes = [*leading, k // group] if group else leading if draw.chance(0.8) else []
    return {
        "q": draw.tensor([*leading, k], draw.choice(BYTES), high=127),
        "scale": draw.tensor(sizes, FLOAT32, nonfinite=0.1),
        "zero_point": draw.tensor(sizes, torch.int32) if draw.chance(0.5) else None,
        "group_size": group,
        "out_dtype": draw.floating(),
    }


def int8_faults(a: Arguments) -> set[str]:
    q, scale, zero, group = a["q"], a["scale"], a["zero_point"], a["group_size"]
    if q.dtype not in BYTES or q.dim() < 1:
        return {"q"}
    k = q.shape[-1]
    if bad_group(group, k):
        return {"group_size"}
    faults = set()
    shape = (*q.shape[:-1], k // group) if group else q.shape[:-1]
    if scale.dtype != FLOAT32 or not (scale.shape == shape or (scale.dim() == 0 and group == 0)):
        faults.add("scale")
    if zero is not None and (zero.dtype != torch.int32 or zero.shape != scale.shape):
        faults.add("zero_point")
    if a["out_dtype"] not in FLOATS:
        faults.add("out_dtype")
    return faults


def expect_dequantized(a: Arguments) -> list[Expected]:
    if without_values(a["q"]):
        return [Expected(torch.zeros(a["q"].shape), a["out_dtype"])]
    a = dict(a)
    if a["scale"].dim() == 0 and a["q"].dim() > 1:
        a["scale"] = a["scale"].expand(a["q"].shape[:-1])
        a["zero_point"] = None if a["zero_point"] is None else a["zero_point"].expand(a["q"].shape[:-1])
    return [Expected(dequantize_ref.dequantize_int8(**a), a["out_dtype"])]


def draw_groups(draw: Draw) -> Arguments:
    bits, n = draw.choice((4, 8)), draw.size()
    group = draw.choice((2, 4, 6, 32, 32, 64, 10)) if bits == 4 else draw.choice((1, 3, 7, 32, 64))
    count = draw.randint(0, 4)
    dtype = draw.choice((FLOAT32, torch.float16))
    return {
        "packed": draw.tensor([n, group * count * bits // 8], draw.choice(BYTES), low=0, high=127),
        "scale": draw.tensor([n, count], dtype, nonfinite=0.1),
        "offset": draw.tensor([n, count], dtype) if draw.chance(0.5) else None,
        "group_size": group,
        "bits": bits,
        "out_dtype": draw.floating(),
    }


def grouped_weight_faults(a: Arguments, unit: int = 0) -> set[str]:
    """The faults of (packed, scale, offset, group_size, bits); group_size a multiple of ``unit`` if given."""
    packed, scale, offset, group, bits = (a[n] for n in ("packed", "scale", "offset", "group_size", "bits"))
    if bits not in (4, 8):
        return {"bits"}
    if packed.dtype not in BYTES or packed.dim() != 2:
        return {"packed"}
    n, k = packed.shape[0], packed.shape[1] * 8 // bits
    if group <= 0 or k % group or group % (unit or (2 if bits == 4 else 1)):
        return {"group_size"}
    faults = set()
    if scale.dtype not in (FLOAT32, torch.float16) or scale.shape != (n, k // group):
        faults.add("scale")
    if offset is not None and (offset.dtype != scale.dtype or offset.shape != (n, k // group)):
        faults.add("offset")
    return faults


def groups_faults(a: Arguments) -> set[str]:
    return grouped_weight_faults(a) | (set() if a["out_dtype"] in FLOATS else {"out_dtype"})


def draw_gguf(draw: Draw) -> Arguments:
    kind = draw.choice(list(GGUF_BLOCKS))
    row = GGUF_BLOCKS[kind][1] * draw.randint(0, 3)
    sizes = [*draw.leading(row, 2048), row]
    return {
        "blocks": draw.tensor(sizes, torch.uint8, low=0, high=255),
        "type": kind,
        "out_dtype": draw.floating(),
    }


def gguf_faults(a: Arguments) -> set[str]:
    blocks = a["blocks"]
    faults = set() if a["out_dtype"] in FLOATS else {"out_dtype"}
    if a["type"] not in GGUF_BLOCKS:
        return faults | {"type"}
    if blocks.dtype != torch.uint8 or blocks.dim() < 1 or blocks.shape[-1] % GGUF_BLOCKS[a["type"]][1]:
        faults.add("blocks")
    return faults


def expect_gguf(a: Arguments) -> list[Expected]:
    blocks, (elements, size) = a["blocks"], GGUF_BLOCKS[a["type"]]
    if without_values(blocks):
        shape = (*blocks.shape[:-1], blocks.shape[-1] // size * elements)
        return [Expected(torch.zeros(shape), a["out_dtype"])]
    return [Expected(dequantize_ref.dequantize_gguf(**a), a["out_dtype"])]


# norms


def norm_ops() -> list[Op]:
    made = []
    for rms in (True, False):
        for add in (False, True):
            for int8 in (False, True):
                base = ("add_" if add else "") + ("rms_norm" if rms else "layer_norm")
                made.append(norm_op(base + ("_int8" if int8 else ""), rms, add, int8))
        made.append(norm_op("rms_norm" if rms else "layer_norm", rms, False, False, out=True))
    return made


def norm_op(name: str, rms: bool, add: bool, int8: bool, out: bool = False) -> Op:
    def draw_norm(draw: Draw) -> Arguments:
        x = draw_rows(draw, draw.floating(), 0.1)
        k, dtype = x.shape[-1], draw.floating()
        a: Arguments = {"x": x}
        if add:
            a["residual"] = draw.tensor(x.shape, x.dtype)
        a["weight"] = draw.tensor([k], dtype) if rms or draw.chance(0.7) else None
        if not rms:
            a["bias"] = draw.tensor([k], dtype) if draw.chance(0.7) else None
        a["eps"] = draw.choice((1e-5, 1e-6, 1e-12, 0.1))
        if int8:
            a["group_size"] = group_of(draw, k)
        if out:
            a["out"] = draw.out(x.shape, x.dtype)
        return a

    def faults(a: Arguments) -> set[str]:
        x, weight, bias = a["x"], a["weight"], a.get("bias")
        if not is_rows(x):
            return {"x"}
        k, found = x.shape[-1], set()
        if add and (a["residual"].dtype != x.dtype or a["residual"].shape != x.shape):
            found.add("residual")
        if not is_vector(weight, k) or (rms and weight is None):
            found.add("weight")
        if not is_vector(bias, k) or (weight is not None and bias is not None and weight.dtype != bias.dtype):
            found.add("bias")
        if not a["eps"] >= 0:
            found.add("eps")
        if bad_group(a.get("group_size", 0), k):
            found.add("group_size")
        if out and bad_out(a["out"], x.shape, (x.dtype,), x, weight, bias):
            found.add("out")
        return found

    def reference(a: Arguments) -> list[Expected]:
        x, group = a["x"], a.get("group_size", 0)
        eps = torch.tensor(a["eps"], dtype=FLOAT32).item()
        total = x.double() + a["residual"].double() if add else x.double()
        if without_values(x):
            y, magnitude = torch.zeros(x.shape, dtype=torch.float64), 0.0
        elif rms:
            y, magnitude = norm_ref.rms_norm(total, a["weight"], eps), 0.0
        else:
            y = norm_ref.layer_norm(total, a["weight"], a["bias"], eps)
            magnitude = cancellation(total, a["weight"], eps)
        # A row with NaN or infinity is NaN as a whole.
        y = torch.where(total.isfinite().all(-1, keepdim=True), y, math.nan)
        lost = underflows(total, rms, eps)
        # An infinite weight times a difference that is all rounding error is infinite or NaN.
        rows = Expected(y, x.dtype, exact=False, magnitude=magnitude, unspecified=lost, kinds=rms)
        summed = Expected((x.float() + a["residual"].float()) if add else x, x.dtype)
        if not int8:
            return [rows, summed] if add else [rows]
        q, scale = expect_int8(y.float(), group)
        q.codes, scale.exact, scale.bound = 1, False, 1e-5
        scale.magnitude = magnitude
        exclude_noise(y, torch.where(lost, math.inf, 1e-3), group, q, scale)
        q.check_values = scale.check_values = magnitude <= 20
        return [q, scale, *([] if not add else [summed] if rms else [rows])]

    return Op(
        name, draw_norm, faults, reference, kernels="norm",
        overload="out" if out else "default", written=("out",) if out else (),
    )  # fmt: skip


def underflows(x: Tensor, rms: bool, eps: float) -> Tensor:
    """Rows whose mean square (or variance) plus eps is too small for float32: the norm divides by nothing."""
    if x.shape[-1] == 0:
        return torch.zeros((*x.shape[:-1], 1), dtype=torch.bool)
    power = x.square().mean(-1, keepdim=True) if rms else x.var(-1, unbiased=False, keepdim=True)
    return power + eps < SMALLEST


def row_largest(t: Tensor) -> Tensor:
    t = t.double().nan_to_num(0, 0, 0).abs()
    return t.amax(-1, keepdim=True) if t.shape[-1] else t.sum(-1, keepdim=True)


def exclude_noise(y, floor, group: int, q: Expected, scale: Expected, codes=False) -> None:
    """Rows with a part below ``floor`` are all rounding error there, and so is its scale.

    codes: other codes that are not specified."""
    if y.numel() == 0:
        return
    parts = y.double().unflatten(-1, (-1, group or y.shape[-1]))
    lost = (parts.nan_to_num(0, 0, 0).abs().amax(-1) < floor).any(-1, keepdim=True)
    q.unspecified, scale.unspecified = lost | codes, lost if group else lost[..., 0]


def cancellation(x: Tensor, weight: Tensor | None, eps: float) -> float:
    """How much larger than its result the rounding errors of x - mean(x) are."""
    spread = x.double().var(-1, unbiased=False).add(eps).sqrt()
    largest = x.double().abs().amax(-1)
    largest = torch.where(largest > 0, largest.clamp(min=SMALLEST), largest)  # subnormal x has fewer digits
    ratio = torch.where(spread > 0, largest / spread, torch.where(largest > 0, 1e9, 0.0))
    finite = ratio[ratio.isfinite()]
    gain = 1.0 if weight is None else weight.double().nan_to_num(0, 1, 1).abs().amax().item()
    return finite.max().item() * max(1.0, gain) if finite.numel() else 0.0


# rope


def draw_rope(draw: Draw) -> Arguments:
    b, h, s = draw.size(3), draw.size(4), draw.size(17)
    d = draw.choice((2, 4, 8, 16, 32, 64, 80, 96, 128, 6, 34, 1, 3, 7, 130))
    half = d // 2 if draw.chance(0.7) else draw.randint(0, d // 2)
    rows = s + draw.randint(1, 20)
    table = draw.floating()
    a: Arguments = {
        "x": draw.tensor([b, h, s, d], draw.floating(), nonfinite=0.05),
        "cos": draw.tensor([rows, half], table),
        "sin": draw.tensor([rows, half], table),
        "positions": None,
        "interleaved": draw.chance(0.5),
    }
    form = draw.randrange(3)
    if form:
        sizes, high = ([b], rows - s) if form == 1 else ([b, s], rows - 1)
        a["positions"] = draw.tensor(sizes, draw.choice((torch.int32, torch.int64)), low=0, high=high)
    return a


def rope_faults(a: Arguments) -> set[str]:
    x, cos, sin, positions = a["x"], a["cos"], a["sin"], a["positions"]
    if not is_floating(x) or x.dim() != 4:
        return {"x"}
    if not is_floating(cos) or cos.dim() != 2 or 2 * cos.shape[1] > x.shape[3]:
        return {"cos"}
    if sin.dtype != cos.dtype or sin.shape != cos.shape:
        return {"sin"}
    b, s, rows = x.shape[0], x.shape[2], cos.shape[0]
    if positions is None:
        return {"positions", "cos"} if s > rows and x.numel() else set()
    if positions.dtype not in (torch.int32, torch.int64) or positions.shape not in ((b,), (b, s)):
        return {"positions"}
    if x.numel() == 0:
        return set()
    last = positions.max().item() + (s - 1 if positions.dim() == 1 else 0)
    return {"positions"} if positions.min().item() < 0 or last >= rows else set()


def expect_rope(a: Arguments) -> list[Expected]:
    x = a["x"]
    if without_values(x):
        return [Expected(torch.zeros(x.shape), x.dtype)]
    largest = x.double().abs().nan_to_num(0, 0, 0).amax().item() * a["cos"].double().abs().sum().item()
    return [Expected(rope_ref.rope(**a), x.dtype, exact=False, magnitude=min(largest, 3.0))]


# gated activations


def underflowed_times_infinity(gate: Tensor, up: Tensor) -> Tensor:
    """Where the activation's tail may be 0 or not, and the result NaN or infinite with it."""
    return up.isinf() & (gate < -5)


def gated_op(name: str, out: bool = False) -> Op:
    silu, int8 = name.startswith("silu"), name.endswith("int8")

    def draw_gated(draw: Draw) -> Arguments:
        gate = draw_rows(draw, draw.floating(), 0.1)
        a: Arguments = {"gate": gate, "up": draw.tensor(gate.shape, gate.dtype)}
        if not silu:
            a["approximate"] = draw.choice(("none", "tanh"))
        if int8:
            a["group_size"] = group_of(draw, gate.shape[-1])
        if out:
            a["out"] = draw.out(gate.shape, gate.dtype)
        return a

    def faults(a: Arguments) -> set[str]:
        gate, up, found = a["gate"], a["up"], set()
        if a.get("approximate", "none") not in ("none", "tanh"):
            found.add("approximate")
        if not is_rows(gate):
            return found | {"gate"}
        if up.dtype != gate.dtype or up.shape != gate.shape:
            found.add("up")
        if bad_group(a.get("group_size", 0), gate.shape[-1]):
            found.add("group_size")
        if out and bad_out(a["out"], gate.shape, (gate.dtype,), gate, up):
            found.add("out")
        return found

    def reference(a: Arguments) -> list[Expected]:
        gate, up = a["gate"], a["up"]
        y = gated_act_ref.silu_mul(gate, up) if silu else gated_act_ref.gelu_mul(gate, up, a["approximate"])
        if not int8:
            # A gate's tail is only as exact as float32 next to the gate itself.
            sizes = [t.double().nan_to_num(0, 0, 0).square().mean().sqrt().item() for t in (gate, up)]
            magnitude = max(sizes[0], SMALLEST) * sizes[1] * 2e-7 / BOUND[gate.dtype] if gate.numel() else 0.0
            # The tail of gelu times an infinity is NaN where the tail has underflowed.
            return [Expected(y, gate.dtype, exact=False, magnitude=magnitude, kinds=False)]
        q, scale = expect_int8(y.float(), a["group_size"])
        q.codes, scale.exact, scale.bound = 1, False, 1e-5
        floor = row_largest(gate) * row_largest(up) * 1e-4  # float32's own steps are at 1e-7
        exclude_noise(y, floor, a["group_size"], q, scale, underflowed_times_infinity(gate, up))
        return [q, scale]

    return Op(
        name, draw_gated, faults, reference, kernels="gated_act",
        overload="out" if out else "default", written=("out",) if out else (),
    )  # fmt: skip


OPS = [
    Op(
        "quantize_int8",
        lambda d: {
            "x": (x := draw_rows(d, d.floating(), 0.2)),
            "group_size": group_of(d, x.shape[-1]),
            "strict": d.chance(0.1),
        },
        quantize_faults,
        lambda a: expect_int8(a["x"], a["group_size"]),
        kernels="quantize",
    ),
    Op(
        "quantize_int8_asymmetric",
        lambda d: {"x": draw_rows(d, d.floating(), 0.2), "strict": d.chance(0.1)},
        quantize_faults,
        expect_asymmetric,
        kernels="quantize",
    ),
    Op(
        "quantize_int8_static",
        draw_static,
        static_faults,
        lambda a: [
            Expected(
                quantize_ref.quantize_int8_static(a["x"], a["scale"], a["zero_point"], a["dtype"]), a["dtype"]
            )
        ],
        kernels="quantize",
    ),
    Op("dequantize_int8", draw_int8, int8_faults, expect_dequantized, kernels="dequantize_int8"),
    Op(
        "dequantize_groups",
        draw_groups,
        groups_faults,
        lambda a: [
            Expected(
                dequantize_ref.dequantize_groups(**{**a, "packed": a["packed"].view(torch.uint8)}),
                a["out_dtype"],
            )
        ],
        kernels="dequantize_groups",
    ),
    Op("dequantize_gguf", draw_gguf, gguf_faults, expect_gguf, kernels="dequantize_gguf"),
    *norm_ops(),
    Op("rope", draw_rope, rope_faults, expect_rope, kernels="rope"),
    *(gated_op(name) for name in ("silu_mul", "silu_mul_int8", "gelu_mul", "gelu_mul_int8")),
    *(gated_op(name, out=True) for name in ("silu_mul", "gelu_mul")),
]
