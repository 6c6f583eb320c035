"""Pooling that keeps no map: averages keep nothing, maxima one byte a result."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedofa.finetune.ops.codes import like

_aten = torch.ops.aten
_MOST_TAPS = 256


def average_pool(x: Tensor, layer: nn.AvgPool2d) -> Tensor:
    """What the layer gives for `(batch, channels, h, w)`."""
    return _AveragePool.apply(x, layer)


def max_pool(x: Tensor, layer: nn.MaxPool2d) -> Tensor:
    """What the layer gives for `(batch, channels, h, w)`, without indices."""
    return _MaxPool.apply(x, _Window(layer))


def is_plain(layer: nn.MaxPool2d) -> bool:
    """Whether a byte can say where in its window a maximum lies, and nothing but the maxima is asked for."""
    window = _Window(layer)
    return window.kernel[0] * window.kernel[1] <= _MOST_TAPS and not layer.return_indices


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


class _AveragePool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, layer: nn.AvgPool2d):
        ctx.settings = (
            *(_pair(layer.kernel_size), _pair(layer.stride), _pair(layer.padding)),
            *(layer.ceil_mode, layer.count_include_pad, layer.divisor_override),
        )
        ctx.shape, ctx.innermost = x.shape, x.is_contiguous(memory_format=torch.channels_last)
        return _aten.avg_pool2d(x, *ctx.settings)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        layout = torch.channels_last if ctx.innermost else torch.contiguous_format
        shaped = torch.empty(  # only its shape and layout are read
            ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=layout
        )
        return _aten.avg_pool2d_backward(grad.contiguous(memory_format=layout), shaped, *ctx.settings), None


class _Window:
    """The windows of a max pooling, and the byte that stands for a position in one of them."""

    def __init__(self, layer: nn.MaxPool2d) -> None:
        self.kernel, self.stride = _pair(layer.kernel_size), _pair(layer.stride)
        self.padding, self.dilation = _pair(layer.padding), _pair(layer.dilation)
        self.ceil_mode = layer.ceil_mode

    @property
    def settings(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int], bool]:
        return self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode

    def encode(self, indices: Tensor, width: int) -> Tensor:
        """Positions in the input's map, `(batch, channels, h', w')`, as numbers of taps of their windows."""
        rows, columns = (
            (indices // width).sub_(self._corner(indices, 0)),
            (indices % width).sub_(self._corner(indices, 1)),
        )
        return (
            rows.div_(self.dilation[0], rounding_mode="floor")
            .mul_(self.kernel[1])
            .add_(columns.div_(self.dilation[1], rounding_mode="floor"))
            .to(torch.uint8)
        )

    def decode(self, taps: Tensor, width: int) -> Tensor:
        """The inverse of `encode`."""
        taps = taps.long()
        rows = (taps // self.kernel[1]).mul_(self.dilation[0]).add_(self._corner(taps, 0))
        return rows.mul_(width).add_(taps.remainder_(self.kernel[1]).mul_(self.dilation[1])).add_(self._corner(taps, 1))

    def _corner(self, maps: Tensor, axis: int) -> Tensor:
        first = torch.arange(maps.shape[2 + axis]) * self.stride[axis] - self.padding[axis]
        return first.view((-1, 1) if axis == 0 else (1, -1))


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, window: _Window):
        y, indices = _aten.max_pool2d_with_indices(x, *window.settings)
        ctx.window, ctx.shape, ctx.innermost = window, x.shape, x.is_contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(window.encode(indices, x.shape[3]))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (taps,) = ctx.saved_tensors
        indices = ctx.window.decode(taps, ctx.shape[3])
        layout = torch.channels_last if ctx.innermost else torch.contiguous_format
        shaped = torch.empty(  # only its shape and layout are read
            ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=layout
        )
        grad = like(grad, indices.stride())
        return _aten.max_pool2d_with_indices_backward(grad, shaped, *ctx.window.settings, indices), None
