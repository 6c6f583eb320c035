"""From stored pixels to what a subnet takes: normalised, at its resolution."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedofa.supernet.views import view_array


@dataclass(frozen=True, eq=False)
class Pixels:
    """A client's images as they are stored, in place of a tensor of all of them: a part is prepared when it is taken.

    Prepared images of 8 bits take four times as much, and are wanted a micro-batch at a time.

    Args:
        images: `(num_examples, channels, height, width)`, uint8 pixels or float32 measurements.
        mean, std: float32 `(1, channels, 1 or height, 1)`.
        resolution: side in pixels of the square result; None keeps the size.
    """

    images: Tensor
    mean: Tensor
    std: Tensor
    resolution: int | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, part: Tensor | slice) -> Tensor:
        """Some of the images, float32, normalised and resized."""
        values = self.images[part]
        if values.dtype == torch.uint8:
            values = values.to(torch.float32).div_(255.0).sub_(self.mean)
        else:
            values = values - self.mean
        return resized(values.div_(self.std), self.resolution)

    def split(self, size: int) -> Iterator[Tensor]:
        """All images, so many at a time."""
        return (self[start : start + size] for start in range(0, len(self), size))

    @property
    def is_meta(self) -> bool:
        """Whether they are shapes alone."""
        return self.images.is_meta

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What they are made of, by name."""
        return {"images": self.images, "mean": self.mean, "std": self.std}


Inputs = Tensor | Pixels
"""A client's examples, `(num_examples, channels, height, width)`: as the network takes them, or as they are stored."""


@dataclass(frozen=True, slots=True)
class ImageForm:
    """How a client's examples lie in its memory.

    Args:
        shape: `(channels, height, width)`.
        pixel_bytes: of one value, 1 for pixels or 4 for measurements.
        resolution: side in pixels that they are resized to; None keeps the size.
    """

    shape: tuple[int, int, int]
    pixel_bytes: int = 1
    resolution: int | None = None

    @property
    def stored_bytes(self) -> int:
        """Of one example."""
        return math.prod(self.shape) * self.pixel_bytes

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """`(channels, height, width)` as the network takes them."""
        channels, height, width = self.shape
        return channels, self.resolution or height, self.resolution or width

    def on_meta(self, count: int) -> Pixels:
        """So many examples, shapes alone."""
        dtype = torch.uint8 if self.pixel_bytes == 1 else torch.float32
        images = torch.zeros(count, *self.shape, dtype=dtype, device="meta")
        mean = torch.zeros(1, self.shape[0], 1, 1, device="meta")
        return Pixels(images, mean, mean, self.resolution)


def stored_inputs(
    images: np.ndarray, mean: Sequence[float], std: Sequence[float], resolution: int | None = None
) -> Pixels:
    """Images `(num_examples, channels, height, width)` as a subnet will take them; they stay where they are.

    Args:
        images: uint8 pixels, which are scaled to [0, 1], or float32 measurements, which are taken as they are.
        mean, std: one value a channel; or one a row of each channel, all rows of the first channel first.
        resolution: side in pixels of the square result (bilinear, antialiased); None keeps the size.
    """
    stored = view_array(images if images.dtype == np.uint8 else images.astype(np.float32, copy=False))
    shape = (1, stored.shape[1], -1, 1)
    return Pixels(stored, torch.tensor(mean).view(shape), torch.tensor(std).view(shape), resolution)


def prepare_inputs(
    images: np.ndarray, mean: Sequence[float], std: Sequence[float], resolution: int | None = None
) -> Tensor:
    """All images of `stored_inputs` at once, float32, normalised and resized."""
    return stored_inputs(np.ascontiguousarray(images), mean, std, resolution)[:]


def resized(pixels: Tensor, resolution: int | None) -> Tensor:
    """Images `(num_examples, channels, height, width)` as squares of that side in pixels; None keeps the size."""
    if resolution is None or pixels.shape[-2:] == (resolution, resolution):
        return pixels
    return functional.interpolate(pixels, size=(resolution, resolution), mode="bilinear", antialias=True)
