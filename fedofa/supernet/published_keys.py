"""The names of a published Once-for-All checkpoint's tensors: today's, those of the package `ofa`, and older ones.

Older files say `mobile_inverted_conv` for a block's `conv` and name a layer's tensors with one step more or less
(`bn.bn.weight` for `bn.weight`); each tensor has a fixed list of spellings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from fedofa.supernet.elastic import ElasticSupernet
from fedofa.supernet.network import BottleneckSpec, ConvSpec, MBConvSpec, is_lite
from fedofa.supernet.resnet import ResNetSpec

_STATIC = {"conv.weight": "conv.weight", "norm": "bn"}
_ELASTIC = {"conv.weight": "conv.conv.weight", "norm": "bn.bn"}
_BARE = {"conv": ""}
_OUTSIDE = {
    "stem": ("first_conv", _STATIC),
    "final": ("final_expand_layer", _STATIC),
    "mix": ("feature_mix_layer", _STATIC),
    "stem.0": ("input_stem.0", _ELASTIC),
    "stem.1": ("input_stem.1.conv", _ELASTIC),
    "stem.2": ("input_stem.2", _ELASTIC),
}
_INVERTED = {"expand": "inverted_bottleneck", "depthwise": "depth_conv", "project": "point_linear"}
_SQUEEZE = {"squeeze_excite.reduce": "depth_conv.se.fc.reduce", "squeeze_excite.expand": "depth_conv.se.fc.expand"}
_RESIDUAL = {"reduce": "conv1", "spatial": "conv2", "project": "conv3", "downsample": "downsample"}
_SPELLINGS = ((".conv.conv.weight", ".conv.weight"), (".bn.bn.", ".bn."), (".linear.linear.", ".linear."))
_BLOCK = re.compile(r"^(blocks\.\d+)\.conv\.")


def published_names(supernet: ElasticSupernet) -> Iterator[tuple[str, str]]:
    """Pairs (shared name here, key in a published file) for every shared tensor but those of lite residual branches."""
    layers = dict(_layers(supernet))
    for name in supernet.shared():
        if is_lite(name):
            continue
        owner, _, leaf = name.rpartition(".")
        if leaf.startswith("matrix_"):
            yield name, f"{layers[owner][0]}.conv.{leaf.removeprefix('matrix_')}_matrix"
            continue
        layer, inside = next((key, name[len(key) + 1 :]) for key in layers if name.startswith(f"{key}."))
        theirs, spelling = layers[layer]
        yield name, f"{theirs}.{_translated(inside, spelling)}".replace("..", ".")


def _layers(supernet: ElasticSupernet) -> Iterator[tuple[str, tuple[str, Mapping[str, str]]]]:
    """For every layer here its name in the package, and how the names of the tensors in it translate."""
    number = -1
    for part in supernet.network_spec(supernet.space.largest()).parts:
        if isinstance(part, ConvSpec):
            yield part.name, _OUTSIDE[part.name]
        elif isinstance(part, MBConvSpec):
            number += 1
            spelling = _ELASTIC if part.expands else _STATIC
            for ours, theirs in _INVERTED.items():
                yield f"{part.name}.{ours}", (f"blocks.{number}.conv.{theirs}", spelling)
            for ours, theirs in _SQUEEZE.items():
                yield f"{part.name}.{ours}", (f"blocks.{number}.conv.{theirs}", _BARE)
        elif isinstance(part, BottleneckSpec):
            number += 1
            for ours, theirs in _RESIDUAL.items():
                yield f"{part.name}.{ours}", (f"blocks.{number}.{theirs}", _ELASTIC)
    head = "classifier.linear.linear" if isinstance(supernet.spec, ResNetSpec) else "classifier.linear"
    yield "classifier", (head, {})


def _translated(name: str, spelling: Mapping[str, str]) -> str:
    for ours, theirs in spelling.items():
        if name == ours or name.startswith(f"{ours}."):
            return (theirs + name.removeprefix(ours)).removeprefix(".")
    return name


def spellings(key: str) -> tuple[str, ...]:
    """Every way in which published files have written a key, today's first."""
    found = [key]
    for long, short in _SPELLINGS:
        for a, b in ((long, short), (short, long)):
            if (a in key) if a.endswith(".") else key.endswith(a):
                found.append(key.replace(a, b) if a.endswith(".") else key.removesuffix(a) + b)
                break
    return (*found, *(_BLOCK.sub(r"\1.mobile_inverted_conv.", item) for item in found if _BLOCK.match(item)))
