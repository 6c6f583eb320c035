"""Reads a file of tensors, as torch or safetensors wrote it, and refuses anything else; says what is wrong with one."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedofa.types.errors import CheckpointError


def read_content(path: str | os.PathLike[str]) -> Any:
    """What lies in the file: tensors and plain values only, nothing in it is executed.

    Raises:
        CheckpointError: when the file cannot be read so.
    """
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: not a readable checkpoint: expected tensors and plain values as torch or, as .safetensors, "
            "safetensors writes them, found something else, which is not executed"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: not a readable checkpoint ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "expected a file of tensors that torch.load(weights_only=True) or, as .safetensors, safetensors reads"
        ) from error


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


def value_problem(value: Any) -> str | None:
    """Why a tensor's values cannot be weights, in words; None where they can."""
    if not isinstance(value, Tensor):
        return None
    if not value.is_floating_point():
        return f"expected floating-point values, found {value.dtype}"
    bad = int((~value.float().isfinite()).sum())
    return f"expected finite values, found {bad} of {value.numel()} that are not" if bad else None


def listed(items: Sequence[str], most: int) -> str:
    """The first of the items in a row, and how many more there are."""
    return "; ".join(items[:most]) + (f"; and {len(items) - most} more" if len(items) > most else "")
