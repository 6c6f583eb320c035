"""Named sources of labelled images: decoded once into a cache directory, memory-mapped by every process after that."""

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedofa.data.cache import load_cached
from fedofa.data.readers.base import Decoded, Image, Source
from fedofa.data.readers.catalogue import SOURCES
from fedofa.data.statistics import pixel_statistics, value_statistics
from fedofa.types.errors import DatasetError

_FORMAT_VERSION = 2
_DTYPES: Mapping[str, type[np.generic]] = {"uint8": np.uint8, "float32": np.float32}


@dataclass(frozen=True, slots=True, eq=False)
class ImageSet:
    """A source's examples, memory-mapped and read-only.

    `mean` and `std` are per channel over the official train part, or over all images where there is none: of pixels
    scaled to [0, 1] for uint8, of the values themselves for float32. A source of measurements may have one for every
    row of every channel, `channels * height` values. None of them is zero, so that dividing by `std` is safe.
    """

    name: str
    class_names: tuple[str, ...]
    images: Image  # `(num_examples, channels, height, width)`
    labels: npt.NDArray[np.int64]  # `(num_examples,)`
    split: npt.NDArray[np.uint8] | None  # `(num_examples,)`, 0 train and 1 test; None without an official split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    owner_names: tuple[str, ...] = ()  # the subjects, writers or devices that the examples come from
    owners: npt.NDArray[np.int64] | None = None  # `(num_examples,)`, positions in `owner_names`; None without any


def load_source(name: str, path: Path | None, cache_dir: Path, settings: Mapping[str, Any] | None = None) -> ImageSet:
    """Load the source `name`, decoding it into `cache_dir/<name>-<digest>/` the first time.

    `path` is where the source's files lie; None for one that is embedded in a package. `settings` are the source's
    own. The digest covers the name, the settings, sizes and modification times of the files (or the package's
    version) and the format of the cache. Any number of processes may load at once; a damaged cache entry is decoded
    again.

    Raises `DatasetError` for an unknown name, a missing or damaged file, a package that is not installed, or settings
    that do not suit the content.
    """
    if name not in SOURCES:
        close = difflib.get_close_matches(name, SOURCES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise DatasetError(f"unknown source {name!r}: expected one of {', '.join(sorted(SOURCES))}{hint}")
    own = dict(settings or {})
    source = SOURCES[name](path, **own)
    identity = json.dumps([_FORMAT_VERSION, name, own, source.fingerprint], sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return load_cached(cache_dir / f"{name}-{digest}", _load_entry, lambda entry: _save_entry(entry, name, source))


def _save_entry(entry: Path, name: str, source: Source) -> None:
    decoded = source.decode()
    entry.mkdir()
    images = _save_images(entry / "images.npy", decoded)
    np.save(entry / "labels.npy", decoded.labels)
    for key, row in (("split", decoded.split), ("owners", decoded.owners)):
        if row is not None:
            np.save(entry / f"{key}.npy", row)
    if decoded.dtype is np.uint8:
        mean, std = pixel_statistics(images, decoded.split)
    else:
        mean, std = value_statistics(images, decoded.split, by_row=decoded.row_statistics)
    header = {
        "name": name,
        "class_names": decoded.class_names,
        "shape": images.shape,
        "dtype": images.dtype.name,
        "has_split": decoded.split is not None,
        "has_owners": decoded.owners is not None,
        "owner_names": decoded.owner_names,
        "mean": mean,
        "std": std,
    }
    (entry / "source.json").write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")


def _save_images(path: Path, decoded: Decoded) -> npt.NDArray:
    """Write the images one by one into an .npy file, and return it mapped."""
    shape = (decoded.labels.size, *decoded.image_shape)
    images = np.lib.format.open_memmap(path, mode="w+", dtype=decoded.dtype, shape=shape)
    for index, image in enumerate(decoded.images):
        images[index] = image
    images.flush()
    return images


def _load_entry(entry: Path) -> ImageSet:
    """Map a cache entry; raises `ValueError` or an error of json or numpy when it is damaged."""
    header = json.loads((entry / "source.json").read_text(encoding="utf-8"))
    shape = tuple(header["shape"])
    return ImageSet(
        name=header["name"],
        class_names=tuple(header["class_names"]),
        images=_map_array(entry / "images.npy", _DTYPES[header["dtype"]], shape),
        labels=_map_array(entry / "labels.npy", np.int64, shape[:1]),
        split=_map_array(entry / "split.npy", np.uint8, shape[:1]) if header["has_split"] else None,
        mean=tuple(header["mean"]),
        std=tuple(header["std"]),
        owner_names=tuple(header["owner_names"]),
        owners=_map_array(entry / "owners.npy", np.int64, shape[:1]) if header["has_owners"] else None,
    )


def _map_array(path: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> npt.NDArray:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(f"{path} holds {array.dtype}{array.shape}, expected {np.dtype(dtype)}{shape}")
    return array
