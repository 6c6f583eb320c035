"""Published Once-for-All checkpoints, both ways: their names, their keys, reading one and writing one.

A file holds `{"state_dict": {key: tensor}}`. Its keys are those of the package `ofa` today, or older ones that say
`mobile_inverted_conv` for a block's `conv` and name a layer's tensors with one step more or less (`bn.bn.weight` for
`bn.weight`); each tensor has a fixed list of spellings, and a key that is none of them is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedofa.supernet.base import Supernet
from fedofa.supernet.elastic import ElasticSpec, ElasticSupernet
from fedofa.supernet.families import build_elastic
from fedofa.supernet.mobilenet_v3 import MobileNetV3Spec
from fedofa.supernet.network import BottleneckSpec, ConvSpec, MBConvSpec, is_lite
from fedofa.supernet.proxyless import ProxylessSpec
from fedofa.supernet.resnet import ResNetSpec
from fedofa.supernet.weights_file import read_content, value_problem
from fedofa.types.errors import CheckpointError, ConfigError, MisfitError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of pixels scaled to [0, 1]: what the published networks were trained with."""

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


def load_published(
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    num_classes: int | None = None,
    generator: torch.Generator | None = None,
) -> ElasticSupernet:
    """The supernet of a published checkpoint file, whose pixels were normalised by ImageNet's statistics.

    Args:
        path: a file that `torch.load(weights_only=True)` reads.
        name: a key of `PUBLISHED`; None finds out from the file's keys and shapes.
        num_classes: of the supernet. None expects the published number; where it is not the file's own number, the
            classifier is a fresh one and the file's is left out.
        generator: draws the fresh classifier's weights; without one they are zero.

    Raises:
        MisfitError: listing the file's missing, unknown, misshapen and damaged entries.
        CheckpointError: when the file cannot be read, or when its number of classes is not the published one and
            `num_classes` is not given.
        ConfigError: for a name that is none of the published ones.
    """
    if name is not None and name not in PUBLISHED:
        raise ConfigError(f"load_published: expected a name of {', '.join(PUBLISHED)}, found {name!r}")
    return _load(path, _read(Path(path)), name, num_classes, generator)


def start_from_published(
    supernet: Supernet, path: str | os.PathLike[str], generator: torch.Generator | None = None
) -> int | None:
    """Take over the weights of a published checkpoint file, and the normalisation that they expect.

    Args:
        supernet: of a published space; its number of classes, dropout and resolutions are free.
        path: the file.
        generator: draws the classifier where the file's has another number of classes; without one it is zero.

    Returns:
        The file's number of classes where its classifier was left out, else None.

    Raises:
        CheckpointError: when the supernet is of no published space, or the file is not of the supernet's (a
            `MisfitError`); then nothing was copied.
    """
    name = _published_name(supernet)
    if name is None:
        raise CheckpointError(f"{path}: {_no_format(supernet)}. Choose the settings of the space that the file is of")
    weights = _read(Path(path))
    found, num_classes = _classes(weights), len(supernet.shared()["classifier.bias"])
    source = _load(path, weights, name, num_classes, generator)
    tensors = source.shared()
    with torch.no_grad():
        for key, tensor in supernet.shared().items():
            if not is_lite(key):
                tensor.copy_(tensors[key])
    supernet.set_ordering({})
    supernet.normalisation = source.normalisation
    return found if found != num_classes else None


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
        MisfitError: listing every key that is missing, unknown, of another shape, or whose values are no weights; then
            nothing was copied.
    """
    keys, problems = _match(supernet, weights)
    problems["damaged"] = [f"{key} ({why})" for key in keys.values() if (why := value_problem(weights[key]))]
    found = [f"{kind} {entry}" for kind, entries in problems.items() for entry in sorted(entries)]
    if found:
        listed = "; ".join(_listed(kind, entries) for kind, entries in problems.items() if entries)
        space = _published_name(supernet) or f"a supernet of family {supernet.space.family!r}"
        raise MisfitError(f"the weights do not fit {space}: {len(found)} problems: {listed}", found)
    with torch.no_grad():
        for name, tensor in supernet.shared().items():
            tensor.copy_(weights[keys[name]])
    supernet.set_ordering({})


def _listed(kind: str, entries: list[str]) -> str:
    more = f" and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
    return f"{kind} {', '.join(sorted(entries)[:_SHOWN])}{more}"


def _match(supernet: ElasticSupernet, weights: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The key that holds each shared tensor, and the entries that are missing, unknown or misshapen."""
    shared, keys, counters = supernet.shared(), {}, set()
    missing, misshapen = [], []
    for ours, theirs in published_names(supernet):
        present = [key for key in spellings(theirs) if key in weights]
        if theirs.endswith("running_var"):
            counters |= set(spellings(f"{theirs.removesuffix('running_var')}{_COUNTER}"))
        if not present:
            missing.append(theirs)
            continue
        keys[ours] = present[0]
        expected, value = tuple(shared[ours].shape), weights[present[0]]
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if shape != expected:
            misshapen.append(f"{present[0]} (expected shape {expected}, found {shape})")
    unknown = list(set(weights) - set(keys.values()) - counters)
    return keys, {"missing": missing, "unknown": unknown, "misshapen": misshapen}


def _read(path: Path) -> dict[str, Any]:
    """A file's `state_dict`."""
    content = read_content(path)
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

    def fit(name: str) -> tuple[int, int, int]:
        keys, problems = _match(structures[name], weights)
        return len(keys), -len(problems["misshapen"]), -len(problems["missing"])

    return max(structures, key=fit)


def _load(
    path: str | os.PathLike[str],
    weights: Mapping[str, Any],
    name: str | None,
    num_classes: int | None,
    generator: torch.Generator | None,
) -> ElasticSupernet:
    """The supernet of a file's `state_dict` (see `load_published`)."""
    found = _classes(weights)
    space = name or _closest(weights, found)
    spec = PUBLISHED[space]
    if num_classes is None and found not in (None, spec.num_classes):
        raise CheckpointError(
            f"{path}: the classifier has {found} classes, expected {spec.num_classes}; pass num_classes={found} to "
            "take it as it is, or another number of classes to start with a fresh classifier"
        )
    supernet = _empty(replace(spec, num_classes=found or spec.num_classes))
    try:
        load_published_weights(supernet, weights)
    except MisfitError as error:
        hint = _other_name(weights, name) if name else _assumed(space)
        raise MisfitError(f"{path}: {hint}{error}", error.problems) from None
    if num_classes in (None, supernet.spec.num_classes):  # type: ignore[attr-defined]
        return supernet
    return _with_fresh_classifier(supernet, replace(spec, num_classes=num_classes), generator)


def _empty(spec: ElasticSpec) -> ElasticSupernet:
    supernet = build_elastic(spec)
    supernet.network.to_empty(device="cpu")
    supernet.normalisation = {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
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


def _other_name(weights: Mapping[str, Any], name: str) -> str:
    """A hint where the weights are those of another published name."""
    closest = _closest(weights, _classes(weights))
    structure = build_elastic(replace(PUBLISHED[closest], num_classes=_classes(weights) or 1))
    if closest == name or any(_match(structure, weights)[1].values()):
        return ""
    return f"the file is of {closest}, not of {name}: use that space; "


def _assumed(space: str) -> str:
    """What the file was taken for where nobody said what it is, and how to say it."""
    others = ", ".join(name for name in PUBLISHED if name != space)
    return f"the file was taken to be {space}, which it fits best; if it is another, pass name= one of {others}; "


def _published_name(supernet: Supernet) -> str | None:
    """The published name whose sizes the supernet has."""
    spec = getattr(supernet, "spec", None)
    if not isinstance(spec, PublishedSpec):
        return None
    return next((name for name, known in PUBLISHED.items() if _sizes(spec) == _sizes(known)), None)


def _no_format(supernet: Supernet) -> str:
    return (
        f"a supernet of family {supernet.space.family!r} with these sizes has no published format: the package `ofa` "
        f"builds {', '.join(PUBLISHED)} only (batch norm, 3 channels); number of classes, dropout and resolutions are "
        "free"
    )


def _check_published(supernet: ElasticSupernet) -> None:
    if _published_name(supernet) is None:
        raise CheckpointError(f"{_no_format(supernet)}. Save its state instead")
    if any(map(is_lite, supernet.shared())):
        raise CheckpointError("published files hold no lite residual branches. Save the supernet's state instead")
    if any(tensor.is_meta for tensor in supernet.shared().values()):
        raise CheckpointError("this supernet is structure only; load weights into it before it is saved")


def _sizes(spec: PublishedSpec) -> PublishedSpec:
    same = spec if isinstance(spec, ResNetSpec) else replace(spec, lite_residual=False)
    return replace(same, num_classes=1, dropout=0.0, resolutions=(1,))
