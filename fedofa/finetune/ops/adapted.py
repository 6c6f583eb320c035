"""Layers whose own weight stays as it is while something smaller trains in its place: a part of it, or two factors."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from fedofa.finetune.ops.convolution import ConvGeometry
from fedofa.finetune.ops.kept import Keeper, Kept
from fedofa.finetune.ops.recipes import recipe_of
from fedofa.finetune.ops.swap import geometry_of
from fedofa.types.errors import ConfigError

_POINTWISE = ConvGeometry((1, 1), (0, 0), (1, 1), 1)


class AdaptedLayer(nn.Module, ABC):
    """Stands in for a convolution or a linear layer, with the same parameter objects under the same names.

    Args:
        plain: the layer; a linear one counts as a pointwise convolution of 1 x 1 maps.
        keeper: the form in which activations are kept.
    """

    def __init__(self, plain: nn.Conv2d | nn.Linear, keeper: Keeper) -> None:
        super().__init__()
        self.weight, self.bias = plain.weight, plain.bias
        self.weight.requires_grad_(False)
        self.keeper = keeper
        self.is_linear = isinstance(plain, nn.Linear)
        self.geometry = geometry_of(plain) if isinstance(plain, nn.Conv2d) else _POINTWISE

    def forward(self, x: Tensor) -> Tensor:
        """As the layer that it stands in for, with what was learned so far."""
        if not self.is_linear:
            return self.run(x, self.weight)
        if x.dim() != 2:
            raise ConfigError(f"a linear layer that trains in part: expected inputs of 2 dimensions, found {x.dim()}")
        return self.run(x[..., None, None], self.weight[..., None, None]).flatten(1)

    @abstractmethod
    def run(self, x: Tensor, weight: Tensor) -> Tensor:
        """`(batch, in_channels, h, w)` to `(batch, out_channels, h', w')`; the weight has four dimensions."""

    @abstractmethod
    def settle(self) -> None:
        """Write what was learned into the layer's own weight, once training is over."""

    def keep(self, x: Tensor, count: int) -> Kept:
        """What is kept of the first `count` channels; all channels, where they can be had again for nothing."""
        recipe = recipe_of(x)
        if recipe is not None:
            return Kept(recipe.tensors, recipe.restore, fresh=False)
        if count == x.shape[1]:
            return self.keeper.keep(x)
        return self.keeper.keep(x[:, :count].contiguous(memory_format=memory_format_of(x)))


def memory_format_of(x: Tensor) -> torch.memory_format:
    """Channels innermost where the tensor has them so, else contiguous."""
    innermost = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if innermost else torch.contiguous_format
