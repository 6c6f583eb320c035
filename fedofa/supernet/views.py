"""Tensors that lie where arrays do, also where the arrays are read-only, as those of a packed buffer are."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def view_arrays(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Each array as a tensor over the same memory: whoever writes to a tensor writes to its array, read-only or not.

    Torch warns of that once a process; here it is not news.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def view_array(array: np.ndarray) -> Tensor:
    """One array as a tensor over the same memory (see `view_arrays`)."""
    return view_arrays({"": array})[""]
