"""A convolution's weights rounded to 8 or 4 bits per output channel, so that its outputs change least.

Three roundings of one layer, each for the inputs that the layers before it, already quantised, hand it:

- the nearest code under a searched scale,
- GPTQ with coordinate descent on the layer's unfolded inputs (``gptq.py``),
- AdaRound: whether each weight goes up or down is learnt by gradient descent on the layer's output behind its
  activation (Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020).

The one with the least output error on rows that none of them saw is taken. In all of them the bias takes up the
mean error of a channel, so rounding only has to care for what varies.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from narrowcast.graph.passes.match import Layer

from .gptq import Grid, round_weight
from .sequential import made_up

#: Per output channel, with a scale of either sign in float32: 4 bits use all of -8..7.
GRIDS = {8: Grid(-127, 127, False, half=False), 4: Grid(-8, 7, False, half=False)}
#: Unfolded rows of a layer's input that are looked at; most numbers of them (depthwise layers are wide).
ROWS, NUMBERS = 8192, 1 << 23
#: Share of the rows that judges the roundings and takes no part in them.
JUDGING = 1 / 6
#: Added to the diagonal of second moments, relative to its mean. Much: pictures are few and alike, and without it
#: errors are shifted to inputs that hardly vary in them. EfficientNet-Lite0 in 8 bits, on other photographs than
#: those calibrated on: 0.01 agrees in 81 % of the crops, 1 in 96 %, nearest codes in 93 %.
RIDGE = 1.0
#: How far AdaRound begins at what GPTQ chose (1), rather than at the weight itself (0).
TRUST = 0.5
#: AdaRound: steps, rows per step, learning rate, weight of the term that drives a choice to up or down, the
#: exponents it begins and ends with, and the share of the steps before it sets in.
STEPS, BATCH, RATE, DRIVE, BETA, WARM_UP = 400, 512, 2e-2, 50.0, (20.0, 2.0), 0.2
_STRETCH = (1.2, -0.1)  #: of the sigmoid, so that 0 and 1 are reached

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": torch.relu,
    "relu6": lambda x: x.clamp(0, 6),
    "hardswish": torch.nn.functional.hardswish,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


@dataclass
class RoundedConv:
    """codes int8 [O, C / groups, KH, KW], bias float32 [O] with the mean error taken up, and scale: float32 [O], or
    float16 values as float32 [O, S] for S groups of inputs."""

    bits: int
    codes: Tensor
    scale: Tensor
    bias: Tensor
    rule: str = "nearest"
    name: str = ""  #: of the layer
    sqnr_db: float | None = None  #: of the layer's output on the rows that judge
    notes: list[str] = field(default_factory=list)

    def dequantize(self) -> Tensor:
        shape = self.codes.shape
        return (self.codes.reshape(*self.scale.shape, -1) * self.scale[..., None]).reshape(shape)


@dataclass
class Rows:
    """A layer's unfolded inputs: what it will read and what it should have read, and what it should make of it.

    ours, float [G, R, K]; aim [G, R, N / G], the float layer's outputs before the activation; residuals likewise
    or None (``added``: the quantised one, ``wanted``: the float one).
    """

    ours: Tensor
    aim: Tensor
    added: Tensor | None = None
    wanted: Tensor | None = None

    def part(self, first: int, last: int) -> Rows:
        cut = lambda t: None if t is None else t[:, first:last]  # noqa: E731
        return Rows(cut(self.ours), cut(self.aim), cut(self.added), cut(self.wanted))

    @property
    def count(self) -> int:
        return self.ours.shape[1]


def places(shape: tuple[int, ...], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """``count`` pixels (image, row, column) of an output [B, O, H, W], none twice."""
    images, _, height, width = shape
    total = images * height * width
    picked = torch.randperm(total, generator=generator)[:count]
    return picked // (height * width), picked // width % height, picked % width


def unfold(x: Tensor, layer: Layer, at: tuple[Tensor, Tensor, Tensor], kernel: tuple[int, int]) -> Tensor:
    """What a convolution multiplies its filters with at some output pixels: [G, R, C / G * KH * KW]."""
    image, row, column = at
    (sh, sw), (ph, pw), (dh, dw) = (
        list(layer[k] or d)[:2] for k, d in (("stride", [1, 1]), ("padding", [0, 0]), ("dilation", [1, 1]))
    )
    taps = []
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            h, w = row * sh - ph + i * dh, column * sw - pw + j * dw
            inside = (h >= 0) & (h < x.shape[2]) & (w >= 0) & (w < x.shape[3])
            values = x[image, :, h.clamp(0, x.shape[2] - 1), w.clamp(0, x.shape[3] - 1)]
            taps.append(values * inside[:, None])
    rows = torch.stack(taps, dim=-1)  # [R, C, taps]
    groups = layer["groups"] or 1
    return rows.reshape(rows.shape[0], groups, -1).transpose(0, 1).float()


def rows_wanted(weight: Tensor, groups: int) -> int:
    """How many rows to draw for a layer."""
    return max(256, min(ROWS, NUMBERS // (groups * weight[0].numel())))


# --- one layer ------------------------------------------------------------------------------------


def round_conv(
    layer: Layer, weight: Tensor, bias: Tensor | None, rows: Rows | None, bits: int, learn: bool,
    generator: torch.Generator, size: int = 0,
) -> RoundedConv:  # fmt: skip
    """Rounds the weight [O, C / groups, KH, KW] of a call of ``narrowcast.conv2d``.

    rows: of its inputs; None where no data reached it (nearest codes, and a note says so). learn: try AdaRound.
    size: weights that share a scale, a divisor of C / groups * KH * KW; 0: all of an output channel.
    """
    groups = layer["groups"] or 1
    grid = dataclasses.replace(GRIDS[bits], half=size > 0)
    w = weight.detach().float().reshape(groups, weight.shape[0] // groups, -1)
    size = size or w.shape[2]
    bias = torch.zeros(weight.shape[0]) if bias is None else bias.detach().float()
    if rows is None or rows.count < 8 or not bool(rows.ours.any()):
        scale, codes = _by_gptq(w, None, grid, size)
        made = _result(bits, codes, scale, bias, weight, "nearest")
        made.notes.append("no calibration data reached it: rounded to nearest")
        return made
    judging = max(1, int(rows.count * JUDGING))
    seen, judge = rows.part(judging, rows.count), rows.part(0, judging)
    x_mean, aim_mean = seen.ours.mean(1, keepdim=True), seen.aim.mean(1, keepdim=True)
    x = seen.ours - x_mean
    covariance = x.transpose(1, 2) @ x / seen.count
    missing = (seen.aim - aim_mean - x @ w.transpose(1, 2)).transpose(1, 2) @ x / seen.count
    better = w + torch.stack([made_up(c, m, RIDGE) for c, m in zip(covariance, missing)])
    damped = covariance + RIDGE * torch.diag_embed(
        covariance.diagonal(dim1=1, dim2=2).mean(1, True).expand(-1, w.shape[2])
    )
    scale, codes = _by_gptq(better, damped, grid, size)
    nearest = (better / _spread(scale, w)).round_().clamp_(grid.low, grid.high)
    found = {"nearest": (nearest, scale), "gptq": (codes, scale)}
    act = _activation(layer)
    if learn:
        problem = (x, seen.aim, aim_mean, seen.added, _behind(seen.aim, seen.wanted, act))
        found["adaround"] = (_adaround(better, scale, codes, problem, act, grid, generator), scale)
    aim = _behind(judge.aim, judge.wanted, act)
    errors = {}
    for rule, (q, s) in found.items():
        restored = q * _spread(s, w)
        y = (judge.ours - x_mean) @ restored.transpose(1, 2) + aim_mean
        errors[rule] = (_behind(y, judge.added, act) - aim).square().sum().item()
    rule = min(errors, key=errors.__getitem__)
    codes, scale = found[rule]
    shift = aim_mean - x_mean @ (codes * _spread(scale, w)).transpose(1, 2)  # [G, 1, N / G]
    made = _result(bits, codes, scale, shift.reshape(-1), weight, rule)
    signal = aim.square().sum().item()
    made.sqnr_db = 200.0 if errors[rule] == 0 else 10 * math.log10(max(signal, 1e-30) / errors[rule])
    return made


def _result(bits: int, codes: Tensor, scale: Tensor, bias: Tensor, weight: Tensor, rule: str) -> RoundedConv:
    codes = codes.to(torch.int8).reshape(weight.shape).contiguous()
    scale = scale.reshape(weight.shape[0], -1)
    return RoundedConv(bits, codes, scale.squeeze(1).contiguous(), bias, rule)


def _by_gptq(w: Tensor, covariance: Tensor | None, grid: Grid, size: int) -> tuple[Tensor, Tensor]:
    """(scale [G, N, K / size], codes [G, N, K]) of weights [G, N, K]."""
    scales, codes = [], []
    for g in range(w.shape[0]):
        # A channel that never changes has nothing to weigh its taps by.
        known = covariance is not None and bool(covariance[g].diagonal().any())
        rounded = round_weight(w[g], covariance[g] if known else None, grid, size)
        scales.append(rounded.scale)
        codes.append(rounded.codes.float())
    return torch.stack(scales), torch.stack(codes)


def _spread(scale: Tensor, w: Tensor) -> Tensor:
    """The scale of every weight of [G, N, K]."""
    return scale.repeat_interleave(w.shape[2] // scale.shape[2], dim=2)


def _activation(layer: Layer):
    """(activation, post_activation) of a layer as functions."""
    return ACTIVATIONS[layer["activation"] or "none"], ACTIVATIONS[layer["post_activation"] or "none"]


def _behind(z: Tensor, residual: Tensor | None, act) -> Tensor:
    y = act[0](z)
    return act[1](y if residual is None else y + residual)


# --- AdaRound -------------------------------------------------------------------------------------


def _adaround(
    w: Tensor, scale: Tensor, start: Tensor, problem: tuple, act, grid: Grid, generator: torch.Generator
) -> Tensor:
    """Codes [G, N, K] next to w / scale, learnt from the codes of ``start`` on."""
    x, aim_before, aim_mean, added, aim = problem
    scale = _spread(scale, w)
    exact = w / scale
    # Where GPTQ went further than a neighbour, the choice is between its code and the next one towards w.
    base = torch.minimum(torch.maximum(exact.floor(), start - 1), start).clamp(grid.low, grid.high - 1)
    share = (exact - base).clamp(0.02, 0.98)
    share = share * (1 - TRUST) + (start - base) * TRUST
    v = torch.logit(((share - _STRETCH[1]) / _STRETCH[0]).clamp(0.01, 0.99)).requires_grad_()
    optimiser = torch.optim.Adam([v], lr=RATE)
    rows = x.shape[1]
    # Errors are told in those of GPTQ, so that DRIVE means the same for every layer.
    y = _behind(x @ (start * scale).transpose(1, 2) + aim_mean, added, act)
    unit = (y - aim).square().sum(-1).mean().clamp(min=1e-20)
    with torch.enable_grad():
        for step in range(STEPS):
            picked = torch.randint(rows, (min(BATCH, rows),), generator=generator)
            up = (torch.sigmoid(v) * _STRETCH[0] + _STRETCH[1]).clamp(0, 1)
            soft = (base + up) * scale
            y = x[:, picked] @ soft.transpose(1, 2) + aim_mean
            y = _behind(y, None if added is None else added[:, picked], act)
            loss = (y - aim[:, picked]).square().sum(-1).mean() / unit
            progress = (step / STEPS - WARM_UP) / (1 - WARM_UP)
            if progress > 0:
                beta = BETA[1] + (BETA[0] - BETA[1]) * (1 + math.cos(math.pi * progress)) / 2
                loss = loss + DRIVE * (1 - (2 * up - 1).abs().pow(beta)).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    up = (torch.sigmoid(v.detach()) * _STRETCH[0] + _STRETCH[1]).clamp(0, 1)
    return base + up.round()
