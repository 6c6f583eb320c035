"""A layer of which only the weights of the leading channels train: it keeps those channels of its input and no others.

After MCUNetV3 (arXiv 2206.15472, section 3.2): a gradient of the weights that read some of the input's channels needs
no other channels.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedofa.finetune.ops.adapted import AdaptedLayer, memory_format_of
from fedofa.finetune.ops.convolution import ConvGeometry
from fedofa.finetune.ops.kept import Keeper, as_is
from fedofa.finetune.ops.recipes import Shelf, take


@final
class LeadingLayer(AdaptedLayer):
    """A layer whose weight trains in its leading part.

    Args:
        plain: the layer; keeper: as in `AdaptedLayer`.
        shape: of the part (see `FineTunePlan.part_shape`), a parameter of its own.
    """

    def __init__(self, plain: nn.Conv2d | nn.Linear, keeper: Keeper, shape: tuple[int, ...]) -> None:
        super().__init__(plain, keeper)
        self.index = tuple(slice(size) for size in shape)
        layout = memory_format_of(self.weight) if self.weight.dim() == 4 else torch.contiguous_format
        self.part = nn.Parameter(self.weight.detach()[self.index].clone(memory_format=layout))
        groups = 1 if self.geometry.groups == 1 else shape[0]
        whole = self.geometry
        self.part_geometry = ConvGeometry(whole.stride, whole.padding, whole.dilation, groups)

    @property
    def num_channels(self) -> int:
        """Channels of the input that the part reads."""
        return self.part_geometry.groups * self.part.shape[1]

    def run(self, x: Tensor, weight: Tensor) -> Tensor:
        self.settle()
        if not torch.is_grad_enabled():
            return self.geometry.forward(x, weight, self.bias)
        part = self.part[..., None, None] if self.is_linear else self.part
        return _Leading.apply(self, x, weight, self.bias, part)  # type: ignore[return-value]

    @torch.no_grad()
    def settle(self) -> None:
        self.weight.data[self.index] = self.part.data  # `data`: whoever saved the weight for later reads it in time


class _Leading(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layer: LeadingLayer, x: Tensor, weight: Tensor, bias: Tensor | None, part: Tensor):
        shelf = Shelf()
        ctx.input = shelf.put(layer.keep(x, layer.num_channels)) if ctx.needs_input_grad[4] else None
        ctx.part = shelf.put(as_is(part))
        ctx.weight = shelf.put(as_is(weight)) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(*shelf.tensors)
        ctx.layer, ctx.shape = layer, x.shape
        return layer.geometry.forward(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        layer: LeadingLayer = ctx.layer
        _, input_trains, _, bias_trains, part_trains = ctx.needs_input_grad
        saved = ctx.saved_tensors
        inputs = weight = bias = None
        if part_trains:
            part, x = take(saved, ctx.part), take(saved, ctx.input)[:, : layer.num_channels]
            x, own = (item.contiguous(memory_format=memory_format_of(grad)) for item in (x, grad[:, : len(part)]))
            weight = layer.part_geometry.weight_gradient(own, x, part)
        if bias_trains:
            bias = grad.sum((0, 2, 3))
        if input_trains:
            inputs = layer.geometry.input_gradient(grad, take(saved, ctx.weight), ctx.shape)
        return None, inputs, None, bias, weight
