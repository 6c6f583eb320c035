"""Puts layers that train in part, or by factors, in the place of plain ones, and the plain ones back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fedofa.finetune.ops.adapted import AdaptedLayer
from fedofa.finetune.ops.kept import Keeper
from fedofa.finetune.ops.leading import LeadingLayer
from fedofa.finetune.ops.low_rank import LowRankLayer
from fedofa.types.errors import ConfigError
from fedofa.types.plan import FineTunePlan


@contextmanager
def adapted(
    model: nn.Module, plan: FineTunePlan, keeper: Keeper, generator: torch.Generator | None
) -> Iterator[dict[str, list[nn.Parameter]]]:
    """Within the context, the layers of the plan's `fractions` and `low_rank` train as it says; see `AdaptedLayer`.

    Afterwards the model has its own layers again, with what was learned in their weights.

    Args:
        keeper: the form in which the layers keep activations.
        generator: draws the first factors; only plans with `low_rank` need it.

    Yields:
        Weight name -> what trains in its place: its leading part, or its left and right factor.

    Raises:
        ConfigError: naming a weight that cannot train so.
    """
    put: list[tuple[nn.Module, str, nn.Module]] = []
    trained: dict[str, list[nn.Parameter]] = {}
    layers: list[AdaptedLayer] = []
    try:
        for name in (*(name for name, _ in plan.fractions), *plan.low_rank):
            parent, leaf, plain = _layer(model, name, plan)
            layer = _adapt(plain, name, plan, keeper, generator)
            trained[name] = [item for key, item in layer.named_parameters() if key not in ("weight", "bias")]
            setattr(parent, leaf, layer)
            put.append((parent, leaf, plain))
            layers.append(layer)
        yield trained
    finally:
        for layer, (parent, leaf, plain) in zip(layers, put, strict=True):
            layer.settle()
            setattr(parent, leaf, plain)


def _adapt(
    plain: nn.Conv2d | nn.Linear, name: str, plan: FineTunePlan, keeper: Keeper, generator: torch.Generator | None
) -> AdaptedLayer:
    shape = tuple(plain.weight.shape)
    if name not in plan.low_rank:
        if isinstance(plain, nn.Conv2d) and plain.groups not in (1, len(plain.weight)):
            raise ConfigError(
                f"plan {plan.name!r}: {name!r} is a grouped convolution, which trains whole or not at all"
            )
        return LeadingLayer(plain, keeper, plan.part_shape(name, shape))
    if generator is None:
        raise ConfigError(f"plan {plan.name!r} trains factors that begin at random and needs a generator")
    if isinstance(plain, nn.Conv2d) and (shape[2:] != (1, 1) or plain.groups != 1 or any(plain.padding)):
        raise ConfigError(f"plan {plan.name!r}: {name!r} is no pointwise convolution; only those and linear layers are")
    (_, rank), _ = plan.factor_shapes(shape)
    return LowRankLayer(plain, keeper, rank, generator)


def _layer(model: nn.Module, name: str, plan: FineTunePlan) -> tuple[nn.Module, str, nn.Conv2d | nn.Linear]:
    """The layer that owns a weight, and where it hangs."""
    path, _, kind = name.rpartition(".")
    parent_path, _, leaf = path.rpartition(".")
    try:
        parent = model.get_submodule(parent_path)
        layer = parent.get_submodule(leaf)
    except AttributeError:
        raise ConfigError(f"plan {plan.name!r} trains [{name!r}], which this subnet does not have") from None
    plain = type(layer).forward in (nn.Conv2d.forward, nn.Linear.forward) and kind == "weight" and bool(leaf)
    if not isinstance(layer, nn.Conv2d | nn.Linear) or not plain or getattr(layer, "padding_mode", "zeros") != "zeros":
        raise ConfigError(f"plan {plan.name!r}: {name!r} is no weight of a plain convolution or linear layer")
    return parent, leaf, layer
