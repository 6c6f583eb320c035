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
    """Images `(num_examples, channels, height, width)` to float32, normalised and resized.

    Args:
        images: uint8 pixels, which are scaled to [0, 1], or float32 measurements, which are taken as they are.
        mean, std: one value a channel; or one a row of each channel, all rows of the first channel first.
        resolution: side in pixels of the square result (bilinear, antialiased); None keeps the size.
    """
    values = torch.from_numpy(np.array(images, np.float32, order="C"))
    if images.dtype == np.uint8:
        values.div_(255.0)
    shape = (1, values.shape[1], -1, 1)
    pixels = values.sub_(torch.tensor(mean).view(shape)).div_(torch.tensor(std).view(shape))
    return resized(pixels, resolution)


def resized(pixels: Tensor, resolution: int | None) -> Tensor:
    """Images `(num_examples, channels, height, width)` as squares of that side in pixels; None keeps the size."""
    if resolution is None or pixels.shape[-2:] == (resolution, resolution):
        return pixels
    return functional.interpolate(pixels, size=(resolution, resolution), mode="bilinear", antialias=True)
