"""Pretrained networks as supernets: a source's network compared with the one described, then its weights taken over.

The largest subnet is the pretrained network. Narrower subnets keep the inner channels that matter most, smaller kernels
start as the centre of the pretrained ones, shallower stages leave out their last blocks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from fedofa.supernet.chain import ChainSpec, ChainSupernet
from fedofa.supernet.chain_weights import classes_of, closest_keys, load_weights
from fedofa.supernet.elastic import differences, start_classifier, start_lite_residuals
from fedofa.supernet.pretrained_sources import PACKAGES, Source, open_source
from fedofa.supernet.ready_made import READY_MADE
from fedofa.supernet.weights_file import listed, refuse_classes
from fedofa.types.errors import ConfigError, MisfitError

_SHOWN = 5
_SIZES = ("blocks", "in_channels", "stem_width", "stem_kernel", "stem_stride", "stem_pool", "feature_width", "norm")
"""Settings that must be the source's: they say which network it is."""
DETAILS = ("activation", "padding", "norm_eps", "mean", "std")
"""Settings that are taken over from the source: they say how its network is run."""


def load_pretrained(
    source: str | os.PathLike[str],
    spec: ChainSpec | str | None = None,
    *,
    num_classes: int | None = None,
    generator: torch.Generator | None = None,
    keys: Mapping[str, str] | None = None,
) -> ChainSupernet:
    """The supernet of a pretrained network, inner channels ordered by importance.

    Args:
        source: "efficientnet_lite0" (its pip package is installed), a file (see `weights_file`), "timm:<model>" or
            "hf:<repository>" of a model of timm's.
        spec: the network, or its name in `READY_MADE`; None where the source says it. Of a network that the source
            says, activation, padding, norm epsilon and normalisation are the source's.
        num_classes: of the supernet. None expects the number of the spec; where it is not the file's own number, or the
            file has no classifier, the classifier is a fresh one.
        generator: draws the fresh classifier's weights; without one they are zero. It draws lite residual branches too,
            which no file holds.
        keys: name here -> name in the file, for a file in none of `LAYOUTS`.

    Raises:
        MisfitError: listing the weights' missing, unknown, misshapen and damaged entries.
        CheckpointError: when the weights cannot be had, or when their number of classes is not the spec's and
            `num_classes` is not given.
        ConfigError: for an unknown name, a package that is not installed, or a spec of other sizes than the source
            says (they are named).
    """
    found = open_source(str(source))
    named = _named_spec(spec)
    described = found.spec if named is None else _as_there(named, found)
    if described is None:
        said = (
            f"its network {found.network!r} is not described here" if found.network else "it does not say its network"
        )
        raise ConfigError(f"{source}: {said}; pass the ChainSpec, or the name if it is one of {list(READY_MADE)}")
    return _supernet(described, found, num_classes, generator, keys)[0]


def start_from(
    spec: ChainSpec,
    pretrained: bool | str,
    generator: torch.Generator,
    say: Callable[[str], object] | None = None,
) -> ChainSupernet:
    """The supernet of a spec with pretrained weights, and a fresh classifier where the classes are others.

    Args:
        pretrained: True for the weights of the ready-made network that the spec describes, else a `source`.
        generator: draws the fresh classifier's weights.
        say: is given what the user should know, if anything: settings of the source that are taken over, and a fresh
            classifier.

    Raises:
        CheckpointError, ConfigError: as `load_pretrained`.
    """
    found = open_source(_package_of(spec) if pretrained is True else str(pretrained))
    described = _as_there(spec, found)
    supernet, classifier = _supernet(described, found, spec.num_classes, generator, None)
    differing = differences(spec, described, DETAILS)
    if say and differing:
        say(f"supernet.pretrained: taken over from {found.where}: {listed(differing, len(differing))}")
    if say and classifier:
        say(f"supernet.pretrained: {classifier}: a fresh one is drawn")
    return supernet


def _package_of(spec: ChainSpec) -> str:
    """The ready-made network that the spec describes and a package carries the weights of."""
    others = {name: differences(spec, READY_MADE[name], (*_SIZES, *DETAILS)) for name in PACKAGES}
    for name, differing in others.items():
        if not differing:
            return name
    served = " or ".join(f"{name} ({listed(differing, _SHOWN)})" for name, differing in others.items())
    raise ConfigError(
        "supernet.pretrained: no package carries weights of this network; expected a file, 'timm:<model>', "
        f"'hf:<repository>' or null; true serves {served}"
    )


def _as_there(spec: ChainSpec, source: Source) -> ChainSpec:
    """The spec's network as the source has it, where the source says what it is, else with its normalisation."""
    if source.spec is None:
        fills = not spec.mean and len(source.mean) == spec.in_channels
        return replace(spec, mean=source.mean, std=source.std) if fills else spec
    differing = differences(spec, source.spec, _SIZES)
    if differing:
        raise ConfigError(
            f"{source.where}: expected the network described, found another: {listed(differing, _SHOWN)}. "
            "Describe it as it is there, or choose the source of another network"
        )
    return replace(spec, **{name: getattr(source.spec, name) for name in DETAILS})


def _supernet(
    spec: ChainSpec,
    source: Source,
    num_classes: int | None,
    generator: torch.Generator | None,
    keys: Mapping[str, str] | None,
) -> tuple[ChainSupernet, str | None]:
    """The supernet, and why its classifier is a fresh one if it is."""
    wanted = spec.num_classes if num_classes is None else num_classes
    supernet = ChainSupernet(replace(spec, num_classes=wanted))
    supernet.network.to_empty(device="cpu")
    start_lite_residuals(supernet.network, generator or torch.Generator().manual_seed(0))
    table = closest_keys(supernet, source.weights) if keys is None else keys
    classes = classes_of(source.weights, table)
    fresh = classes != wanted and not (classes is None and num_classes is None)
    try:
        load_weights(supernet, source.weights, table, head=not fresh)
    except MisfitError as error:
        raise MisfitError(f"{source.where}: {error}", error.problems) from None
    if fresh and num_classes is None:
        refuse_classes(source.where, classes, wanted)
    supernet.eval()
    if not fresh:
        return supernet, None
    start_classifier(supernet.network, generator)
    if classes is None:
        return supernet, f"{source.where} has no classifier"
    return supernet, f"the classifier of {source.where} has {classes} classes"


def _named_spec(spec: ChainSpec | str | None) -> ChainSpec | None:
    if spec is None or isinstance(spec, ChainSpec):
        return spec
    if not isinstance(spec, str):
        raise ConfigError(
            f"load_pretrained: expected a ChainSpec or one of {', '.join(READY_MADE)} as spec, found {spec!r:.80}"
        )
    if spec not in READY_MADE:
        raise ConfigError(f"load_pretrained: no network {spec!r} is described; described: {', '.join(READY_MADE)}")
    return READY_MADE[spec]
