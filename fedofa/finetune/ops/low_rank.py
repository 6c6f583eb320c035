"""A layer whose weight changes by a product of two small matrices that train: LoRA (arXiv 2106.09685)."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedofa.finetune.ops.adapted import AdaptedLayer
from fedofa.finetune.ops.convolution import ConvGeometry
from fedofa.finetune.ops.kept import Keeper, as_is
from fedofa.finetune.ops.recipes import Shelf, take

_MIX = ConvGeometry((1, 1), (0, 0), (1, 1), 1)


@final
class LowRankLayer(AdaptedLayer):
    """A pointwise convolution or linear layer with `weight + left @ right` for its weight; only the factors train.

    The left factor begins at zero, so that the layer begins as it was; the rows of the right one at random, of length
    1 on average, so that a step of the left factor moves the weight as far as a step of all of it would within the
    rows' span. There is no further scale.

    Args:
        plain: the layer; keeper: as in `AdaptedLayer`.
        rank: number of rows of the right factor.
        generator: draws it.
    """

    def __init__(self, plain: nn.Conv2d | nn.Linear, keeper: Keeper, rank: int, generator: torch.Generator) -> None:
        super().__init__(plain, keeper)
        out_channels, in_channels = self.weight.shape[:2]
        drawn = torch.randn(rank, in_channels, generator=generator).to(self.weight)
        self.left = nn.Parameter(self.weight.new_zeros(out_channels, rank))
        self.right = nn.Parameter(drawn / in_channels**0.5)

    def run(self, x: Tensor, weight: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return _LowRank.apply(self, x, weight, self.bias, self.left, self.right)  # type: ignore[return-value]
        return self.result(x, weight, self.bias, self.left, self.right)

    def result(self, x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
        """The layer's result with the factors beside its weight: two thin products instead of another weight."""
        y = self.geometry.forward(x, weight, bias)
        return y.add_(_MIX.forward(self.geometry.forward(x, kernel(right), None), kernel(left), None))

    @torch.no_grad()
    def settle(self) -> None:
        self.weight.data += (self.left @ self.right).view(self.weight.shape)


def kernel(matrix: Tensor) -> Tensor:
    """A matrix `(out, in)` as a kernel `(out, in, 1, 1)`."""
    return matrix[..., None, None]


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layer: LowRankLayer, x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor):
        shelf = Shelf()
        ctx.input = shelf.put(layer.keep(x, x.shape[1]))
        ctx.factors = shelf.put(as_is(left)), shelf.put(as_is(right))
        ctx.weight = shelf.put(as_is(weight)) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(*shelf.tensors)
        ctx.layer, ctx.shape = layer, x.shape
        return layer.result(x, weight, bias, left, right)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        geometry: ConvGeometry = ctx.layer.geometry
        saved = ctx.saved_tensors
        left, right = (kernel(take(saved, ticket)) for ticket in ctx.factors)
        x, inputs = take(saved, ctx.input), None
        inner = _MIX.input_gradient(grad, left, torch.Size((len(grad), len(right), *grad.shape[2:])))
        of_left = _MIX.weight_gradient(grad, geometry.forward(x, right, None), left).flatten(1)
        of_right = geometry.weight_gradient(inner, x, right).flatten(1)
        bias = grad.sum((0, 2, 3)) if ctx.needs_input_grad[3] else None
        if ctx.needs_input_grad[1]:
            inputs = geometry.input_gradient(grad, take(saved, ctx.weight), ctx.shape)
            inputs = inputs + geometry.input_gradient(inner, right, ctx.shape)
        return None, inputs, None, bias, of_left, of_right
