"""Parametrised subnets: small kernels composed in the forward pass, so that kernel matrices train too.

A small depthwise kernel is the large one's centre, sent through one matrix a step (see `slices.KernelTransform`). In a
parametrised subnet that centre and the matrices are parameters, each with exactly the coordinates that the small kernel
depends on: of the large kernel the centre of the next size, of every matrix but the last the rows that become the next
step's centre. All of them are plain slices of shared tensors, so a delta of them folds without a solve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import final

import numpy as np
import torch
from torch import Tensor, nn

from fedofa.supernet.costs import BlockCost
from fedofa.supernet.layers import Conv2d
from fedofa.supernet.network import ParameterSpec
from fedofa.supernet.slices import SliceMap, TensorSlice


def parametrised_slices(slices: SliceMap) -> SliceMap:
    """The map to the parametrised subnet of the same configuration; the tensors of a composed kernel lie together."""
    return SliceMap([part for item in slices for part in ([item] if item.kernel is None else _parts(item))])


def _parts(item: TensorSlice) -> Iterator[TensorSlice]:
    """The centre of the large kernel `(channels, 1, s, s)`, then the rows of each matrix `(rows, s^2)`."""
    if item.kernel is None:
        return
    large, size = item.kernel.sizes[:2]
    middle = slice((large - size) // 2, (large + size) // 2)
    shape, index = (item.shape[0], 1, size, size), (item.index[0], slice(None), middle, middle)
    yield TensorSlice(item.name, shape, item.shared_shape, index, None, item.role)
    smaller = item.kernel.sizes[1:]
    for side, following, name in zip(smaller, (*smaller[1:], None), item.kernel.matrices, strict=True):
        values = side * side
        rows = None if following is None else _centre_positions(side, following)
        index = (slice(None) if rows is None else rows, slice(None))
        shape = (values if rows is None else len(rows), values)
        yield TensorSlice(name, shape, (values, values), index, None, "weight")


def _centre_positions(side: int, size: int) -> np.ndarray:
    """Where the middle `size` x `size` of a flattened `side` x `side` kernel lies."""
    start = (side - size) // 2
    return np.arange(side * side).reshape(side, side)[start : start + size, start : start + size].ravel()


def compose_kernel(centre: Tensor, matrices: Iterable[Tensor]) -> Tensor:
    """The small kernel `(channels, 1, k, k)` of the parameters that `parametrised_slices` describes."""
    flat = centre.reshape(len(centre), -1)
    for matrix in matrices:
        flat = flat @ matrix.T
    side = round(flat.shape[1] ** 0.5)
    return flat.reshape(-1, 1, side, side)


@final
class ComposedConv2d(Conv2d):
    """A depthwise convolution whose kernel is composed of its weight and of matrices that its layer holds.

    Args:
        plain: the convolution with the small kernel.
        layer: has the matrices as parameters.
        matrices: their names there, in the order of composition.
    """

    def __init__(self, plain: Conv2d, layer: nn.Module, matrices: Sequence[str], shape: tuple[int, ...]) -> None:
        channels, padding = plain.out_channels, (plain.padding[0], plain.padding[1])
        sizes = {"kernel_size": shape[-1], "stride": (plain.stride[0], plain.stride[1]), "padding": padding}
        options = {"groups": channels, "bias": plain.bias is not None, "device": "meta", "dtype": torch.float32}
        super().__init__(channels, channels, **sizes, **options)  # type: ignore[arg-type]
        self.matrices_of = partial(_attributes, layer, tuple(matrices))

    def forward(self, input: Tensor) -> Tensor:
        """As the convolution with the small kernel."""
        return self._conv_forward(input, compose_kernel(self.weight, self.matrices_of()), self.bias)


def _attributes(layer: nn.Module, names: Sequence[str]) -> list[Tensor]:
    return [getattr(layer, name) for name in names]


def parametrise(skeleton: nn.Module, slices: SliceMap) -> nn.Module:
    """Give a subnet's skeleton the parameters of its parametrised form, in place; `slices` are the plain one's."""
    for item in slices:
        if item.kernel is None:
            continue
        layer = skeleton.get_submodule(item.name.removesuffix(".conv.weight"))
        kernel, *matrices = _parts(item)
        names = [part.name.rpartition(".")[2] for part in matrices]
        for name, part in zip(names, matrices, strict=True):
            layer.register_parameter(name, nn.Parameter(torch.empty(part.shape, device="meta", dtype=torch.float32)))
        layer.conv = ComposedConv2d(layer.conv, layer, names, kernel.shape)  # type: ignore[arg-type]
    return skeleton


def parametrised_costs(
    blocks: Sequence[BlockCost], slice_of: Callable[[ParameterSpec], TensorSlice]
) -> tuple[BlockCost, ...]:
    """What the blocks of a parametrised subnet cost, from those of the plain one.

    Composing is a product of small matrices a step, not an example: what it keeps is counted, its MACs (in the spaces
    at hand below a hundredth of a step's) are not.
    """
    return tuple(_parametrised(block, slice_of) for block in blocks)


def _parametrised(block: BlockCost, slice_of: Callable[[ParameterSpec], TensorSlice]) -> BlockCost:
    table, composed = [], 0
    for item in block.parameters:
        tensor = slice_of(item)
        if tensor.kernel is None:
            table.append(item)
            continue
        for part in _parts(tensor):
            table.append(ParameterSpec(part.name, part.shape, (None,) * len(part.shape), part.role))
            composed += item.shape[0] * part.shape[0] if part.name != item.name else 0
    return replace(block, parameters=tuple(table), step_elements=composed) if composed else block
