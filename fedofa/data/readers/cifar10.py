"""CIFAR-10 as one .npz file of JPEGs."""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedofa.data.readers.archive import read_archive
from fedofa.data.readers.base import Decoded, Source, file_fingerprint, found_file
from fedofa.data.readers.pixels import Picture, decode_pictures
from fedofa.types.errors import DatasetError

_PACK_KEYS = ("jpeg", "offset", "label", "split", "name")


def open_cifar10(path: Path | None) -> Source:
    """Find CIFAR-10 in the JPEG pack at `path`: `(3, 32, 32)`, officially 50,000 train and 10,000 test images."""
    pack = found_file("cifar10", path, "its JPEG pack (an .npz file)")
    return Source(file_fingerprint(pack), lambda: decode_jpeg_pack(pack))


def decode_jpeg_pack(path: Path) -> Decoded:
    """Open an .npz with the keys `jpeg` (uint8, all files end to end), `offset`, `label`, `split` and `name`.

    File `i` is `jpeg[offset[i]:offset[i + 1]]`, `split` is 0 for train and 1 for test, `name` lists the class names.
    All images are RGB of one size. Raises `DatasetError` when a key is absent or the arrays contradict each other.
    """
    pack = read_archive(path, "JPEG pack", _PACK_KEYS)
    class_names = tuple(str(name) for name in pack["name"])
    _check_pack(path, pack, len(class_names))
    first = next(decode_pictures(_pictures(path, pack["jpeg"], pack["offset"][:2]), 3, None))
    return Decoded(
        class_names=class_names,
        labels=pack["label"].astype(np.int64),
        split=pack["split"].astype(np.uint8),
        image_shape=first.shape,
        images=decode_pictures(_pictures(path, pack["jpeg"], pack["offset"]), 3, None),
    )


def _pictures(path: Path, jpeg: npt.NDArray[np.uint8], offset: npt.NDArray) -> Iterator[Picture]:
    """The files between successive offsets."""
    for index, (start, end) in enumerate(itertools.pairwise(offset)):
        yield Picture(f"{index} of {path}", jpeg[start:end].tobytes())


def _check_pack(path: Path, pack: Mapping[str, npt.NDArray], num_classes: int) -> None:
    """Raise `DatasetError` at the first contradiction between the arrays of a pack."""
    jpeg, offset, label, split = (pack[key] for key in ("jpeg", "offset", "label", "split"))
    num_examples = label.size
    requirements = (
        ("label holds at least one example", num_examples > 0),
        ("label and split have one entry per example", label.shape == split.shape == (num_examples,)),
        ("offset has one entry more than label", offset.shape == (num_examples + 1,)),
        ("jpeg is a row of uint8", jpeg.dtype == np.uint8 and jpeg.ndim == 1),
        ("label, split and offset are integers", all(a.dtype.kind in "iu" for a in (label, split, offset))),
    )
    for requirement, holds in requirements:
        if not holds:
            shapes = ", ".join(f"{key} {pack[key].dtype}{pack[key].shape}" for key in _PACK_KEYS)
            raise DatasetError(f"JPEG pack {path} is damaged: expected that {requirement}, found {shapes}")
    bounds = offset.astype(np.int64)
    if bounds[0] != 0 or bounds[-1] != jpeg.size or (np.diff(bounds) <= 0).any():
        raise DatasetError(f"JPEG pack {path} is damaged: offset must rise from 0 to the {jpeg.size} bytes of jpeg")
    if label.min() < 0 or label.max() >= num_classes:
        found = f"{label.min()} to {label.max()}"
        raise DatasetError(f"JPEG pack {path} names {num_classes} classes, but its labels range from {found}")
    if not np.isin(split, (0, 1)).all():
        raise DatasetError(
            f"JPEG pack {path} is damaged: split must be 0 (train) or 1 (test), found {np.unique(split)}"
        )
    if split.all():
        raise DatasetError(f"JPEG pack {path} has no training images: split is 1 (test) for all {num_examples}")
