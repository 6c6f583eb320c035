"""From stored pixels to what a subnet takes, without torch: as `inputs.prepare_inputs`, to float rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np


def prepare_pixels(images: np.ndarray, normalisation: Mapping[str, Sequence[float]], resolution: int) -> np.ndarray:
    """Images `(num_examples, channels, height, width)` to float32, normalised and resized.

    Args:
        images: uint8 pixels, which are scaled to [0, 1], or float32 measurements, which are taken as they are.
        normalisation: "mean" and "std", one value a channel; or one a row of each channel, all rows of the first
            channel first.
        resolution: side in pixels of the square result (bilinear, antialiased).
    """
    values = images.astype(np.float32)
    if images.dtype == np.uint8:
        values /= np.float32(255)
    shape = (1, values.shape[1], -1, 1)
    mean, std = (np.array(normalisation[name], np.float32).reshape(shape) for name in ("mean", "std"))
    values -= mean
    values /= std
    rows, columns = (_resampling(side, resolution) for side in values.shape[2:])
    return values if rows is None and columns is None else _applied(columns, _applied(rows, values, 2), 3)


def _applied(matrix: np.ndarray | None, values: np.ndarray, axis: int) -> np.ndarray:
    if matrix is None:
        return values
    return matrix @ values if axis == 2 else values @ matrix.T


@lru_cache(maxsize=16)
def _resampling(side: int, wanted: int) -> np.ndarray | None:
    """The matrix `(wanted, side)` of a bilinear, antialiased change of length; None where it stays.

    A result's weights are a triangle around its place in the input, as wide as the step between two results, at least 1
    on each side, cut off at the edges and scaled to a sum of 1. They are computed in float32, as torch does.
    """
    if side == wanted:
        return None
    one, half, step = np.float32(1), np.float32(0.5), np.float32(side / wanted)
    centres = (np.arange(wanted, dtype=np.float32) + half)[:, None] * step
    distances = np.abs(np.arange(side, dtype=np.float32) - centres + half) * (one / max(step, one))
    weights = np.clip(one - distances, 0, None)
    return weights / weights.sum(1, keepdims=True)
