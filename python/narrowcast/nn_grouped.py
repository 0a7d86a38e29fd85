"""A drop-in layer for torch.nn.Linear whose weight is int4 or int8 in groups."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import ArgumentError
from .formats import GroupedWeight

_ops = torch.ops.narrowcast


class LinearGrouped(nn.Module):
    """``y = activation(x W^T + bias)`` with a :class:`~narrowcast.formats.GroupedWeight`.

    The state_dict holds the canonical weight (``packed``, ``scale``, ``offset``, ``bias``); the order
    in which this CPU reads it is made at the first call and never saved. On other devices the
    canonical weight is used as it is.

    weight: group_size must be a multiple of 32.
    activation_bits: 8, 16 or 32, the bits with which an element of x enters the products.
    """

    def __init__(
        self,
        weight: GroupedWeight,
        bias: Tensor | None = None,
        *,
        activation: str = "none",
        activation_bits: int = 16,
    ):
        super().__init__()
        if weight.group_size % 32:
            raise ArgumentError(f"group_size must be a multiple of 32, got {weight.group_size}")
        if activation_bits not in (8, 16, 32):
            raise ArgumentError(f"activation_bits must be 8, 16 or 32, got {activation_bits}")
        self.out_features, self.in_features = weight.shape
        self.bits, self.group_size = weight.bits, weight.group_size
        self.activation, self.activation_bits = activation, activation_bits
        self.register_buffer("packed", weight.packed)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("offset", weight.offset)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self._panels: Tensor | None = None
        self._made_from: tuple = ()

    @property
    def weight(self) -> GroupedWeight:
        """The canonical weight."""
        return GroupedWeight(self.bits, self.group_size, self.packed, self.scale, self.offset)

    def _cpu_panels(self) -> Tensor:
        parts = (self.packed, self.scale, self.offset)
        # Tensors made under inference_mode count no versions: they are taken as constant.
        made_from = tuple(
            None if t is None else (t.data_ptr(), None if t.is_inference() else t._version) for t in parts
        )
        if self._panels is None or self._made_from != made_from:
            self._panels = _ops._linear_grouped_pack(*parts, self.group_size, self.bits)
            self._made_from = made_from
        return self._panels

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [..., K], residual [..., N] -> [..., N] in the dtype of x."""
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return _ops.linear_grouped(
                x, self.packed, self.scale, self.offset, self.group_size, self.bits, self.bias,
                self.activation, residual, activation_bits=self.activation_bits,
            )  # fmt: skip
        return _ops._linear_grouped_packed(
            x, self._cpu_panels(), self.out_features, self.group_size, self.bits,
            self.scale.dtype == torch.float16, self.offset is not None, self.bias,
            self.activation, residual, activation_bits=self.activation_bits,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, activation_bits={self.activation_bits}"
        )
