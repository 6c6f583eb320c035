"""Activations and norms as the lean operations use them: computed in place, with backward passes by hand."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedofa.finetune.ops.codes import gradient_inside, gradient_swish, pack_inside, pack_swish
from fedofa.types.errors import ConfigError

_aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Activation:
    """One activation function.

    Args:
        apply: the result of a tensor; with True it is written over the tensor.
        gradient: the input's gradient from the result's and the input.
        upper, slope: of a clamp: its derivative is `slope` where the result lies in (0, upper), 0 elsewhere. With slope
            0 the function is hard swish.
    """

    apply: Callable[[Tensor, bool], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]
    upper: float | None
    slope: float

    @property
    def is_clamp(self) -> bool:
        """Whether one bit a value stands for the derivative without loss; otherwise one byte does, rounded."""
        return self.slope > 0

    def pack(self, x: Tensor, result: Tensor) -> Tensor:
        """The derivative's code, from the `dense` result for a clamp, from the `dense` input otherwise."""
        return pack_inside(result, self.upper) if self.is_clamp else pack_swish(x)

    def coded_gradient(self, grad: Tensor, code: Tensor) -> Tensor:
        """The input's gradient from the result's and the code; `grad` lies in memory as what was packed did."""
        return gradient_inside(grad, code, self.slope) if self.is_clamp else gradient_swish(grad, code)


_RELU = Activation(functional.relu, lambda grad, x: _aten.threshold_backward(grad, x, 0.0), None, 1.0)
_RELU6 = Activation(
    lambda x, in_place: functional.hardtanh(x, 0.0, 6.0, in_place),
    lambda grad, x: _aten.hardtanh_backward(grad, x, 0.0, 6.0),
    6.0,
    1.0,
)
_H_SWISH = Activation(functional.hardswish, _aten.hardswish_backward, None, 0.0)
_H_SIGMOID = Activation(functional.hardsigmoid, _aten.hardsigmoid_backward, 1.0, 1 / 6)

ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.ReLU: _RELU,
    nn.ReLU6: _RELU6,
    nn.Hardswish: _H_SWISH,
    nn.Hardsigmoid: _H_SIGMOID,
}


def affine(x: Tensor, scale: Tensor, shift: Tensor, *, in_place: bool) -> Tensor:
    """`x * scale + shift`, a scale and a shift for every channel, `(1 or batch, channels, 1, 1)`."""
    return torch.addcmul(shift, x, scale, out=x if in_place else torch.empty_like(x))


class Norm(ABC):
    """One norm: an affine map of every channel, whose coefficients may depend on the input."""

    @abstractmethod
    def keeps_input(self, *, input_trains: bool, weight_trains: bool) -> bool:
        """Whether the backward pass needs the input; `input_trains`: a gradient of the input is wanted."""

    @abstractmethod
    def forward(self, x: Tensor, weight: Tensor, bias: Tensor, *, in_place: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The result; and its scale and shift, `(1 or batch, channels, 1, 1)`, and two statistics for `input_kept`.

        `affine` with scale and shift gives the result again, to rounding. With `in_place` it may be written over `x`.
        """

    @abstractmethod
    def input_kept(
        self, grad: Tensor, x: Tensor, weight: Tensor, statistics: tuple[Tensor, ...], wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of input, weight and bias, those that are wanted at least."""


@final
class FrozenBatchNorm(Norm):
    """Batch norm that normalises with its running statistics."""

    def __init__(self, layer: nn.BatchNorm2d) -> None:
        self._layer = layer

    def keeps_input(self, *, input_trains: bool, weight_trains: bool) -> bool:
        return weight_trains

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor, *, in_place: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        mean, variance = self._layer.running_mean, self._layer.running_var
        if mean is None or variance is None:
            raise ConfigError("batch norm with frozen statistics: expected running statistics, found none")
        scale = (variance + self._layer.eps).rsqrt_() * weight
        shift = torch.addcmul(bias, scale, mean, value=-1).view(1, -1, 1, 1)
        scale = scale.view(1, -1, 1, 1)
        return affine(x, scale, shift, in_place=in_place), (scale, shift, mean, variance)

    def input_kept(
        self, grad: Tensor, x: Tensor, weight: Tensor, statistics: tuple[Tensor, ...], wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        eps = self._layer.eps
        return _aten.native_batch_norm_backward(grad, x, weight, *statistics, None, None, False, eps, wanted)


@final
class BatchNorm(Norm):
    """Batch norm that normalises with the batch's own statistics and leaves the running ones alone."""

    def __init__(self, layer: nn.BatchNorm2d) -> None:
        self._eps = layer.eps

    def keeps_input(self, *, input_trains: bool, weight_trains: bool) -> bool:
        return input_trains or weight_trains

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor, *, in_place: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        if x.numel() == x.shape[1]:
            raise ConfigError("batch norm: expected more than one value a channel to take statistics of, found one")
        y, mean, rstd = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, self._eps)
        scale = rstd * weight
        shift = torch.addcmul(bias, scale, mean, value=-1)
        return y, (scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1), mean, rstd)

    def input_kept(
        self, grad: Tensor, x: Tensor, weight: Tensor, statistics: tuple[Tensor, ...], wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return _aten.native_batch_norm_backward(grad, x, weight, None, None, *statistics, True, self._eps, wanted)


@final
class GroupNorm(Norm):
    """Group norm."""

    def __init__(self, layer: nn.GroupNorm) -> None:
        self._groups = layer.num_groups
        self._eps = layer.eps

    def keeps_input(self, *, input_trains: bool, weight_trains: bool) -> bool:
        return input_trains or weight_trains

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor, *, in_place: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        batch, channels, height, width = x.shape
        y, mean, rstd = torch.native_group_norm(
            x, weight, bias, batch, channels, height * width, self._groups, self._eps
        )
        size = channels // self._groups
        scale = torch.repeat_interleave(rstd, size, 1) * weight
        shift = torch.addcmul(bias, scale, torch.repeat_interleave(mean, size, 1), value=-1)
        return y, (scale.view(batch, channels, 1, 1), shift.view(batch, channels, 1, 1), mean, rstd)

    def input_kept(
        self, grad: Tensor, x: Tensor, weight: Tensor, statistics: tuple[Tensor, ...], wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The input's gradient is asked for in any case: torch 2.13 crashes without, where channels are innermost."""
        batch, channels, height, width = x.shape
        return _aten.native_group_norm_backward(
            *(grad, x, *statistics, weight, batch, channels, height * width, self._groups), (True, *wanted[1:])
        )


def build_norm(layer: nn.Module) -> Norm | None:
    """The norm of a layer with an affine, batch norm as its mode says; None for a layer that is no such norm."""
    if isinstance(layer, nn.GroupNorm) and layer.affine:
        return GroupNorm(layer)
    if isinstance(layer, nn.BatchNorm2d) and layer.affine and layer.track_running_stats:
        return BatchNorm(layer) if layer.training else FrozenBatchNorm(layer)
    return None
