"""Activations and norms as the lean operations use them: computed in place, with backward passes by hand."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedofa.finetune.ops.codes import gradient_inside, gradient_swish, pack_inside, pack_swish
from fedofa.finetune.ops.sweeps import Sweep
from fedofa.types.errors import ConfigError

_aten = torch.ops.aten


Gradient = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, slots=True)
class Activation:
    """One activation function.

    Args:
        apply: the result of a tensor; with True it is written over the tensor.
        gradient: the input's gradient from the result's and the input, written to the third where that is given.
        upper, slope: of a clamp: its derivative is `slope` where the result lies in (0, upper), 0 elsewhere. With slope
            0 the function is hard swish.
    """

    apply: Callable[[Tensor, bool], Tensor]
    gradient: Gradient
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


def _clamp_gradient(upper: float) -> Gradient:
    def gradient(grad: Tensor, x: Tensor, out: Tensor | None) -> Tensor:
        if out is None:
            return _aten.hardtanh_backward(grad, x, 0.0, upper)
        return _aten.hardtanh_backward.grad_input(grad, x, 0.0, upper, grad_input=out)

    return gradient


def _relu_gradient(grad: Tensor, x: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        return _aten.threshold_backward(grad, x, 0.0)
    return _aten.threshold_backward.grad_input(grad, x, 0.0, grad_input=out)


def _h_swish_gradient(grad: Tensor, x: Tensor, out: Tensor | None) -> Tensor:
    return _aten.hardswish_backward(grad, x) if out is None else _aten.hardswish_backward.out(grad, x, out=out)


def _h_sigmoid_gradient(grad: Tensor, x: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        return _aten.hardsigmoid_backward(grad, x)
    return _aten.hardsigmoid_backward.grad_input(grad, x, grad_input=out)


_RELU = Activation(functional.relu, _relu_gradient, None, 1.0)
_RELU6 = Activation(lambda x, in_place: functional.hardtanh(x, 0.0, 6.0, in_place), _clamp_gradient(6.0), 6.0, 1.0)
_H_SWISH = Activation(functional.hardswish, _h_swish_gradient, None, 0.0)
_H_SIGMOID = Activation(functional.hardsigmoid, _h_sigmoid_gradient, 1.0, 1 / 6)

ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.ReLU: _RELU,
    nn.ReLU6: _RELU6,
    nn.Hardswish: _H_SWISH,
    nn.Hardsigmoid: _H_SIGMOID,
}


def affine(x: Tensor, scale: Tensor, shift: Tensor, act: Activation | None = None, *, in_place: bool) -> Tensor:
    """The activation of `x * scale + shift`, a scale and a shift for every channel, `(1 or batch, channels, 1, 1)`."""
    result = x if in_place else torch.empty_like(x)
    sweep = Sweep(x, examples_differ=len(scale) > 1)
    scales, shifts = sweep.spread(scale), sweep.spread(shift)
    for group, (source, target) in sweep.parts(x, result):
        torch.addcmul(shifts[group], source, scales[group], out=target)
        if act is not None:
            act.apply(target, True)
    return result


Coefficients = tuple[Tensor, Tensor, Tensor, Tensor]
"""Scale and shift of a norm's affine map, `(1 or batch, channels, 1, 1)`; its input's mean and reciprocal deviation."""
Wanted = tuple[bool, bool, bool]
"""Which gradients are asked for: the input's, the weight's, the bias's."""
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class Norm(ABC):
    """One norm: an affine map of every channel, whose coefficients may depend on the input."""

    @abstractmethod
    def keeps_input(self, *, input_trains: bool, weight_trains: bool) -> bool:
        """Whether the backward pass needs the input; `input_trains`: a gradient of the input is wanted."""

    @abstractmethod
    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor, act: Activation | None, *, in_place: bool
    ) -> tuple[Tensor, Coefficients]:
        """The activation of the norm's result, and the coefficients with which `affine` gives it again, to rounding.

        With `in_place` it may be written over `x`.
        """

    @abstractmethod
    def gradients(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        coefficients: Coefficients,
        act: Activation | None,
        wanted: Wanted,
        *,
        in_place: bool,
    ) -> Gradients:
        """The gradients of input, weight and bias, those that are wanted at least, from that of the activation.

        With `in_place` the input's may be written over `x`.
        """


@final
class FrozenBatchNorm(Norm):
    """Batch norm that normalises with its running statistics."""

    def __init__(self, layer: nn.BatchNorm2d) -> None:
        self._layer = layer

    def keeps_input(self, *, input_trains: bool, weight_trains: bool) -> bool:
        return weight_trains

    def coefficients(self, weight: Tensor, bias: Tensor) -> Coefficients:
        """The coefficients of `forward`; the input has no part in them."""
        mean, variance = self._layer.running_mean, self._layer.running_var
        if mean is None or variance is None:
            raise ConfigError("batch norm with frozen statistics: expected running statistics, found none")
        return _coefficients(weight, bias, mean, (variance + self._layer.eps).rsqrt_())

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor, act: Activation | None, *, in_place: bool
    ) -> tuple[Tensor, Coefficients]:
        coefficients = self.coefficients(weight, bias)
        return affine(x, *coefficients[:2], act, in_place=in_place), coefficients

    def gradients(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        coefficients: Coefficients,
        act: Activation | None,
        wanted: Wanted,
        *,
        in_place: bool,
    ) -> Gradients:
        return _batch_norm_gradients(grad, x, coefficients, act, wanted, in_place=in_place, statistics_follow=False)


@final
class BatchNorm(Norm):
    """Batch norm that normalises with the batch's own statistics and leaves the running ones alone."""

    def __init__(self, layer: nn.BatchNorm2d) -> None:
        self._eps = layer.eps

    def keeps_input(self, *, input_trains: bool, weight_trains: bool) -> bool:
        return input_trains or weight_trains

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor, act: Activation | None, *, in_place: bool
    ) -> tuple[Tensor, Coefficients]:
        if x.numel() == x.shape[1]:
            raise ConfigError("batch norm: expected more than one value a channel to take statistics of, found one")
        mean, variance = _aten.batch_norm_update_stats(x, None, None, 0.0)
        coefficients = _coefficients(weight, bias, mean, variance.add_(self._eps).rsqrt_())
        return affine(x, *coefficients[:2], act, in_place=in_place), coefficients

    def gradients(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        coefficients: Coefficients,
        act: Activation | None,
        wanted: Wanted,
        *,
        in_place: bool,
    ) -> Gradients:
        return _batch_norm_gradients(grad, x, coefficients, act, wanted, in_place=in_place, statistics_follow=True)


def _coefficients(weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> Coefficients:
    scale = rstd * weight
    shift = torch.addcmul(bias, scale, mean, value=-1)
    return scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1), mean, rstd


def _batch_norm_gradients(
    grad: Tensor,
    x: Tensor,
    coefficients: Coefficients,
    act: Activation | None,
    wanted: Wanted,
    *,
    in_place: bool,
    statistics_follow: bool,
) -> Gradients:
    """Those of batch norm and activation: in one walk; in two where the statistics follow the input."""
    sweep = _GradientSweep(grad, x, coefficients, act, x if in_place or not wanted[0] else torch.empty_like(x))
    _, _, mean, rstd = coefficients
    for_bias, for_weight = sweep.sums(writes=wanted[0] and not statistics_follow)
    for_weight *= rstd
    if wanted[0] and statistics_follow:
        sweep.write(for_weight * rstd / -(x.numel() // len(mean)), for_bias / -(x.numel() // len(mean)))
    return (
        sweep.result if wanted[0] else None,
        for_weight.to(grad.dtype) if wanted[1] else None,
        for_bias.to(grad.dtype) if wanted[2] else None,
    )


class _GradientSweep:
    """Walks the gradient of an activation's result and the norm's input at a time; what it writes is `result`."""

    def __init__(
        self, grad: Tensor, x: Tensor, coefficients: Coefficients, act: Activation | None, result: Tensor
    ) -> None:
        self.result = result
        self._grad, self._x, self._act = grad, x, act
        self._scale, _, self._mean, _ = coefficients
        self._sweep = Sweep(x)
        self._scales, self._shifts, self._means = (self._sweep.spread(item) for item in coefficients[:3])
        self._first, self._second = self._sweep.buffer(x), self._sweep.buffer(x)

    def _parts(self) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """The gradient of the norm's result, part by part, with the norm's input and the place of the result."""
        for group, (above, below, target) in self._sweep.parts(self._grad, self._x, self.result):
            part, size = above, len(above)
            if self._act is not None:
                y = torch.addcmul(self._shifts[group], below, self._scales[group], out=self._first[:size])
                part = self._act.gradient(above, y, self._second[:size])
            yield group, part, below, target

    def sums(self, *, writes: bool) -> tuple[Tensor, Tensor]:
        """Of the gradient, and of the gradient times the centred input; `writes`: its product with the scale too."""
        totals = torch.zeros((2, *self._mean.shape), dtype=torch.float64, device=self._x.device)
        for group, part, below, target in self._parts():
            totals[0] += self._sweep.total(part)
            centred = torch.sub(below, self._means[group], out=self._first[: len(below)])
            totals[1] += self._sweep.total(centred.mul_(part))
            if writes:
                torch.mul(part, self._scales[group], out=target)
        return totals[0], totals[1]

    def write(self, slope: Tensor, height: Tensor) -> None:
        """The gradient plus `slope` times the centred input plus `height`, times the scale; float64, `(channels,)`."""
        scale = self._scale.view(-1)
        slope, height = scale * slope, scale * (height - slope * self._mean)
        slopes, heights = (self._sweep.spread(item.to(self._x.dtype)) for item in (slope, height))
        for group, part, below, target in self._parts():
            rest = torch.addcmul(heights[group], below, slopes[group], out=self._first[: len(below)])
            torch.addcmul(rest, part, self._scales[group], out=target)


@final
class GroupNorm(Norm):
    """Group norm."""

    def __init__(self, layer: nn.GroupNorm) -> None:
        self._groups = layer.num_groups
        self._eps = layer.eps

    def keeps_input(self, *, input_trains: bool, weight_trains: bool) -> bool:
        return input_trains or weight_trains

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor, act: Activation | None, *, in_place: bool
    ) -> tuple[Tensor, Coefficients]:
        batch, channels, height, width = x.shape
        y, mean, rstd = torch.native_group_norm(
            x, weight, bias, batch, channels, height * width, self._groups, self._eps
        )
        size = channels // self._groups
        scale = torch.repeat_interleave(rstd, size, 1) * weight
        shift = torch.addcmul(bias, scale, torch.repeat_interleave(mean, size, 1), value=-1)
        y = y if act is None else act.apply(y, True)
        return y, (scale.view(batch, channels, 1, 1), shift.view(batch, channels, 1, 1), mean, rstd)

    def gradients(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        coefficients: Coefficients,
        act: Activation | None,
        wanted: Wanted,
        *,
        in_place: bool,
    ) -> Gradients:
        """The input's gradient is asked for in any case: torch 2.13 crashes without, where channels are innermost."""
        batch, channels, height, width = x.shape
        scale, shift, mean, rstd = coefficients
        if act is not None:
            grad = act.gradient(grad, affine(x, scale, shift, in_place=False), None)
        return _aten.native_group_norm_backward(
            *(grad, x, mean, rstd, weight, batch, channels, height * width, self._groups), (True, *wanted[1:])
        )


def build_norm(layer: nn.Module) -> Norm | None:
    """The norm of a layer with an affine, batch norm as its mode says; None for a layer that is no such norm."""
    if isinstance(layer, nn.GroupNorm) and layer.affine:
        return GroupNorm(layer)
    if isinstance(layer, nn.BatchNorm2d) and layer.affine and layer.track_running_stats:
        return BatchNorm(layer) if layer.training else FrozenBatchNorm(layer)
    return None
