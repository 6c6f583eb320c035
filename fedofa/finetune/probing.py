"""Measures what training each layer would contribute, on a few examples: gradients, and what is kept for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedofa.finetune.engine import planned
from fedofa.finetune.sparse import BlockContribution, Contributions, WeightContribution
from fedofa.supernet.costs import BlockCost
from fedofa.supernet.network import ParameterSpec
from fedofa.types.errors import DatasetError
from fedofa.types.plan import FineTunePlan

_CHUNK = 32


def measure_contributions(
    model: nn.Module, blocks: Sequence[BlockCost], inputs: Tensor, labels: Tensor
) -> Contributions:
    """The contributions of a network's layers to the loss on labelled examples.

    It is computed in float64, so that the choice does not hang on how sums are rounded.

    Args:
        model: the largest subnet, with calibrated statistics where its norms have some; it is changed to float64.
        blocks: its costs.
        inputs: `(num_examples, channels, height, width)`, normalised and at the subnet's resolution.
        labels: `(num_examples,)`, int64.

    Raises:
        DatasetError: without examples.
    """
    if not len(labels):
        raise DatasetError("contributions of layers are measured on examples: expected at least 1, found none")
    model = model.double()
    inputs = inputs.double()
    positions = _positions(model, inputs[:1])
    squared = _squared_gradients(model, blocks, inputs, labels)
    kept = _kept_values(model, blocks, inputs[:1])
    return Contributions([_block(block, positions, squared, kept) for block in blocks])


def _block(
    block: BlockCost, positions: Mapping[str, int], squared: Mapping[str, Tensor], kept: Mapping[str, int]
) -> BlockContribution:
    biases = [item for item in block.parameters if item.name.endswith(".bias")]
    weights = [item for item in block.parameters if item.name in positions]
    return BlockContribution(
        name=block.name,
        kept_values=kept.get(block.name, 0),
        num_biases=sum(item.numel for item in biases),
        bias_squared=sum(float(squared[item.name].sum()) for item in biases),
        weights=tuple(_weight(item, positions[item.name], squared[item.name]) for item in weights),
    )


def _weight(item: ParameterSpec, positions: int, squared: Tensor) -> WeightContribution:
    dim = 0 if item.shape[1] == 1 else 1
    by_channel = squared.transpose(0, dim).flatten(1).sum(1)
    return WeightContribution(item.name, positions, item.numel // item.shape[dim], tuple(by_channel.tolist()))


def _positions(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Weight name -> values of one channel of its layer's input, for the layers that can train in part."""
    found: dict[str, int] = {}
    hooks = []
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups in (1, len(layer.weight))):

            def note(layer: nn.Module, given: tuple[Tensor, ...], path: str = path) -> None:
                found[f"{path}.weight"] = given[0][0, 0].numel()

            hooks.append(layer.register_forward_pre_hook(note))
    with torch.no_grad():
        model.eval()(example)
    for hook in hooks:
        hook.remove()
    return found


def _squared_gradients(
    model: nn.Module, blocks: Sequence[BlockCost], inputs: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """Parameter name -> squares of the gradient of the mean loss, in evaluation of everything that is random."""
    names = tuple(item.name for block in blocks for item in block.parameters)
    plan = FineTunePlan("probe", names, statistics="frozen")
    with planned(model, plan) as parameters, _without_dropout(model):
        for start in range(0, len(labels), _CHUNK):
            logits = model(inputs[start : start + _CHUNK])
            loss = functional.cross_entropy(logits, labels[start : start + _CHUNK], reduction="sum")
            (loss / len(labels)).backward()
        gradients = [torch.zeros_like(item) if item.grad is None else item.grad.square() for item in parameters]
    for parameter in parameters:
        parameter.grad = None
    return dict(zip(names, gradients, strict=True))


def _kept_values(model: nn.Module, blocks: Sequence[BlockCost], example: Tensor) -> dict[str, int]:
    """Block name -> float32 values that lean operations keep of one example where biases train, parameters apart."""
    biases = tuple(item.name for block in blocks for item in block.parameters if item.name.endswith(".bias"))
    own = {item.untyped_storage()._cdata for item in (*model.parameters(), *model.buffers())}
    kept: dict[str, int] = {}
    seen: dict[int, Tensor] = {}
    current = [""]

    def pack(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in own and key not in seen:
            seen[key] = tensor  # alive, so that no other tensor takes over its identity
            size = tensor.numel() if tensor.is_floating_point() else -(-tensor.untyped_storage().nbytes() // 4)
            kept[current[0]] = kept.get(current[0], 0) + size
        return tensor

    def enter(name: str) -> Any:
        return lambda module, given: current.__setitem__(0, name)

    hooks = [model.get_submodule(block.name).register_forward_pre_hook(enter(block.name)) for block in blocks]
    plan = FineTunePlan("probe", biases, statistics="frozen", lean=True)
    with planned(model, plan), torch.autograd.graph.saved_tensors_hooks(pack, lambda item: item):
        model(example)
    for hook in hooks:
        hook.remove()
    return kept


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    layers = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    for layer in layers:
        layer.eval()
    try:
        yield
    finally:
        for layer in layers:
            layer.train()
