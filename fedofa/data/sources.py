"""Named sources of labelled images: decoded once into a cache directory, memory-mapped by every process after that."""

import difflib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedofa.data.cache import load_cached
from fedofa.data.decoders import SOURCES, Decoded, Source
from fedofa.types.errors import DatasetError

_FORMAT_VERSION = 1
_CHUNK_PIXELS = 2**20


@dataclass(frozen=True, slots=True, eq=False)
class ImageSet:
    """A source's examples, memory-mapped and read-only.

    `mean` and `std` are per channel, of pixels scaled to [0, 1], over the official train part, or over all images
    where there is none. A constant channel has the `std` of one grey level, so that dividing by it is safe.
    """

    name: str
    class_names: tuple[str, ...]
    images: npt.NDArray[np.uint8]  # `(num_examples, channels, height, width)`
    labels: npt.NDArray[np.int64]  # `(num_examples,)`
    split: npt.NDArray[np.uint8] | None  # `(num_examples,)`, 0 train and 1 test; None without an official split
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_source(name: str, path: Path | None, cache_dir: Path) -> ImageSet:
    """Load the source `name`, decoding it into `cache_dir/<name>-<digest>/` the first time.

    `path` is where the source's file lies; None for one that is embedded in a package. The digest covers the name,
    the file's size and modification time (or the package's version) and the format of the cache. Any number of
    processes may load at once; a damaged cache entry is decoded again.

    Raises `DatasetError` for an unknown name, a missing or damaged file, or a package that is not installed.
    """
    if name not in SOURCES:
        close = difflib.get_close_matches(name, SOURCES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise DatasetError(f"unknown source {name!r}: expected one of {', '.join(sorted(SOURCES))}{hint}")
    source = SOURCES[name](path)
    identity = json.dumps([_FORMAT_VERSION, name, source.fingerprint])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return load_cached(cache_dir / f"{name}-{digest}", _load_entry, lambda entry: _save_entry(entry, name, source))


def _save_entry(entry: Path, name: str, source: Source) -> None:
    decoded = source.decode()
    entry.mkdir()
    images = _save_images(entry / "images.npy", decoded)
    np.save(entry / "labels.npy", decoded.labels)
    if decoded.split is not None:
        np.save(entry / "split.npy", decoded.split)
    mean, std = _channel_statistics(images, decoded.split)
    header = {
        "name": name,
        "class_names": decoded.class_names,
        "shape": images.shape,
        "has_split": decoded.split is not None,
        "mean": mean,
        "std": std,
    }
    (entry / "source.json").write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")


def _save_images(path: Path, decoded: Decoded) -> npt.NDArray[np.uint8]:
    """Write the images one by one into an .npy file, and return it mapped."""
    shape = (decoded.labels.size, *decoded.image_shape)
    images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    for index, image in enumerate(decoded.images):
        images[index] = image
    images.flush()
    return images


def _channel_statistics(
    images: npt.NDArray[np.uint8], split: npt.NDArray[np.uint8] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel in [0, 1] units, from a histogram filled chunk by chunk."""
    num_examples, num_channels, height, width = images.shape
    histogram = np.zeros((num_channels, 256), dtype=np.int64)
    chunk_examples = max(1, _CHUNK_PIXELS // (height * width))
    for start in range(0, num_examples, chunk_examples):
        chunk = images[start : start + chunk_examples]
        if split is not None:
            chunk = chunk[split[start : start + chunk_examples] == 0]
        for channel in range(num_channels):
            histogram[channel] += np.bincount(chunk[:, channel].ravel(), minlength=256)
    levels = np.arange(256) / 255
    weights = histogram / histogram.sum(axis=1, keepdims=True)
    mean = weights @ levels
    variance = (weights * (levels - mean[:, None]) ** 2).sum(axis=1)
    std = np.where(variance > 0, np.sqrt(variance), 1 / 255)
    return tuple(mean.tolist()), tuple(std.tolist())


def _load_entry(entry: Path) -> ImageSet:
    """Map a cache entry; raises `ValueError` or an error of json or numpy when it is damaged."""
    header = json.loads((entry / "source.json").read_text(encoding="utf-8"))
    shape = tuple(header["shape"])
    return ImageSet(
        name=header["name"],
        class_names=tuple(header["class_names"]),
        images=_map_array(entry / "images.npy", np.uint8, shape),
        labels=_map_array(entry / "labels.npy", np.int64, shape[:1]),
        split=_map_array(entry / "split.npy", np.uint8, shape[:1]) if header["has_split"] else None,
        mean=tuple(header["mean"]),
        std=tuple(header["std"]),
    )


def _map_array(path: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> npt.NDArray:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(f"{path} holds {array.dtype}{array.shape}, expected {np.dtype(dtype)}{shape}")
    return array
