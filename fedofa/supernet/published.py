"""Published Once-for-All checkpoints, both ways: their names, reading one and writing one.

A file holds `{"state_dict": {key: tensor}}`, and under "normalisation" the `mean` and `std` of its pixels where they
are not ImageNet's, which the package `ofa` does not read. A key that is no spelling of a tensor (see `published_keys`)
is refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedofa.supernet.base import Supernet
from fedofa.supernet.chain import ChainSupernet
from fedofa.supernet.elastic import ElasticSpec, ElasticSupernet, differences, start_classifier
from fedofa.supernet.families import build_elastic
from fedofa.supernet.mobilenet_v3 import MobileNetV3Spec
from fedofa.supernet.network import CLASSIFIER_PREFIX, is_lite
from fedofa.supernet.proxyless import ProxylessSpec
from fedofa.supernet.published_keys import published_names, spellings
from fedofa.supernet.resnet import ResNetSpec
from fedofa.supernet.weights_file import (
    checked_normalisation,
    first_line,
    listed,
    read_content,
    refuse_classes,
    value_problem,
)
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

_COUNTER = "num_batches_tracked"
_DAMAGED = "damaged"
_NORMALISATION = "normalisation"
_IMAGENET = {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
_SHOWN, _SHOWN_SIZES, _SHOWN_KEYS = 20, 5, 3
"""Entries of a kind, settings, and keys of a file that has no known one, that an error shows."""


def load_published(
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    num_classes: int | None = None,
    generator: torch.Generator | None = None,
) -> ElasticSupernet:
    """The supernet of a published checkpoint file, with the normalisation that it states, or ImageNet's.

    Args:
        path: a file that `torch.load(weights_only=True)` reads.
        name: a key of `PUBLISHED`; None finds out from the file's keys and shapes.
        num_classes: of the supernet. None expects the published number; where it is not the file's own number, the
            classifier is a fresh one and the file's is left out.
        generator: draws the fresh classifier's weights; without one they are zero.

    Raises:
        MisfitError: listing the file's missing, unknown, misshapen and damaged entries.
        CheckpointError: when the file cannot be read or normalises other channels than the network has, or when its
            number of classes is not the published one and `num_classes` is not given.
        ConfigError: for a name that is none of the published ones.
    """
    if name is not None and not (isinstance(name, str) and name in PUBLISHED):
        raise ConfigError(f"load_published: expected a name of {', '.join(PUBLISHED)}, found {name!r}")
    return _load(path, *_read(Path(path)), name, num_classes, generator)


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
        CheckpointError: when the supernet is of no published space or structure only, or the file is not of the
            supernet's space (a `MisfitError`); then nothing was copied.
    """
    name = _published_name(supernet)
    if name is None:
        raise CheckpointError(f"{path}: {_no_format(supernet)}. {_instead(supernet, path)}")
    supernet.require_weights()
    weights, normalisation = _read(Path(path))
    found, num_classes = _classes(weights), len(supernet.shared()["classifier.bias"])
    source = _load(path, weights, normalisation, name, num_classes, generator)
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
    are written as they are, and so is a normalisation that is not ImageNet's. Missing folders are made.

    Raises:
        MisfitError: listing tensors whose values are no weights.
        CheckpointError: when the supernet has other sizes than the published ones, or no weights, or a normalisation
            that is none, or when the file cannot be written.
    """
    _check_published(supernet)
    normalisation = _normalisation(supernet)
    shared, slices = supernet.shared(), supernet.slice_map(supernet.space.largest())
    weights: dict[str, Tensor] = {}
    for ours, theirs in published_names(supernet):
        tensor = slices[ours].extract(shared) if ours in slices else shared[ours]
        weights[theirs] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        if theirs.endswith("running_var"):
            weights[f"{theirs.removesuffix('running_var')}{_COUNTER}"] = torch.tensor(0)
    content: dict[str, Any] = {"state_dict": weights}
    if normalisation != _IMAGENET:
        content[_NORMALISATION] = normalisation
    _write(Path(path), content)


def _normalisation(supernet: ElasticSupernet) -> dict[str, list[float]]:
    """A supernet's normalisation as a file holds it, ImageNet's where it has none."""
    if supernet.normalisation is None:
        return _IMAGENET
    found = checked_normalisation(supernet.normalisation, "supernet.normalisation")
    _check_channels("supernet.normalisation", found, supernet.spec.in_channels)
    return found


def _check_channels(where: str, normalisation: Mapping[str, list[float]], channels: int) -> None:
    """Refuse a normalisation of another number of channels."""
    found = len(normalisation["mean"])
    if found != channels:
        raise CheckpointError(
            f"{where}: expected one mean and std for each of {channels} channels, found {found}; correct it"
        )


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file whole or not at all."""
    if not path.name:
        raise CheckpointError(f"{path}: cannot be written (it is a folder); choose another path")
    temporary = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, temporary)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be written ({first_line(error)}); choose another path") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def load_published_weights(supernet: ElasticSupernet, weights: Mapping[str, Any]) -> None:
    """Copy the tensors of a published file's `state_dict` into the supernet, whose channels are then in order.

    Lite residual branches, which no file holds, stay as they are.

    Raises:
        MisfitError: listing every key that is missing, unknown, of another shape, or whose values are no weights; then
            nothing was copied.
        CheckpointError: when the supernet is structure only.
    """
    supernet.require_weights()
    keys, problems = _match(supernet, weights)
    problems[_DAMAGED] = [f"{key} ({why})" for ours, key in keys.items() if (why := value_problem(ours, weights[key]))]
    found = [f"{kind} {entry}" for kind, entries in problems.items() for entry in sorted(entries)]
    if found:
        shown = [f"{kind} {listed(sorted(entries), _SHOWN, ', ')}" for kind, entries in problems.items() if entries]
        space = _published_name(supernet) or f"a supernet of family {supernet.space.family!r}"
        raise MisfitError(f"the weights do not fit {space}: {len(found)} problems: {'; '.join(shown)}", found)
    with torch.no_grad():
        shared = supernet.shared()
        for name, key in keys.items():
            shared[name].copy_(weights[key])
    supernet.set_ordering({})


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


def _read(path: Path) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """A file's `state_dict` and normalisation."""
    content = read_content(path)
    weights = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(key, str) for key in weights):
        found = sorted(map(str, content))[:5] if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path}: expected {{'state_dict': {{key: tensor}}}}, found {found}")
    normalisation = content.get(_NORMALISATION, _IMAGENET)
    advice = "correct it, or remove it for ImageNet's"
    return weights, checked_normalisation(normalisation, f"{path}: {_NORMALISATION}", advice)


def _classes(weights: Mapping[str, Any]) -> int | None:
    """Rows of the file's classifier, or None where it has none."""
    for key in spellings("classifier.linear.weight"):
        if isinstance(weights.get(key), Tensor) and weights[key].dim() == 2:
            return len(weights[key])
    return None


def _fits(weights: Mapping[str, Any]) -> dict[str, tuple[int, int, int]]:
    """How well the file's keys and shapes fit each published name: keys known, less misshapen, less missing."""
    fits, num_classes = {}, _classes(weights)
    for name, spec in PUBLISHED.items():
        keys, problems = _match(build_elastic(replace(spec, num_classes=num_classes or spec.num_classes)), weights)
        fits[name] = len(keys), -len(problems["misshapen"]), -len(problems["missing"])
    return fits


def _closest(weights: Mapping[str, Any]) -> str:
    """The published name whose keys and shapes the file fits best."""
    fits = _fits(weights)
    return max(fits, key=lambda name: fits[name])


def _load(
    path: str | os.PathLike[str],
    weights: Mapping[str, Any],
    normalisation: dict[str, list[float]],
    name: str | None,
    num_classes: int | None,
    generator: torch.Generator | None,
) -> ElasticSupernet:
    """The supernet of a file's `state_dict` and normalisation (see `load_published`)."""
    found = _classes(weights)
    space = name or _closest(weights)
    spec = PUBLISHED[space]
    _check_channels(f"{path}: {_NORMALISATION}", normalisation, spec.in_channels)
    supernet = _empty(replace(spec, num_classes=found or spec.num_classes), normalisation)
    try:
        load_published_weights(supernet, weights)
    except MisfitError as error:
        raise _explained(error, path, weights, name, space) from None
    if num_classes is None and found != spec.num_classes:
        refuse_classes(path, found, spec.num_classes)
    if num_classes in (None, found):
        return supernet
    return _with_fresh_classifier(supernet, replace(spec, num_classes=num_classes), generator)


def _empty(spec: ElasticSpec, normalisation: dict[str, list[float]] | None) -> ElasticSupernet:
    supernet = build_elastic(spec)
    supernet.network.to_empty(device="cpu")
    supernet.normalisation = normalisation
    return supernet.eval()


def _with_fresh_classifier(
    source: ElasticSupernet, spec: ElasticSpec, generator: torch.Generator | None
) -> ElasticSupernet:
    supernet, weights = _empty(spec, source.normalisation), source.shared()
    with torch.no_grad():
        for name, tensor in supernet.shared().items():
            if not name.startswith(CLASSIFIER_PREFIX):
                tensor.copy_(weights[name])
    start_classifier(supernet.network, generator)
    return supernet


def _explained(
    error: MisfitError, path: str | os.PathLike[str], weights: Mapping[str, Any], name: str | None, space: str
) -> MisfitError:
    """The error with the file and what may help: the name that fits, or the keys where none is known."""
    if not any(known for known, _, _ in _fits(weights).values()):
        found = listed([repr(key) for key in weights], _SHOWN_KEYS, ", ") or "none"
        return MisfitError(
            f"{path}: none of its keys is a published checkpoint's: expected keys such as 'first_conv.conv.weight' "
            f"under 'state_dict', found {found}; rename them",
            [f"unknown {key}" for key in sorted(weights)],
        )
    if name is not None:
        hint = _other_name(weights, name)
    else:
        hint = "" if all(problem.startswith(_DAMAGED) for problem in error.problems) else _assumed(space)
    return MisfitError(f"{path}: {hint}{error}", error.problems)


def _other_name(weights: Mapping[str, Any], name: str) -> str:
    """A hint where the weights are those of another published name."""
    closest = _closest(weights)
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
    """Why a supernet has no published format: what differs from the nearest space that has one."""
    return (
        f"a supernet of family {supernet.space.family!r} with these sizes has no published format{_nearest(supernet)}: "
        f"the package `ofa` builds {', '.join(PUBLISHED)} only (batch norm, 3 channels); number of classes, dropout "
        "and resolutions are free"
    )


def _nearest(supernet: Supernet) -> str:
    """The published space of the supernet's family that it differs least from, and how."""
    spec = getattr(supernet, "spec", None)
    if not isinstance(spec, PublishedSpec):
        return ""
    names = [item.name for item in fields(spec)]
    others = {
        name: differences(_sizes(spec), _sizes(known), names)
        for name, known in PUBLISHED.items()
        if type(known) is type(spec)
    }
    nearest = min(others, key=lambda name: len(others[name]))
    return f" (the nearest is {nearest}: {listed(others[nearest], _SHOWN_SIZES)})"


def _instead(supernet: Supernet, path: str | os.PathLike[str]) -> str:
    """What to do with a file that a supernet of no published space cannot start from."""
    if isinstance(supernet, ChainSupernet):
        return f"A described chain takes a file of its own network as supernet.pretrained={path}, here a run's folder"
    if not isinstance(supernet, ElasticSupernet):
        return "A wrapped module takes the weights of a run's folder only"
    return "Choose the settings of the space that the file is of"


def _check_published(supernet: ElasticSupernet) -> None:
    if _published_name(supernet) is None:
        raise CheckpointError(f"{_no_format(supernet)}. Save its state instead")
    if any(map(is_lite, supernet.shared())):
        raise CheckpointError("published files hold no lite residual branches. Save the supernet's state instead")
    found = [f"{key}: {why}" for key, value in supernet.require_weights().items() if (why := value_problem(key, value))]
    if found:
        raise MisfitError(f"the supernet's values are no weights: {listed(found, _SHOWN)}; nothing was written", found)


def _sizes(spec: PublishedSpec) -> PublishedSpec:
    same = spec if isinstance(spec, ResNetSpec) else replace(spec, lite_residual=False)
    return replace(same, num_classes=1, dropout=0.0, resolutions=(1,))
