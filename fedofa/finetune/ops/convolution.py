"""The gradients of a 2-d convolution, each alone, by the fastest construction and without what it does not need.

Backward passes of depthwise convolutions are where a CPU's time goes in networks like MobileNet. Measured with torch
2.13 on one AVX-512 thread (`benchmarks/ops.py` prints it anew): for depthwise kernels above 3 x 3, torch's weight
gradient takes two to ninety times as long as a grouped forward convolution that computes the same; an input gradient
takes up to a fourth longer than a forward convolution with the flipped kernel, where the stride is 1. Pointwise
convolutions with channels innermost are matrix products; torch's own gradients of them take up to twice as long.
Everything else is fastest as torch has it. No input gradient needs the input itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_LARGEST_STOCK_KERNEL = 3
_CHUNK_BYTES = 1 << 21
"""The weight gradient goes through the batch in parts of so many input bytes, which stay in a core's cache."""


@dataclass(frozen=True, slots=True)
class ConvGeometry:
    """Strides, zeros around the map and dilation along height and width, and the number of channel groups."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`(batch, in_channels, h, w)` to `(batch, out_channels, h', w')`."""
        return torch.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def is_depthwise(self, weight: Tensor) -> bool:
        """Whether each channel is convolved alone with one undilated kernel."""
        return self.groups == weight.shape[0] and weight.shape[1] == 1 and self.dilation == (1, 1)

    def is_pointwise(self, weight: Tensor) -> bool:
        """Whether each position is multiplied by one matrix."""
        return self._reads_points(weight) and self.stride == (1, 1)

    def _reads_points(self, weight: Tensor) -> bool:
        """Whether each result is one position's product with one matrix; with a stride some positions have none."""
        return weight.shape[2:] == (1, 1) and self.padding == (0, 0) and self.groups == 1

    def input_gradient(self, grad: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of the input of that shape, given the result's gradient `(batch, out_channels, h', w')`."""
        kernel = weight.shape[2:]
        if self.is_pointwise(weight) and _channels_innermost(grad):
            return _maps(_rows(grad) @ weight.flatten(1), grad)
        if self.is_depthwise(weight) and self.stride == (1, 1) and all(map(int.__lt__, self.padding, kernel)):
            padding = [side - 1 - zeros for side, zeros in zip(kernel, self.padding, strict=True)]
            return torch.conv2d(grad, weight.flip(2, 3), None, 1, padding, 1, self.groups)
        rest = [
            side - ((out - 1) * stride - 2 * zeros + dilation * (taps - 1) + 1)
            for side, out, stride, zeros, dilation, taps in zip(
                shape[2:], grad.shape[2:], self.stride, self.padding, self.dilation, kernel, strict=True
            )
        ]
        return functional.conv_transpose2d(
            grad, weight, None, self.stride, self.padding, rest, self.groups, self.dilation
        )

    def weight_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The gradient of the weight `(out_channels, in_channels / groups, k, k)`, given the input and the result's."""
        if self._reads_points(weight) and self.stride != (1, 1):  # oneDNN's kernel crashes on AVX2 for few channels
            height, width = grad.shape[2:]
            x = x[:, :, :: self.stride[0], :: self.stride[1]][:, :, :height, :width]
            return (_rows(grad).t() @ _rows(x)).view(weight.shape)
        if self.is_pointwise(weight) and _channels_innermost(grad) and _channels_innermost(x):
            return (_rows(grad).t() @ _rows(x)).view(weight.shape)
        if self.is_depthwise(weight) and max(weight.shape[2:]) > _LARGEST_STOCK_KERNEL:
            return self._depthwise_weight_gradient(grad, x, weight)
        return torch.ops.aten.convolution_backward(
            *(grad, x, weight, None, self.stride, self.padding, self.dilation, False, (0, 0), self.groups),
            (False, True, False),
        )[1]

    def _depthwise_weight_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Every example's every channel is convolved with its own gradient map as kernel; then examples are added up.

        The stride of the convolution becomes the dilation of that kernel.
        """
        channels, _, *kernel = weight.shape
        total = weight.new_zeros((channels, 1, *kernel))
        step = max(1, _CHUNK_BYTES // (x[0].numel() * x.element_size())) if len(x) else 1
        for start in range(0, len(x), step):
            part, kernels = (item[start : start + step].contiguous() for item in (x, grad))
            maps = part.shape[0] * channels
            products = functional.conv2d(
                part.view(1, maps, *part.shape[2:]),
                kernels.view(maps, 1, *kernels.shape[2:]),
                padding=self.padding,
                dilation=self.stride,
                groups=maps,
            )[..., : kernel[0], : kernel[1]]
            total += products.reshape(-1, channels, 1, *kernel).sum(0)
        return total


def _channels_innermost(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def _rows(x: Tensor) -> Tensor:
    """`(batch, channels, h, w)` with channels innermost as a view `(batch * h * w, channels)`."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _maps(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_rows`, for maps of the batch and sides of another tensor."""
    batch, _, height, width = like.shape
    return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)
