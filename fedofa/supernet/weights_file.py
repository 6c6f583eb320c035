"""Reads a file of tensors, as torch or safetensors wrote it, and refuses anything else; says what is wrong with one."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedofa.types.errors import CheckpointError, FedofaError


def read_content(path: str | os.PathLike[str]) -> Any:
    """What lies in the file: tensors and plain values only, nothing in it is executed.

    Raises:
        CheckpointError: when the file cannot be read so.
    """
    try:
        if _is_safetensors(path):
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: not a readable checkpoint: expected tensors and plain values as torch or safetensors writes "
            "them, found something else, which is not executed"
        ) from error
    except Exception as error:  # unpickling damaged bytes raises anything
        raise CheckpointError(
            f"{path}: not a readable checkpoint ({first_line(error)}); "
            "expected a file of tensors that torch.load(weights_only=True) or safetensors reads"
        ) from error


def _is_safetensors(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as safetensors does, with the length of a JSON object and that; whatever it is named."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def first_line(error: Exception) -> str:
    """An error in one line: ours as they are, others by kind and the first line of what they say, if anything."""
    if isinstance(error, FedofaError):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a file that holds `{key: tensor}`, or that under "state_dict".

    Raises:
        CheckpointError: when the file cannot be read, or holds anything else.
    """
    content = read_content(path)
    weights = content.get("state_dict", content) if isinstance(content, dict) else content
    if isinstance(weights, dict) and weights and all(isinstance(value, Tensor) for value in weights.values()):
        return {str(key): value for key, value in weights.items()}
    found = sorted(map(str, weights))[:5] if isinstance(weights, dict) else type(weights).__name__
    raise CheckpointError(f"{path}: expected {{key: tensor}}, plain or under 'state_dict', found {found}")


def value_problem(name: str, value: Any) -> str | None:
    """Why a tensor's values cannot be weights, in words; None where they can.

    Args:
        name: of the weights in a supernet; no variance is negative.
        value: the tensor; anything else has no values that could be wrong.
    """
    if not isinstance(value, Tensor):
        return None
    if value.layout != torch.strided or value.is_meta:
        return f"expected a dense tensor, found {'one without values' if value.is_meta else value.layout}"
    if not value.is_floating_point():
        return f"expected floating-point values, found {value.dtype}"
    bad = int((~value.float().isfinite()).sum())
    if bad:
        return f"expected finite values, found {bad} of {value.numel()} that are not"
    below = int((value.float() < 0).sum()) if name.endswith("running_var") else 0
    return f"expected variances, found {below} of {value.numel()} below 0" if below else None


def is_normalisation(value: Any) -> bool:
    """Whether a value is a "mean" and a "std", as many finite numbers each, those of "std" positive."""
    if not isinstance(value, Mapping):
        return False
    mean, std = value.get("mean"), value.get("std")
    if not (isinstance(mean, Sequence) and isinstance(std, Sequence) and all(map(_is_finite, (*mean, *std)))):
        return False
    return len(mean) == len(std) > 0 and all(number > 0 for number in std)


def _is_finite(value: Any) -> bool:
    number = value.item() if isinstance(value, np.generic) else value
    return isinstance(number, int | float) and not isinstance(number, bool) and abs(number) <= sys.float_info.max


def checked_normalisation(value: Any, where: str, advice: str = "correct it") -> dict[str, list[float]]:
    """A "mean" and a "std" as lists of plain floats, also those of arrays.

    Raises:
        CheckpointError: saying where the value lies and what to do, when it is no normalisation.
    """
    found = {name: value.get(name) for name in ("mean", "std")} if isinstance(value, Mapping) else {}
    plain: dict[str, Any] = {
        name: item.tolist() if isinstance(item, np.ndarray | Tensor) else item for name, item in found.items()
    }
    if not is_normalisation(plain):
        raise CheckpointError(
            f'{where}: expected "mean" and "std", as many finite numbers each and those of std positive, found '
            f"{value!r:.200}; {advice}"
        )
    return {name: [float(number) for number in row] for name, row in plain.items()}


def refuse_classes(source: str | os.PathLike[str], found: int | None, expected: int) -> NoReturn:
    """Say with a `CheckpointError` that a source's classifier has another number of classes, and what to do."""
    raise CheckpointError(
        f"{source}: the classifier has {found} classes, expected {expected}; pass num_classes={found} to take it as it "
        "is, or another number of classes to start with a fresh classifier"
    )


def listed(items: Sequence[str], most: int, separator: str = "; ") -> str:
    """The first of the items in a row, and how many more there are."""
    more = [f"and {len(items) - most} more"] if len(items) > most else []
    return separator.join([*items[:most], *more])
