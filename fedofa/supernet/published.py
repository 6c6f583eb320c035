"""Published Once-for-All checkpoints, both ways: their names, their keys, reading one and writing one.

A file holds `{"state_dict": {key: tensor}}`. Its keys are those of the package `ofa` today, or older ones that say
`mobile_inverted_conv` for a block's `conv` and name a layer's tensors with one step more or less (`bn.bn.weight` for
`bn.weight`); each tensor has a fixed list of spellings, and a key that is none of them is refused.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedofa.supernet.elastic import ElasticSpec, ElasticSupernet
from fedofa.supernet.families import build_elastic
from fedofa.supernet.mobilenet_v3 import MobileNetV3Spec
from fedofa.supernet.network import BottleneckSpec, ConvSpec, MBConvSpec
from fedofa.supernet.proxyless import ProxylessSpec
from fedofa.supernet.resnet import ResNetSpec
from fedofa.types.errors import CheckpointError, ConfigError

PublishedSpec = MobileNetV3Spec | ProxylessSpec | ResNetSpec

PUBLISHED: dict[str, PublishedSpec] = {
    "ofa_mbv3_d234_e346_k357_w1.0": MobileNetV3Spec(),
    "ofa_mbv3_d234_e346_k357_w1.2": MobileNetV3Spec().scaled(1.2),
    "ofa_proxyless_d234_e346_k357_w1.3": ProxylessSpec().scaled(1.3),
    "ofa_supernet_resnet50": ResNetSpec(),
}
"""Published file name -> sizes."""

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
_COUNTER = "num_batches_tracked"
_SHOWN = 20


def published_names(supernet: ElasticSupernet) -> Iterator[tuple[str, str]]:
    """Pairs (shared name here, key in a published file) for every shared tensor."""
    layers = dict(_layers(supernet))
    for name in supernet.shared():
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
    yield (
        "classifier",
        ("classifier.linear.linear" if isinstance(supernet.spec, ResNetSpec) else "classifier.linear", {}),
    )


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


def load_published(
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    num_classes: int | None = None,
    generator: torch.Generator | None = None,
) -> ElasticSupernet:
    """The supernet of a published checkpoint file.

    Args:
        path: a file that `torch.load(weights_only=True)` reads.
        name: a key of `PUBLISHED`; None finds out from the file's keys and shapes.
        num_classes: of the supernet. None expects the published number; where it is not the file's own number, the
            classifier is a fresh one and the file's is left out.
        generator: draws the fresh classifier's weights; without one they are zero.

    Raises:
        CheckpointError: when the file cannot be read, listing its missing, unknown and misshapen entries, or when its
            number of classes is not the published one and `num_classes` is not given.
        ConfigError: for a name that is none of the published ones.
    """
    weights = _read(Path(path))
    if name is not None and name not in PUBLISHED:
        raise ConfigError(f"load_published: unknown name {name!r}; published: {', '.join(PUBLISHED)}")
    found = _classes(weights)
    spec = PUBLISHED[name or _closest(weights, found)]
    if num_classes is None and found not in (None, spec.num_classes):
        raise CheckpointError(
            f"{path}: the classifier has {found} classes, expected {spec.num_classes}; pass num_classes={found} to take "
            "it as it is, or another number of classes to start with a fresh classifier"
        )
    supernet = _empty(replace(spec, num_classes=found or spec.num_classes))
    try:
        load_published_weights(supernet, weights)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if num_classes in (None, supernet.spec.num_classes):  # type: ignore[attr-defined]
        return supernet
    return _with_fresh_classifier(supernet, replace(spec, num_classes=num_classes), generator)


def save_published(supernet: ElasticSupernet, path: str | os.PathLike[str]) -> None:
    """Write the weights as a published file, channels lying in the order of the supernet's channel ordering.

    The package `ofa` reads it, and its subnets, which take leading channels, are the supernet's. Batch-norm statistics
    are written as they are.

    Raises:
        CheckpointError: when the supernet has other sizes than the published ones, or no weights.
    """
    _check_published(supernet)
    shared, slices = supernet.shared(), supernet.slice_map(supernet.space.largest())
    weights: dict[str, Tensor] = {}
    for ours, theirs in published_names(supernet):
        tensor = slices[ours].extract(shared) if ours in slices else shared[ours]
        weights[theirs] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        if theirs.endswith("running_var"):
            weights[f"{theirs.removesuffix('running_var')}{_COUNTER}"] = torch.tensor(0)
    target = Path(path)
    temporary = target.with_name(f".{target.name}.writing")
    try:
        torch.save({"state_dict": weights}, temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def load_published_weights(supernet: ElasticSupernet, weights: Mapping[str, Any]) -> None:
    """Copy the tensors of a published file's `state_dict` into the supernet, whose channels are then in order.

    Raises:
        CheckpointError: listing every key that is missing, unknown or of another shape; then nothing was copied.
    """
    keys, problems = _match(supernet, weights)
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError(
            f"the weights do not fit {supernet.space.family!r}: {len(problems)} problems: "
            f"{'; '.join(problems[:_SHOWN])}{more}"
        )
    with torch.no_grad():
        for name, tensor in supernet.shared().items():
            tensor.copy_(weights[keys[name]])
    supernet.set_ordering({})


def _match(supernet: ElasticSupernet, weights: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """The key that holds each shared tensor, and what is wrong with the others."""
    shared, keys, counters = supernet.shared(), {}, set()
    missing, misshapen = [], []
    for ours, theirs in published_names(supernet):
        present = [key for key in spellings(theirs) if key in weights]
        if theirs.endswith("running_var"):
            counters |= set(spellings(f"{theirs.removesuffix('running_var')}{_COUNTER}"))
        if not present:
            missing.append(f"missing {theirs}")
            continue
        keys[ours] = present[0]
        expected, value = tuple(shared[ours].shape), weights[present[0]]
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if shape != expected:
            misshapen.append(f"{present[0]}: expected shape {expected}, found {shape}")
    unknown = [f"unknown {key}" for key in sorted(set(weights) - set(keys.values()) - counters)]
    return keys, sorted(missing) + unknown + sorted(misshapen)


def _read(path: Path) -> dict[str, Any]:
    """A file's `state_dict`."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path}: not a readable checkpoint ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "expected a file of tensors that torch.load(weights_only=True) reads"
        ) from error
    weights = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(key, str) for key in weights):
        found = sorted(map(str, content))[:5] if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path}: expected {{'state_dict': {{key: tensor}}}}, found {found}")
    return weights


def _classes(weights: Mapping[str, Any]) -> int | None:
    """Rows of the file's classifier, or None where it has none."""
    for key in spellings("classifier.linear.weight"):
        if isinstance(weights.get(key), Tensor) and weights[key].dim() == 2:
            return len(weights[key])
    return None


def _closest(weights: Mapping[str, Any], num_classes: int | None) -> str:
    """The published name whose keys and shapes the file fits best."""
    structures = {
        name: build_elastic(replace(spec, num_classes=num_classes or spec.num_classes))
        for name, spec in PUBLISHED.items()
    }
    return min(structures, key=lambda name: len(_match(structures[name], weights)[1]))


def _empty(spec: ElasticSpec) -> ElasticSupernet:
    supernet = build_elastic(spec)
    supernet.network.to_empty(device="cpu")
    return supernet.eval()


def _with_fresh_classifier(
    source: ElasticSupernet, spec: ElasticSpec, generator: torch.Generator | None
) -> ElasticSupernet:
    supernet, weights = _empty(spec), source.shared()
    with torch.no_grad():
        for name, tensor in supernet.shared().items():
            if not name.startswith("classifier."):
                tensor.copy_(weights[name])
            elif name.endswith(".weight") and generator is not None:
                tensor.normal_(0.0, 0.01, generator=generator)
            else:
                tensor.zero_()
    return supernet


def _check_published(supernet: ElasticSupernet) -> None:
    spec = getattr(supernet, "spec", None)
    if not any(type(spec) is type(known) and _sizes(spec) == _sizes(known) for known in PUBLISHED.values()):
        raise CheckpointError(
            f"a supernet of family {supernet.space.family!r} with these sizes has no published format: the package `ofa` "
            f"builds {', '.join(PUBLISHED)} only (batch norm, 3 channels); number of classes, dropout and resolutions "
            "are free. Save its state instead"
        )
    if any(tensor.is_meta for tensor in supernet.shared().values()):
        raise CheckpointError("this supernet is structure only; load weights into it before it is saved")


def _sizes(spec: PublishedSpec) -> PublishedSpec:
    return replace(spec, num_classes=1, dropout=0.0, resolutions=(1,))
