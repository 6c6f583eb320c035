"""From stored pixels to what a subnet takes: normalised, at its resolution."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


def prepare_inputs(
    images: np.ndarray, mean: Sequence[float], std: Sequence[float], resolution: int | None = None
) -> Tensor:
    """Images `(num_examples, channels, height, width)` in uint8 to float32, normalised and resized.

    Args:
        mean, std: per channel, of pixels scaled to [0, 1].
        resolution: side in pixels of the square result (bilinear, antialiased); None keeps the size.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(images)).float().div(255.0)
    shape = (1, -1, 1, 1)
    pixels = pixels.sub_(torch.tensor(mean).view(shape)).div_(torch.tensor(std).view(shape))
    return resized(pixels, resolution)


def resized(pixels: Tensor, resolution: int | None) -> Tensor:
    """Images `(num_examples, channels, height, width)` as squares of that side in pixels; None keeps the size."""
    if resolution is None or pixels.shape[-2:] == (resolution, resolution):
        return pixels
    return functional.interpolate(pixels, size=(resolution, resolution), mode="bilinear", antialias=True)
