"""A supernet's weights as files: written at a run's end, and what other runs start from, published files too.

A run leaves `supernet.safetensors` and `supernet.json` in its folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from fedofa.data.sources import ImageSet
from fedofa.supernet.base import Supernet
from fedofa.supernet.chain import ChainSpec
from fedofa.supernet.network import is_lite
from fedofa.supernet.pretrained import DETAILS
from fedofa.supernet.published import start_from_published
from fedofa.supernet.weights_file import checked_normalisation, listed, value_problem
from fedofa.types.errors import CheckpointError, MisfitError, SpaceError
from fedofa.types.state import SharedState
from server.checkpoint import replace_file

_TENSORS, _DESCRIPTION = "supernet.safetensors", "supernet.json"
_ORDERING = "ordering/"
_SHOWN = 20
_MAY_DIFFER = ("dropout", "lite_residual", "mean", "std")
"""Settings of a supernet that change none of the weights that both have; a folder has its own normalisation."""


def write_supernet(
    folder: Path, state: SharedState, description: Mapping[str, Any], normalisation: Mapping[str, list[float]]
) -> None:
    """Write both files, each whole or not at all.

    Args:
        description: what `Supernet.description` gives.
        normalisation: per-channel "mean" and "std" of the pixels that the weights were trained on, scaled to [0, 1].
    """
    arrays = {**state.tensors, **{f"{_ORDERING}{name}": order for name, order in state.ordering.items()}}
    tensors = save_tensors({name: np.asarray(value, order="C") for name, value in arrays.items()})
    replace_file(folder / _TENSORS, tensors)
    content = {"supernet": dict(description), "normalisation": dict(normalisation)}
    replace_file(folder / _DESCRIPTION, json.dumps(content, indent=1).encode())


def start_from(supernet: Supernet, path: Path, generator: torch.Generator) -> str | None:
    """Take over the weights that a run left in a folder, with their channel ordering, or those of a published file.

    The supernet's normalisation becomes the one that the weights were trained with, where that is known.

    Args:
        supernet: of the space that the weights are of.
        path: the folder, or one of the two files in it, or a published Once-for-All checkpoint.
        generator: draws the classifier where a published file's has another number of classes.

    Returns:
        What the user should know, if anything.

    Raises:
        CheckpointError: when a file is missing or damaged, or holds a supernet of another space (the settings that
            differ are named).
    """
    folder = _folder_of(path)
    if folder is None:
        return _start_from_file(supernet, path, generator)
    _start_from_folder(supernet, folder)
    return None


def files_of(path: Path) -> tuple[Path, ...]:
    """The files that `start_from` reads."""
    folder = _folder_of(path)
    return (path,) if folder is None else (folder / _TENSORS, folder / _DESCRIPTION)


def _folder_of(path: Path) -> Path | None:
    """The run's folder that is meant; None for a published file."""
    if path.name in (_TENSORS, _DESCRIPTION):
        return path.parent
    return None if path.is_file() else path


def normalisation_for(supernet: Supernet, images: ImageSet) -> dict[str, list[float]]:
    """Per-channel "mean" and "std" of a run's pixels: what the weights were trained with, else the data's own.

    Raises:
        CheckpointError: when the weights' does not suit the data's channels and rows.
    """
    if supernet.normalisation is None:
        return {"mean": [float(x) for x in images.mean], "std": [float(x) for x in images.std]}
    _, channels, height, _ = images.images.shape
    found = len(supernet.normalisation["mean"])
    if found not in (channels, channels * height):
        raise CheckpointError(
            f"the weights' normalisation has {found} values, expected one for each of the {channels} channels of "
            f"{images.name!r} or for each of their {channels * height} rows; use data of the shape that the weights "
            f'were trained on, or remove "normalisation" from {_DESCRIPTION} to use the data\'s own'
        )
    return supernet.normalisation


def _start_from_file(supernet: Supernet, path: Path, generator: torch.Generator) -> str | None:
    try:
        left_out = start_from_published(supernet, path, generator)
    except MisfitError as error:
        raise MisfitError(f"supernet_weights: {error}", error.problems) from error
    except CheckpointError as error:
        raise CheckpointError(f"supernet_weights: {error}") from error
    if left_out is None:
        return None
    return f"supernet_weights: the classifier of {path.name} has {left_out} classes: this run starts with a fresh one"


def _start_from_folder(supernet: Supernet, folder: Path) -> None:
    try:
        content = json.loads((folder / _DESCRIPTION).read_bytes())
        description, normalisation = content["supernet"], content.get("normalisation")
        arrays = load_tensors((folder / _TENSORS).read_bytes())
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"supernet_weights: {folder} cannot be read: {error!r}; expected a run's folder with {_TENSORS} and "
            f"{_DESCRIPTION}, or a published checkpoint file"
        ) from error
    if not isinstance(description, dict):
        raise CheckpointError(
            f'supernet_weights: {folder / _DESCRIPTION}: expected an object under "supernet", found '
            f"{description!r:.80}; use the file that the run left"
        )
    _check_description(folder, description, supernet.description())
    if normalisation:
        where, advice = f"supernet_weights: {folder / _DESCRIPTION}: normalisation", "correct it, or remove it to use"
        normalisation = checked_normalisation(normalisation, where, f"{advice} the data's own")
    ordering = {name.removeprefix(_ORDERING): item for name, item in arrays.items() if name.startswith(_ORDERING)}
    tensors = {name: item for name, item in arrays.items() if not name.startswith(_ORDERING)}
    if not any(map(is_lite, tensors)):  # branches that are added now begin as this run draws them
        tensors |= {name: item for name, item in supernet.state().tensors.items() if is_lite(name)}
    _check_values(folder / _TENSORS, supernet, tensors)
    try:
        supernet.load_state(SharedState(0, tensors, ordering))
    except (CheckpointError, SpaceError) as error:
        raise CheckpointError(f"supernet_weights: {folder / _TENSORS}: {error}") from error
    if normalisation:
        supernet.normalisation = normalisation


def _check_values(path: Path, supernet: Supernet, arrays: Mapping[str, np.ndarray]) -> None:
    """Refuse values that cannot be weights, but for the integers that a wrapped module counts with."""
    expected = supernet.shared()
    weights = [name for name in sorted(arrays) if name not in expected or expected[name].is_floating_point()]
    found = [f"{name}: {why}" for name in weights if (why := value_problem(name, torch.from_numpy(arrays[name])))]
    if found:
        raise MisfitError(f"supernet_weights: {path}: {len(found)} problems: {listed(found, _SHOWN)}", found)


def _check_description(folder: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    names = [
        name
        for name in sorted(found.keys() | expected.keys())
        if name not in _MAY_DIFFER and found.get(name) != expected.get(name)
    ]
    if names:
        said = [f"{name}: {found.get(name)!r} there, {expected.get(name)!r} here" for name in names]
        raise CheckpointError(
            f"supernet_weights: {folder} holds a supernet of another space: {'; '.join(said[:5])}. Use the "
            f"supernet settings and data that it was made with{_overrides(found, names)}"
        )


def _overrides(found: Mapping[str, Any], names: Sequence[str]) -> str:
    """Where only that differs which a pretrained source says of its network: the overrides that say the same."""
    if found.get("family") != ChainSpec.family or not set(names) <= set(DETAILS):
        return ""
    given = " ".join(f"supernet.{name}={found.get(name)}" for name in names)
    return f"; where it took these over from its pretrained network, give {given} supernet.pretrained=null"
