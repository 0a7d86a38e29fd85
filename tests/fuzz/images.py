"""Ops over images: convolutions and pools."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from narrowcast.kernels.conv2d import conv2d_ref
from narrowcast.kernels.conv2d_int8 import conv2d_int8_ref
from narrowcast.kernels.linear_int8.linear_int8_ref import requantise
from narrowcast.kernels.pool import pool_ref

from .draw import ACTIVATIONS, BYTES, FLOATS, Draw
from .linears import other
from .spec import Arguments, Expected, Op, is_floating, is_vector, overlap

INT8, FLOAT32 = torch.int8, torch.float32
MOST = 1 << 20  # of a window's stride, padding and dilation


def code(draw: Draw, dtype: torch.dtype) -> int:
    return draw.randint(-128, 127) if dtype == INT8 else draw.randint(0, 255)


def is_code(value: int, dtype: torch.dtype) -> bool:
    return -128 <= value <= 127 if dtype == INT8 else 0 <= value <= 255


def positions(size: int, kernel: int, stride: int, padding: int, end: int, dilation: int) -> int:
    return (size + padding + end - dilation * (kernel - 1) - 1) // stride + 1


def draw_image(draw: Draw, channels: int, dtype: torch.dtype, **values) -> Tensor:
    h, w = (draw.choice((1, 2, 3, 5, 7, 8, 11, 15, 16, 17)) for _ in range(2))
    layout = "channels_last" if draw.chance(0.4) else None
    return draw.tensor([draw.choice((0, 1, 1, 1, 2, 3)), channels, h, w], dtype, layout=layout, **values)


def draw_window(draw: Draw, a: Arguments, h: int, w: int) -> None:
    """kernel sizes and a stride, padding and dilation that fit."""
    a["stride"] = [draw.choice((1, 1, 2, 3)) for _ in range(2)]
    a["padding"] = [draw.choice((0, 0, 1, 2)) for _ in range(2)]
    a["dilation"] = [draw.choice((1, 1, 1, 2)) for _ in range(2)]
    for d, size in enumerate((h, w)):
        room = size + 2 * a["padding"][d]
        a["kernel"] = [*a.get("kernel", []), draw.choice([k for k in (1, 2, 3, 3, 5, 7) if k <= room])]
        if a["dilation"][d] * (a["kernel"][d] - 1) + 1 > room:
            a["dilation"][d] = 1


def bad_pair(v: list[int], least: int, most: int = MOST) -> bool:
    return len(v) != 2 or not all(least <= n <= most for n in v)


def bad_window(a: Arguments) -> set[str]:
    """Of a convolution; its padding may be 2 numbers or 4."""
    p = a["padding"]
    found = {n for n, least in (("stride", 1), ("dilation", 1)) if bad_pair(a[n], least)}
    return found | (
        {"padding"} if len(p) not in (2, 4) or bad_pair(p[:2], 0) or bad_pair(p[-2:], 0) else set()
    )


def draw_conv(draw: Draw, dtype: torch.dtype, weight_dtype: torch.dtype, names: tuple[str, str], **values):
    form = draw.choice(("dense", "dense", "depthwise", "groups"))
    groups = 1 if form == "dense" else draw.choice((2, 3, 4, 16, 17, 33))
    per_group = 1 if form == "depthwise" else draw.choice((1, 2, 3, 4, 16, 17, 33)) if groups < 5 else 1
    out_per_group = draw.choice((1, 1, 2)) if groups > 1 else draw.choice((0, 1, 2, 3, 8, 16, 17, 33))
    x = draw_image(draw, groups * per_group, dtype, **values)
    a: Arguments = {names[0]: x}
    draw_window(draw, a, *x.shape[2:])
    if draw.chance(0.3):
        a["padding"] = [*a["padding"], *(p + draw.choice((0, 1, 2)) for p in a["padding"])]
    a[names[1]] = draw.tensor([groups * out_per_group, per_group, *a.pop("kernel")], weight_dtype)
    a["groups"] = groups
    return a


def conv_shape(a: Arguments, x: Tensor, w: Tensor) -> list[int]:
    p = a["padding"]
    window = zip(x.shape[2:], w.shape[2:], a["stride"], p[:2], p[-2:], a["dilation"])
    return [x.shape[0], w.shape[0], *(positions(*axis) for axis in window)]


def conv_faults(a: Arguments, names: tuple[str, str]) -> set[str]:
    x, w, groups = a[names[0]], a[names[1]], a["groups"]
    found = bad_window(a)
    # What does not fit together may be blamed on either side.
    if x.dim() != 4 or 0 in x.shape[1:]:
        return found | set(names) | {"groups"}
    if w.dim() != 4 or 0 in w.shape[1:] or w.shape[2] > 64 or w.shape[3] > 64:
        return found | {names[1], "groups"}
    if groups < 1 or x.shape[1] % groups or w.shape[0] % groups or w.shape[1] != x.shape[1] // groups:
        found |= {"groups", names[1]}
    if not found and min(conv_shape(a, x, w)[2:]) < 1:
        found |= {*names, "dilation", "padding"}
    return found


def with_defaults(a: Arguments) -> Arguments:
    """An empty list stands for the default."""
    return {**a, **{n: a[n] or [d, d] for n, d in (("stride", 1), ("padding", 0), ("dilation", 1))}}


def conv_elements(a: Arguments) -> int:
    """Padding alone can make an output of any size."""
    x, w = a.get("x", a.get("x_q")), a.get("weight", a.get("w_q"))
    a = with_defaults(a)
    if x.dim() != 4 or w.dim() != 4 or bad_window(a):
        return 0
    return math.prod(max(n, 0) for n in conv_shape(a, x, w))


def draw_conv_float(draw: Draw) -> Arguments:
    dtype = draw.floating()
    a = draw_conv(draw, dtype, dtype, ("x", "weight"), nonfinite=0.02)
    n = a["weight"].shape[0]
    a["bias"] = draw.tensor([n], draw.floating()) if draw.chance(0.5) else None
    a["activation"] = draw.choice(ACTIVATIONS) if draw.chance(0.5) else "none"
    shape = conv_shape(a, a["x"], a["weight"])
    a["residual"] = draw.tensor(shape, draw.floating()) if draw.chance(0.4) else None
    a["post_activation"] = draw.choice(ACTIVATIONS) if draw.chance(0.3) else "none"
    return a


def conv_float_faults(a: Arguments) -> set[str]:
    a = with_defaults(a)
    x, w = a["x"], a["weight"]
    found = {n for n in ("activation", "post_activation") if a[n] not in ACTIVATIONS}
    found |= conv_faults(a, ("x", "weight"))
    if not is_floating(x):
        found |= {"x"}
    if w.dtype != x.dtype:
        found |= {"weight"}
    if w.dim() < 1 or not is_vector(a["bias"], w.shape[0]):
        found |= {"bias"}
    r = a["residual"]
    if not found and r is not None and (not is_floating(r) or list(r.shape) != conv_shape(a, x, w)):
        found |= {"residual"}
    return found


def expect_conv_float(a: Arguments) -> list[Expected]:
    a = with_defaults(a)
    x, w = a["x"], a["weight"]
    shape = conv_shape(a, x, w)
    if 0 in shape:
        return [Expected(torch.zeros(shape), x.dtype)]
    k = w[0].numel()
    magnitude = other(x) * other(w) * k**0.5 + other(a["bias"], a["residual"])
    wild = not bool(x.isfinite().all() and w.isfinite().all())  # padding may or may not meet an infinity
    y = conv2d_ref.conv2d(**a)
    return [Expected(y, x.dtype, exact=False, magnitude=magnitude, check_values=not wild)]


# conv2d_int8


def conv_int8_op(out: bool) -> Op:
    def draw_int8(draw: Draw) -> Arguments:
        a = draw_conv(draw, draw.choice(BYTES), INT8, ("x_q", "w_q"), low=0, high=127)
        n = a["w_q"].shape[0]
        shape = conv_shape(a, a["x_q"], a["w_q"])
        a["x_scale"], a["x_zero_point"] = draw.choice((0.02, 0.5, 1.0)), code(draw, a["x_q"].dtype)
        a["w_scale"] = draw.tensor([n] if draw.chance(0.8) else [1], FLOAT32, scale=0.01, positive=True)
        a["bias"] = draw.tensor([n], FLOAT32) if draw.chance(0.5) else None
        a["activation"] = draw.choice(("none", "relu", "relu6", "hardswish", "silu"))
        a["residual"], a["residual_scale"], a["residual_zero_point"] = None, 1.0, 0
        if draw.chance(0.4):
            dtype = draw.choice((*BYTES, *FLOATS))
            a["residual"] = draw.tensor(shape, dtype, low=0, high=127)
            a["residual_scale"] = draw.choice((1.0, 0.03))
            a["residual_zero_point"] = code(draw, dtype) if dtype in BYTES else 0
        a["post_activation"] = draw.choice(("none", "none", "relu", "relu6"))
        dtype = draw.choice((*FLOATS, *BYTES))
        a["out_scale"] = draw.choice((0.05, 1.0)) if dtype in BYTES else 0.0
        a["out_zero_point"] = code(draw, dtype) if dtype in BYTES else 0
        if out:
            a["out"] = draw.out(shape, dtype, "channels_last")
        else:
            a["out_dtype"] = dtype
        return a

    def faults(a: Arguments) -> set[str]:
        a = with_defaults(a)
        x, w, scale = a["x_q"], a["w_q"], a["w_scale"]
        found = conv_faults(a, ("x_q", "w_q"))
        shape = None if found else conv_shape(a, x, w)
        found |= {n for n in ("activation", "post_activation") if a[n] not in ACTIVATIONS}
        if x.dtype not in BYTES:
            found |= {"x_q", "x_zero_point"}
        elif not is_code(a["x_zero_point"], x.dtype):
            found |= {"x_zero_point"}
        if w.dtype != INT8:
            found |= {"w_q"}
        n = w.shape[0] if w.dim() else -1
        if scale.dtype != FLOAT32 or not (scale.numel() == 1 or scale.shape == (n,)):
            found |= {"w_scale"}
        if not is_vector(a["bias"], n, (FLOAT32,)):
            found |= {"bias"}
        found |= {n for n in ("x_scale",) if not usable(a[n])}
        dtype = a["out"].dtype if out else a["out_dtype"]
        names = {"out_dtype", "out_scale"}
        if dtype not in (*BYTES, *FLOATS):
            found |= names | ({"out"} if out else set())
        elif dtype in BYTES:
            if not (usable(a["out_scale"]) and usable(1 / (a["out_scale"] or 1))):
                found |= names
            if not is_code(a["out_zero_point"], dtype):
                found |= {"out_zero_point"}
        elif a["out_scale"] != 0:
            found |= names
        r = a["residual"]
        if r is not None:
            if r.dtype not in (*BYTES, *FLOATS) or (shape and list(r.shape) != shape):
                found |= {"residual"}
            if not usable(a["residual_scale"]):
                found |= {"residual_scale"}
            if r.dtype in BYTES and not is_code(a["residual_zero_point"], r.dtype):
                found |= {"residual_zero_point"}
        if out and shape:
            o = a["out"]
            nhwc = o.dim() == 4 and o.is_contiguous(memory_format=torch.channels_last)
            if (
                list(o.shape) != shape
                or not (nhwc or o.numel() == 0)
                or any(overlap(o, a[n]) for n in ("x_q", "w_q", "w_scale", "bias", "residual"))
            ):
                found |= {"out"}
        return found

    def reference(a: Arguments) -> list[Expected]:
        a = with_defaults(a)
        dtype = a["out"].dtype if out else a["out_dtype"]
        inputs = {n: v for n, v in a.items() if n not in ("out", "out_dtype")}
        shape = conv_shape(a, a["x_q"], a["w_q"])
        if 0 in shape:
            return [Expected(torch.zeros(shape), dtype)]
        inputs["w_scale"] = a["w_scale"].reshape(-1)
        y = conv2d_int8_ref.conv2d_int8(**{**inputs, "out_scale": 0.0, "dtype": torch.float64})
        magnitude = abs(a["x_scale"]) * other(a["w_scale"]) * other(a["w_q"]) * 100 + other(a["bias"])
        if dtype in BYTES:
            q = requantise(y, a["out_scale"], a["out_zero_point"], dtype)
            return [Expected(q, dtype, codes=1)]
        return [Expected(y, dtype, exact=False, magnitude=magnitude)]

    return Op(
        "conv2d_int8", draw_int8, faults, reference, kernels="conv2d_int8", elements=conv_elements,
        overload="out" if out else "default", written=("out",) if out else (),
    )  # fmt: skip


def usable(scale: float) -> bool:
    s = torch.tensor(scale, dtype=FLOAT32)
    return bool(s.isfinite() and s != 0)


# pools


def draw_max(draw: Draw) -> Arguments:
    x = draw_image(draw, draw.choice((0, 1, 3, 16, 17, 33, 64)), draw.choice(BYTES), low=0, high=127)
    a: Arguments = {"x_q": x}
    draw_window(draw, a, *x.shape[2:])
    a["kernel_size"] = a.pop("kernel")
    a["padding"] = [min(p, k // 2) for p, k in zip(a["padding"], a["kernel_size"])]
    a["kernel_size"] = [min(k, n + 2 * p) for k, n, p in zip(a["kernel_size"], x.shape[2:], a["padding"])]
    a["dilation"] = [1, 1] if draw.chance(0.7) else a["dilation"]
    a["ceil_mode"] = draw.chance(0.3)
    return a


def pool_faults(a: Arguments, empty: tuple[str, ...]) -> set[str]:
    x, most, found = a["x_q"], (1 << 31) - 1, set()
    pairs = {"kernel_size": (1, 1), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
    window = {n: a.get(n, list(default)) for n, default in pairs.items()}
    for n, (least, _) in pairs.items():
        if not window[n] and n in empty:
            window[n] = list(pairs[n])
        elif bad_pair(window[n], least, most):
            found.add(n)
    if x.dtype not in BYTES or x.dim() != 4 or 0 in x.shape[2:]:
        return found | {"x_q"}
    if found:
        return found
    for d in range(2):
        k, p = window["kernel_size"][d], window["padding"][d]
        if p > k // 2:
            found.add("padding")
        elif x.shape[2 + d] + 2 * p < window["dilation"][d] * (k - 1) + 1:
            found.add("kernel_size")
    return found


def expect_max(a: Arguments) -> list[Expected]:
    x = a["x_q"]
    a = {**a, "padding": a["padding"] or [0, 0], "dilation": a["dilation"] or [1, 1]}
    if x.numel() == 0:
        shape = torch.nn.functional.max_pool2d(
            torch.zeros(1, 1, *x.shape[2:]), *(a[n] for n in ("kernel_size", "stride", "padding", "dilation")),
            ceil_mode=a["ceil_mode"],
        ).shape[2:]  # fmt: skip
        return [Expected(torch.zeros((*x.shape[:2], *shape)), x.dtype)]
    return [Expected(pool_ref.max_pool2d_int8(**a), x.dtype)]


def draw_average(draw: Draw) -> Arguments:
    a = draw_max(draw)
    del a["dilation"], a["ceil_mode"]
    if draw.chance(0.4):
        a["kernel_size"], a["stride"], a["padding"] = [], [], [0, 0]
    a["x_scale"], a["x_zero_point"] = draw.choice((0.02, 1.0, -3.0)), code(draw, a["x_q"].dtype)
    dtype = draw.choice((*FLOATS, *BYTES))
    a["out_dtype"] = dtype
    a["out_scale"] = draw.choice((0.05, 1.0)) if dtype in BYTES else 0.0
    a["out_zero_point"] = code(draw, dtype) if dtype in BYTES else 0
    return a


def average_faults(a: Arguments) -> set[str]:
    a, x = dict(a), a["x_q"]
    found = set()
    if not a["kernel_size"]:
        if a["stride"]:
            found.add("stride")
        if a["padding"] not in ([0, 0], []):
            found.add("padding")
        a["kernel_size"] = list(x.shape[2:]) if x.dim() == 4 else [1, 1]
    a["stride"] = a["stride"] or a["kernel_size"]
    found |= pool_faults(a, ("padding",))
    if x.dtype in BYTES and not is_code(a["x_zero_point"], x.dtype):
        found.add("x_zero_point")
    dtype, scale = a["out_dtype"], torch.tensor(a["out_scale"], dtype=FLOAT32)
    if a["out_scale"] == 0:
        if dtype not in FLOATS:
            found.add("out_dtype")
    else:
        if not (scale > 0 and scale.isfinite() and (1 / scale).isfinite()):
            found.add("out_scale")
        if dtype not in BYTES or not is_code(a["out_zero_point"], dtype):
            found |= {"out_dtype", "out_zero_point"}
    return found


def expect_average(a: Arguments) -> list[Expected]:
    x, dtype = a["x_q"], a["out_dtype"]
    padding = a["padding"] or [0, 0]
    kernel = list(a["kernel_size"] or x.shape[2:])
    stride = a["stride"] or kernel
    if x.numel() == 0:
        spatial = [positions(*axis, 1) for axis in zip(x.shape[2:], kernel, stride, padding, padding)]
        return [Expected(torch.zeros((*x.shape[:2], *spatial)), dtype)]
    y = pool_ref.avg_pool2d_int8(x, a["x_scale"], a["x_zero_point"], kernel, stride, padding)
    if dtype in BYTES:
        y = torch.nan_to_num(y * (1 / torch.tensor(a["out_scale"], dtype=FLOAT32)), nan=0.0)
        low = -127 if dtype == INT8 else 0
        y = (y.clamp(-1024, 1024).round() + a["out_zero_point"]).clamp(low, 127 if low else 255)
    return [Expected(y, dtype)]


OPS = [
    Op(
        "conv2d",
        draw_conv_float,
        conv_float_faults,
        expect_conv_float,
        kernels="conv2d",
        elements=conv_elements,
    ),
    conv_int8_op(False),
    conv_int8_op(True),
    Op(
        "max_pool2d_int8",
        draw_max,
        lambda a: pool_faults(a, ("padding", "dilation")),
        expect_max,
        kernels="pool",
    ),
    Op("avg_pool2d_int8", draw_average, average_faults, expect_average, kernels="pool"),
]
