"""Layers over the compressed ops, for use inside one's own modules; their state_dict is canonical."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import ArgumentError
from .nn_grouped import LinearGrouped

__all__ = ["LinearGrouped", "LinearInt8"]

_ops = torch.ops.narrowcast


class LinearInt8(nn.Module):
    """``y = activation(x W^T + bias)`` with int8 weights and activations quantised on the way.

    ``weight`` int8 [N, K] and ``weight_scale`` float32 [N] with W = weight * weight_scale[:, None];
    ``bias`` [N] or None. These three are the state_dict; the order in which this CPU reads the
    weight is made at the first call and never saved. Other devices use the weight as it is.

    group_size: 0 for one activation scale per token, or 32, 64, ... columns per scale.
    asymmetric: activation range from its minimum to its maximum (group_size 0 only).
    """

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None = None,
        *,
        activation: str = "none",
        group_size: int = 0,
        asymmetric: bool = False,
    ):
        super().__init__()
        if weight.dtype != torch.int8 or weight.dim() != 2:
            raise ArgumentError(f"weight must be int8 [N, K], got {weight.dtype} {list(weight.shape)}")
        if weight_scale.shape != weight.shape[:1]:
            raise ArgumentError(f"weight_scale must be [{weight.shape[0]}], got {list(weight_scale.shape)}")
        if group_size < 0 or group_size % 32 or (group_size and weight.shape[1] % group_size):
            raise ArgumentError(
                "group_size must be 0 or a multiple of 32 that divides K = "
                f"{weight.shape[1]}, got {group_size}"
            )
        if asymmetric and group_size:
            raise ArgumentError("asymmetric must be False when group_size is set")
        self.out_features, self.in_features = weight.shape
        self.activation, self.group_size, self.asymmetric = activation, group_size, asymmetric
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale.float())
        self.register_buffer("bias", None if bias is None else bias.detach())
        self._panels: Tensor | None = None
        self._made_from: tuple = ()

    @classmethod
    def from_float(cls, linear: nn.Linear, **options) -> LinearInt8:
        """Rounds the weight of a layer: scale = max |w| / 127 per output channel."""
        weight, scale = _ops.quantize_int8(linear.weight.detach())
        return cls(weight, scale, linear.bias, **options)

    def _cpu_panels(self) -> Tensor:
        # An inference tensor does not count its changes.
        version = None if self.weight.is_inference() else self.weight._version
        made_from = (self.weight.data_ptr(), version, _ops._isa())
        if self._panels is None or self._made_from != made_from:
            self._panels, self._made_from = _ops._linear_int8_pack(self.weight), made_from
        return self._panels

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [..., K], residual [..., N] -> [..., N] in the dtype of x."""
        options = {"group_size": self.group_size, "asymmetric": self.asymmetric}
        rest = (self.weight_scale, self.bias, self.activation, residual)
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return _ops.linear_dynamic_int8(x, self.weight, *rest, **options)
        return _ops._linear_dynamic_int8_packed(x, self._cpu_panels(), self.out_features, *rest, **options)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"group_size={self.group_size}, asymmetric={self.asymmetric}"
        )
