"""Depthwise convolutions with fast gradients, for any forward pass: torch's own module does not know of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fedofa.finetune.ops.convolution import ConvGeometry


class FastDepthwise(TorchFunctionMode):
    """Within the context, depthwise convolutions get the gradients of `ConvGeometry`, computed in float32.

    Results are torch's own, under autocast in its lower precision. That is what makes bfloat16 worth its while in
    networks with depthwise convolutions: torch's gradients of those take several times as long there as in float32.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Every function of torch passes through here; all but depthwise convolutions of trained inputs go on."""
        given = kwargs or {}
        if func is torch.conv2d and not given and len(args) == 7:
            x, weight, bias, stride, padding, dilation, groups = args
            if _is_depthwise(x, weight, bias, padding, groups):
                geometry = ConvGeometry(_pair(stride), _pair(padding), _pair(dilation), groups)
                if geometry.is_depthwise(weight):
                    return _in_autocast(x, weight, geometry)
        return func(*args, **given)


def _is_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Any, groups: int) -> bool:
    return bias is None and groups == x.shape[1] > 1 and not isinstance(padding, str) and x.dim() == 4


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _in_autocast(x: Tensor, weight: Tensor, geometry: ConvGeometry) -> Tensor:
    """The convolution in the precision that autocast asks for, if it is on."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
    with torch.autocast(device, enabled=False):
        return _Depthwise.apply(x, weight, geometry)  # type: ignore[return-value]


class _Depthwise(torch.autograd.Function):
    """A depthwise convolution without a bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, geometry: ConvGeometry) -> Tensor:  # type: ignore[override]
        ctx.geometry = geometry
        ctx.shape = x.shape
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return geometry.forward(x, weight, None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        geometry: ConvGeometry = ctx.geometry
        wide = grad.float()
        of_input = of_weight = None
        if ctx.needs_input_grad[0]:
            of_input = geometry.input_gradient(wide, weight.float(), ctx.shape).to(grad.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = geometry.weight_gradient(wide, x.float(), weight.float()).to(weight.dtype)
        return of_input, of_weight, None
