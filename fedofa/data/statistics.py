"""Mean and standard deviation of stored images, chunk by chunk, so that they need not fit in memory."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

_CHUNK_VALUES = 2**20

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def pixel_statistics(images: npt.NDArray[np.uint8], split: npt.NDArray[np.uint8] | None) -> Statistics:
    """Mean and std per channel of pixels scaled to [0, 1], from a histogram; the std is one grey level at the least.

    Args:
        images: `(num_examples, channels, height, width)`.
        split: `(num_examples,)`, 0 train and 1 test; where given, only the train part counts.
    """
    num_channels = images.shape[1]
    histogram = np.zeros((num_channels, 256), dtype=np.int64)
    for chunk in _chunks(images, split):
        for channel in range(num_channels):
            histogram[channel] += np.bincount(chunk[:, channel].ravel(), minlength=256)
    levels = np.arange(256) / 255
    weights = histogram / histogram.sum(axis=1, keepdims=True)
    mean = weights @ levels
    variance = (weights * (levels - mean[:, None]) ** 2).sum(axis=1)
    return _as_statistics(mean, variance, 1 / 255)


def value_statistics(
    images: npt.NDArray[np.float32], split: npt.NDArray[np.uint8] | None, *, by_row: bool
) -> Statistics:
    """Mean and std of float values in their own unit, per channel or `by_row` of each channel; 1 for a constant.

    Args:
        images, split: as for `pixel_statistics`.
        by_row: give `channels * height` values, all rows of the first channel first.
    """
    axes = (0, 3) if by_row else (0, 2, 3)
    count, total = 0, np.zeros(())
    for chunk in _chunks(images, split):
        total = total + chunk.sum(axis=axes, dtype=np.float64, keepdims=True)
        count += len(chunk)
    num_values = count * (images.shape[3] if by_row else images.shape[2] * images.shape[3])
    mean, squares = total / num_values, np.zeros(())
    for chunk in _chunks(images, split):
        squares = squares + ((chunk - mean) ** 2).sum(axis=axes)
    return _as_statistics(mean.ravel(), (squares / num_values).ravel(), 1.0)


def _chunks(images: npt.NDArray, split: npt.NDArray[np.uint8] | None) -> Iterator[npt.NDArray]:
    """The training images, some at a time."""
    chunk_examples = max(1, _CHUNK_VALUES // (images.shape[2] * images.shape[3]))
    for start in range(0, len(images), chunk_examples):
        chunk = images[start : start + chunk_examples]
        yield chunk if split is None else chunk[split[start : start + chunk_examples] == 0]


def _as_statistics(mean: npt.NDArray, variance: npt.NDArray, std_of_constant: float) -> Statistics:
    std = np.where(variance > 0, np.sqrt(variance), std_of_constant)
    return tuple(mean.tolist()), tuple(std.tolist())
