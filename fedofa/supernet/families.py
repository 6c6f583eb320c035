"""From a description to a supernet: how a client rebuilds the structure that the server speaks of."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fedofa.supernet import fixed
from fedofa.supernet.base import Supernet
from fedofa.supernet.chain import ChainSpec, ChainSupernet
from fedofa.supernet.elastic import ElasticSpec, ElasticSupernet
from fedofa.supernet.fixed import FixedSupernet
from fedofa.supernet.mobilenet_v3 import MobileNetV3Spec, MobileNetV3Supernet
from fedofa.supernet.proxyless import ProxylessSpec, ProxylessSupernet
from fedofa.supernet.resnet import ResNetSpec, ResNetSupernet
from fedofa.supernet.sizes import check_whole
from fedofa.types.errors import ConfigError, FedofaError


def two_conv_cnn(in_channels: int = 1, num_classes: int = 10, side: int = 28) -> nn.Module:
    """Two 3x3 convolutions with max pooling and two linear layers; 206,922 parameters for 28 px digits."""
    pooled = side // 4
    return nn.Sequential(
        nn.Conv2d(in_channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * pooled * pooled, 128),
        nn.ReLU(),
        nn.Linear(128, num_classes),
    )


MODULES: dict[str, Callable[..., nn.Module]] = {"two_conv_cnn": two_conv_cnn}
"""Modules that `FixedSupernet` descriptions may name; a name is data, so nothing is imported on a server's word."""

_ELASTIC: dict[str, tuple[type[ElasticSpec], type[ElasticSupernet]]] = {
    MobileNetV3Spec.family: (MobileNetV3Spec, MobileNetV3Supernet),
    ProxylessSpec.family: (ProxylessSpec, ProxylessSupernet),
    ResNetSpec.family: (ResNetSpec, ResNetSupernet),
    ChainSpec.family: (ChainSpec, ChainSupernet),
}
FAMILIES = (*_ELASTIC, fixed.FAMILY)


def build_supernet(description: Mapping[str, Any], generator: torch.Generator | None = None) -> Supernet:
    """The supernet that a description speaks of.

    Args:
        description: what `Supernet.description` gave, or the `supernet` settings.
        generator: draws initial weights; None gives the structure only, on the meta device.

    Raises:
        ConfigError: for an unknown family, module or setting, or sizes that make no network.
    """
    try:
        return _build(dict(description), generator)
    except FedofaError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"supernet: the settings are not understood: {type(error).__name__}: {error}") from error


def build_elastic(spec: ElasticSpec, generator: torch.Generator | None = None) -> ElasticSupernet:
    """The supernet of a spec, of the class of its family."""
    return _ELASTIC[spec.family][1](spec, generator)


def _build(settings: dict[str, Any], generator: torch.Generator | None) -> Supernet:
    family = _known("family", settings.pop("family", None), FAMILIES)
    if family in _ELASTIC:
        return build_elastic(_ELASTIC[family][0].from_json(settings), generator)
    module = _known("module", settings.pop("module", None), tuple(MODULES))
    channels, height, width = settings.pop("input_shape")
    if height != width:
        raise ConfigError(f"supernet.input_shape: expected square images, found {height} x {width}")
    num_classes = settings.pop("num_classes")
    check_whole("supernet.input_shape", (channels, height), 1)
    check_whole("supernet.num_classes", num_classes, 1)
    if settings:
        raise ConfigError(f"supernet of family {fixed.FAMILY!r}: unknown settings {sorted(settings)}")
    return _build_fixed(module, channels, num_classes, height, generator)


def _build_fixed(
    module: str, channels: int, num_classes: int, side: int, generator: torch.Generator | None
) -> FixedSupernet:
    origin = {"module": module, "num_classes": num_classes}
    if generator is None:
        with torch.device("meta"):
            network = MODULES[module](channels, num_classes, side)
    else:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(generator.initial_seed())
            network = MODULES[module](channels, num_classes, side)
    return FixedSupernet(network, (channels, side, side), origin)


def _known(what: str, name: Any, known: tuple[str, ...]) -> str:
    if name in known:
        return name
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ConfigError(f"supernet.{what}: unknown {what} {name!r}; known: {', '.join(known)}{hint}")
