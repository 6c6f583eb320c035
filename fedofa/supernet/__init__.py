"""Supernets: one set of shared weights, any subnet of the search space. The public names load on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedofa.supernet.base import Supernet
    from fedofa.supernet.families import FAMILIES, build_supernet
    from fedofa.supernet.mobilenet_v3 import MobileNetV3Supernet
    from fedofa.supernet.proxyless import ProxylessSupernet
    from fedofa.supernet.published import PUBLISHED, load_published, save_published
    from fedofa.supernet.resnet import ResNetSupernet

__all__ = [
    "FAMILIES",
    "PUBLISHED",
    "MobileNetV3Supernet",
    "ProxylessSupernet",
    "ResNetSupernet",
    "Supernet",
    "build_supernet",
    "load_published",
    "save_published",
]

_HOMES = {
    "FAMILIES": "families",
    "PUBLISHED": "published",
    "MobileNetV3Supernet": "mobilenet_v3",
    "ProxylessSupernet": "proxyless",
    "ResNetSupernet": "resnet",
    "Supernet": "base",
    "build_supernet": "families",
    "load_published": "published",
    "save_published": "published",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
