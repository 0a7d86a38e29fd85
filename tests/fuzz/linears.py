"""Products: linear, linear_int8 and its forms, linear_grouped."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from narrowcast.kernels.linear import linear_ref
from narrowcast.kernels.linear_grouped import linear_grouped_ref
from narrowcast.kernels.linear_int8 import linear_int8_ref
from narrowcast.kernels.quantize import quantize_ref

from .draw import ACTIVATIONS, BYTES, FLOATS, Draw
from .rows import grouped_weight_faults
from .spec import Arguments, Expected, Op, bad_out, is_floating, is_vector, overlap

INT8, FLOAT32 = torch.int8, torch.float32


def draw_epilogue(draw: Draw, a: Arguments, leading: list[int], n: int) -> None:
    a["bias"] = draw.tensor([n], draw.floating()) if draw.chance(0.5) else None
    a["activation"] = draw.choice(ACTIVATIONS) if draw.chance(0.6) else "none"
    a["residual"] = draw.tensor([*leading, n], draw.floating()) if draw.chance(0.4) else None
    a["post_activation"] = draw.choice(ACTIVATIONS) if draw.chance(0.3) else "none"


def epilogue_faults(a: Arguments, x: Tensor, n: int) -> set[str]:
    found = {name for name in ("activation", "post_activation") if a[name] not in ACTIVATIONS}
    if not is_vector(a["bias"], n):
        found.add("bias")
    residual = a["residual"]
    if residual is not None and (not is_floating(residual) or residual.shape != (*x.shape[:-1], n)):
        found.add("residual")
    return found


def draw_out(draw: Draw, a: Arguments, sizes: list[int]) -> None:
    """A destination, now and then the residual itself."""
    a["out"] = draw.out(sizes, draw.floating())
    if a["residual"] is not None and draw.chance(0.3) and a["residual"].is_contiguous():
        a["out"] = a["residual"]


def bad_linear_out(a: Arguments, sizes, *inputs: Tensor | None, in_place: bool = True) -> bool:
    out, residual = a["out"], a["residual"]
    same = (
        in_place
        and residual is not None
        and residual.data_ptr() == out.data_ptr()
        and residual.dtype == out.dtype
        and residual.is_contiguous()
    )
    return bad_out(out, sizes, FLOATS, *inputs) or (not same and overlap(out, residual))


def root_sum(x: Tensor, w: Tensor) -> float:
    """The typical size of a product's sums before they cancel."""
    x, w = x.double().nan_to_num(0, 0, 0), w.double().nan_to_num(0, 0, 0)
    k = max(x.shape[-1], 1)
    return (x.square().mean().item() * w.square().mean().item() * k) ** 0.5 if x.numel() and w.numel() else 0


def other(*tensors: Tensor | None) -> float:
    return sum(t.double().nan_to_num(0, 0, 0).square().mean().item() ** 0.5 for t in tensors if _has(t))


def _has(t: Tensor | None) -> bool:
    return t is not None and t.numel() > 0


# linear


def linear_op(out: bool) -> Op:
    def draw_linear(draw: Draw) -> Arguments:
        k, n = draw.size(), draw.size()
        leading, dtype = draw.leading(max(k, n)), draw.floating()
        a: Arguments = {
            "x": draw.tensor([*leading, k], dtype, nonfinite=0.05),
            "weight": draw.tensor([n, k], dtype, scale=draw.choice((1.0, 0.1)), nonfinite=0.02),
        }
        draw_epilogue(draw, a, leading, n)
        if out:
            draw_out(draw, a, [*leading, n])
        else:
            a["out_dtype"] = draw.choice((None, *FLOATS))
        return a

    def faults(a: Arguments) -> set[str]:
        x, weight = a["x"], a["weight"]
        if not is_floating(x) or x.dim() < 1:
            return {"x"}
        if weight.dtype != x.dtype or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
            return {"weight"}
        n = weight.shape[0]
        found = epilogue_faults(a, x, n)
        if out and bad_linear_out(a, [*x.shape[:-1], n], x, weight, a["bias"]):
            found.add("out")
        if not out and a["out_dtype"] not in (None, *FLOATS):
            found.add("out_dtype")
        return found

    def reference(a: Arguments) -> list[Expected]:
        x, weight = a["x"], a["weight"]
        inputs = {n: v for n, v in a.items() if n not in ("out", "out_dtype")}
        dtype = a["out"].dtype if out else a["out_dtype"] or x.dtype
        magnitude = root_sum(x, weight) + other(a["bias"], a["residual"])
        return [Expected(linear_ref.linear(**inputs), dtype, exact=False, magnitude=magnitude)]

    return Op(
        "linear", draw_linear, faults, reference, kernels="linear",
        overload="out" if out else "default", written=("out",) if out else (),
    )  # fmt: skip


# linear_int8


def int8_op(form: str) -> Op:
    """form: "default", "out" or "requantize"."""

    def draw_int8(draw: Draw) -> Arguments:
        group = draw.choice((0, 0, 0, 32, 64, 96))
        k, n = (group * draw.randint(0, 4) if group else draw.size()), draw.size()
        leading = draw.leading(max(k, n))
        scales = draw.choice(([*leading, k // group] if group else leading, [], [1]))
        if group:
            scales = [*leading, k // group]
        elif draw.chance(0.1):
            scales = [*leading, 1]
        a: Arguments = {
            "x_q": draw.tensor([*leading, k], INT8),
            "x_scale": draw.tensor(scales, FLOAT32, positive=draw.chance(0.8)),
            "w_q": draw.tensor([n, k], INT8),
            "w_scale": draw.tensor([n] if draw.chance(0.8) else [], FLOAT32, scale=0.01),
            "x_zero_point": None,
            "group_size": group,
        }
        if not group and draw.chance(0.3):
            a["x_zero_point"] = draw.tensor(leading, torch.int32)
        draw_epilogue(draw, a, leading, n)
        if form == "out":
            draw_out(draw, a, [*leading, n])
        elif form == "requantize":
            a["out_dtype"] = draw.choice(BYTES)
            a["out_scale"] = draw.choice((1.0, 0.37, 25.0))
            a["out_zero_point"] = draw.randint(-128, 127) if a["out_dtype"] == INT8 else draw.randint(0, 255)
        else:
            a["out_dtype"] = draw.choice((None, *FLOATS))
        return a

    def faults(a: Arguments) -> set[str]:
        x, w, group = a["x_q"], a["w_q"], a["group_size"]
        if x.dtype != INT8 or x.dim() < 1:
            return {"x_q", "x "}
        found = int8_weight_faults(a, x)
        if found:
            return found
        n, leading, count = w.shape[0], x.shape[:-1], x.shape[-1] // group if group else 1
        found = epilogue_faults(a, x, n)
        scale, zero = a["x_scale"], a["x_zero_point"]
        shapes = [(*leading, count)] if group else [leading, (*leading, 1)]
        if scale.dtype != FLOAT32 or not (scale.shape in shapes or (not group and scale.numel() == 1)):
            found.add("x_scale")
        if zero is not None and (zero.dtype != torch.int32 or zero.numel() != math.prod(leading) or group):
            found.add("x_zero_point")
        if form == "out":
            if bad_linear_out(a, [*leading, n], x, w, a["w_scale"], a["bias"], scale, zero):
                found |= {"out"}
        elif form == "requantize":
            found |= requantise_faults(a)
        elif a["out_dtype"] not in (None, *FLOATS):
            found.add("out_dtype")
        return found

    def reference(a: Arguments) -> list[Expected]:
        inputs = {n: v for n, v in a.items() if not n.startswith("out")}
        magnitude = int8_magnitude(a["x_q"], a["x_scale"], a["w_q"], a["w_scale"]) + other(
            a["bias"], a["residual"]
        )
        y = exact_int8(inputs)
        if form == "requantize":
            q = linear_int8_ref.requantise(y, a["out_scale"], a["out_zero_point"], a["out_dtype"])
            # Sums that cancel leave their rounding, which small steps show.
            codes = 1 + int(min(magnitude * 4e-6 / a["out_scale"], 255))
            return [Expected(q, a["out_dtype"], codes=codes)]
        dtype = a["out"].dtype if form == "out" else a["out_dtype"] or FLOAT32
        return [Expected(y, dtype, exact=False, magnitude=magnitude)]

    return Op(
        "linear_int8_requantize" if form == "requantize" else "linear_int8",
        draw_int8, faults, reference, kernels="linear_int8",
        overload="out" if form == "out" else "default", written=("out",) if form == "out" else (),
    )  # fmt: skip


def exact_int8(a: Arguments) -> Tensor:
    """The reference, which cannot split an empty tensor into groups: there the sums are 0."""
    x, w, x_scale = a["x_q"], a["w_q"], a["x_scale"].double()
    if x_scale.numel() == 1:
        a = {**a, "x_scale": x_scale.reshape(a["x_scale"].shape if a["group_size"] else ())}
    if x.numel() and w.numel():
        return linear_int8_ref.linear_int8(**a)
    zeros = torch.zeros((*x.shape[:-1], w.shape[0]), dtype=torch.float64) * a["w_scale"].double()
    if not a["group_size"]:
        zeros = zeros * (x_scale if x_scale.numel() == 1 else x_scale.reshape(*x.shape[:-1], 1))
    return linear_int8_ref.epilogue(zeros, a["bias"], a["activation"], a["residual"], a["post_activation"])


def int8_magnitude(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor) -> float:
    return root_sum(x, w) * other(x_scale) * other(w_scale)


def int8_weight_faults(a: Arguments, x: Tensor) -> set[str]:
    w, w_scale, group, k = a["w_q"], a["w_scale"], a["group_size"], x.shape[-1]
    if w.dtype != INT8 or w.dim() != 2 or w.shape[1] != k:
        return {"w_q"}
    if group < 0 or group % 32 or (group and k % group):
        return {"group_size"}
    if w_scale.dtype != FLOAT32 or not (w_scale.shape == (w.shape[0],) or w_scale.numel() == 1):
        return {"w_scale"}
    return set()


def requantise_faults(a: Arguments) -> set[str]:
    if a["out_dtype"] not in BYTES:
        return {"out_dtype"}
    found, low = set(), -128 if a["out_dtype"] == INT8 else 0
    scale = torch.tensor(a["out_scale"], dtype=FLOAT32)
    if not (scale > 0 and scale.isfinite() and (1 / scale).isfinite()):
        found.add("out_scale")
    if not low <= a["out_zero_point"] <= low + 255:
        found.add("out_zero_point")
    return found


def dynamic_op(out: bool) -> Op:
    def draw_dynamic(draw: Draw) -> Arguments:
        group = draw.choice((0, 0, 0, 32, 64))
        k, n = (group * draw.randint(0, 4) if group else draw.size()), draw.size()
        leading = draw.leading(max(k, n))
        a: Arguments = {
            "x": draw.tensor([*leading, k], draw.floating(), nonfinite=0.1),
            "w_q": draw.tensor([n, k], INT8),
            "w_scale": draw.tensor([n] if draw.chance(0.8) else [], FLOAT32, scale=0.01),
            "group_size": group,
            "asymmetric": not group and draw.chance(0.3),
            "strict": draw.chance(0.1),
        }
        draw_epilogue(draw, a, leading, n)
        if out:
            draw_out(draw, a, [*leading, n])
        else:
            a["out_dtype"] = draw.choice((None, *FLOATS))
        return a

    def faults(a: Arguments) -> set[str]:
        x = a["x"]
        if not is_floating(x) or x.dim() < 1:
            return {"x"}
        if a["asymmetric"] and a["group_size"]:
            return {"asymmetric", "group_size"}
        found = int8_weight_faults(a, x)
        if found:
            return found
        n = a["w_q"].shape[0]
        found = epilogue_faults(a, x, n)
        if a["strict"] and not bool(x.isfinite().all()):
            found.add("x")
        if out and bad_linear_out(a, [*x.shape[:-1], n], x, a["w_q"], a["w_scale"], a["bias"]):
            found.add("out")
        if not out and a["out_dtype"] not in (None, *FLOATS):
            found.add("out_dtype")
        return found

    def reference(a: Arguments) -> list[Expected]:
        x, group, zero = a["x"], a["group_size"], None
        leading, k = x.shape[:-1], x.shape[-1]
        if x.numel() == 0:
            q, scale = torch.zeros(x.shape), torch.ones((*leading, k // group) if group else leading)
        elif a["asymmetric"]:
            q, scale, zero = quantize_ref.quantize_int8_asymmetric(x)
        else:
            q, scale = quantize_ref.quantize_int8(x, group)
        names = ("bias", "activation", "residual", "post_activation", "w_q", "w_scale", "group_size")
        y = exact_int8({"x_q": q, "x_scale": scale, "x_zero_point": zero, **{n: a[n] for n in names}})
        magnitude = int8_magnitude(q, scale, a["w_q"], a["w_scale"]) + other(a["bias"], a["residual"])
        dtype = a["out"].dtype if out else a["out_dtype"] or x.dtype
        return [Expected(y, dtype, exact=False, magnitude=magnitude)]

    return Op(
        "linear_dynamic_int8", draw_dynamic, faults, reference, kernels="linear_int8",
        overload="out" if out else "default", written=("out",) if out else (),
    )  # fmt: skip


# linear_grouped


def grouped_op(out: bool) -> Op:
    def draw_grouped(draw: Draw) -> Arguments:
        bits, n, group = draw.choice((4, 8)), draw.size(), draw.choice((32, 32, 64, 96, 128, 160, 256))
        count = draw.randint(0, max(1, 256 // group))
        k, dtype = group * count, draw.choice((FLOAT32, torch.float16))
        leading = draw.leading(max(k, n))
        a: Arguments = {
            "x": draw.tensor([*leading, k], draw.floating(), nonfinite=0.05),
            "packed": draw.tensor([n, k * bits // 8], draw.choice(BYTES), low=0, high=127),
            "scale": draw.tensor([n, count], dtype, scale=0.1),
            "offset": draw.tensor([n, count], dtype) if draw.chance(0.5) else None,
            "group_size": group,
            "bits": bits,
            "activation_bits": draw.choice((16, 16, 8, 32)),
        }
        draw_epilogue(draw, a, leading, n)
        if out:
            a["out"] = draw.out([*leading, n], draw.floating())
        else:
            a["out_dtype"] = draw.choice((None, *FLOATS))
        return a

    def faults(a: Arguments) -> set[str]:
        x, packed = a["x"], a["packed"]
        found = grouped_weight_faults(a, 32)
        if not is_floating(x) or x.dim() < 1:
            found.add("x")
        if found:
            return found | {"out_dtype"} if x.dtype not in FLOATS and a.get("out_dtype", x) is None else found
        n, k = packed.shape[0], packed.shape[1] * 8 // a["bits"]
        if x.shape[-1] != k:
            return {"x"}
        found = epilogue_faults(a, x, n)
        if a["activation_bits"] not in (8, 16, 32):
            found.add("activation_bits")
        inputs = (x, packed, a["scale"], a["offset"], a["bias"], a["residual"])
        if out and bad_out(a["out"], [*x.shape[:-1], n], FLOATS, *inputs):
            found.add("out")
        if not out and a["out_dtype"] not in (None, *FLOATS):
            found.add("out_dtype")
        return found

    def reference(a: Arguments) -> list[Expected]:
        x = a["x"]
        inputs = {n: v for n, v in a.items() if n not in ("out", "out_dtype")}
        inputs["packed"] = a["packed"].view(torch.uint8)  # bytes, whichever way they are declared
        dtype = a["out"].dtype if out else a["out_dtype"] or x.dtype
        if x.shape[-1] == 0:
            inputs |= {"x": x.new_zeros((*x.shape[:-1], 32)), "group_size": 32}
            inputs["packed"] = torch.zeros((a["packed"].shape[0], 4 * a["bits"]), dtype=torch.uint8)
            inputs["scale"] = torch.zeros((a["packed"].shape[0], 1))
            inputs["offset"] = None
        if a["activation_bits"] == 16:
            inputs["x"] = linear_grouped_ref.round_rows(inputs["x"])
        weight_size = 8 * other(a["scale"]) * (10 if a["bits"] == 8 else 1) + other(a["offset"])
        magnitude = other(x) * weight_size * x.shape[-1] ** 0.5 + other(a["bias"], a["residual"])
        y = linear_grouped_ref.linear_grouped(**inputs)
        # Codes, scales and offsets may be multiplied in any order, and infinities tell which it was.
        order = x.isinf().any(-1, keepdim=True) | a["scale"].isinf().any(-1)
        if a["offset"] is not None:
            order = order | a["offset"].isinf().any(-1)
        return [Expected(y, dtype, exact=False, magnitude=magnitude, kinds=False, unspecified=order)]

    return Op(
        "linear_grouped", draw_grouped, faults, reference, kernels="linear_grouped",
        overload="out" if out else "default", written=("out",) if out else (),
    )  # fmt: skip


OPS = [
    linear_op(False), linear_op(True),
    int8_op("default"), int8_op("out"), int8_op("requantize"),
    dynamic_op(False), dynamic_op(True),
    grouped_op(False), grouped_op(True),
]  # fmt: skip
