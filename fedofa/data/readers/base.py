"""What every reader gives: a source that was found, and its content."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedofa.types.errors import DatasetError

Image = npt.NDArray[np.uint8] | npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """The content of a source; `images` is read once, front to back, so that it need not fit in memory.

    Pictures are uint8, measurements float32. `row_statistics` is for measurements whose rows are quantities of
    different units: each row of each channel is then normalised on its own. `owner_names` and `owners` tell whom the
    examples come from (subjects, writers, devices), for natural partitions.
    """

    class_names: tuple[str, ...]
    labels: npt.NDArray[np.int64]  # `(num_examples,)`, each in `range(len(class_names))`
    split: npt.NDArray[np.uint8] | None  # `(num_examples,)`, 0 train and 1 test; None without an official split
    image_shape: tuple[int, int, int]  # `(channels, height, width)`
    images: Iterable[Image]  # one `image_shape` array per label
    dtype: type[np.uint8] | type[np.float32] = np.uint8
    row_statistics: bool = False
    owner_names: tuple[str, ...] = ()
    owners: npt.NDArray[np.int64] | None = None  # `(num_examples,)`, each in `range(len(owner_names))`


@dataclass(frozen=True, slots=True)
class Source:
    """A source that was found: `fingerprint` changes when its content does; `decode` does the slow work."""

    fingerprint: str
    decode: Callable[[], Decoded]


def found_file(name: str, path: Path | None, what: str) -> Path:
    """Return `path`; raises `DatasetError` when it is None or no file. `what` lies there, in words."""
    return _found(name, path, what, path is not None and path.is_file(), "file")


def found_folder(name: str, path: Path | None, what: str) -> Path:
    """Return `path`; raises `DatasetError` when it is None or no folder. `what` lies there, in words."""
    return _found(name, path, what, path is not None and path.is_dir(), "folder")


def _found(name: str, path: Path | None, what: str, is_there: bool, kind: str) -> Path:
    if path is None:
        raise DatasetError(f"source {name!r} needs the path of {what}, got none: give it as data.path=...")
    if not is_there:
        raise DatasetError(f"source {name!r} expects {what} at {path}, but there is no such {kind}: check data.path")
    return path


def file_fingerprint(path: Path) -> str:
    """Size and time of the last change of one file."""
    stat = path.stat()
    return f"{stat.st_size} bytes, modified {stat.st_mtime_ns} ns"


def tree_fingerprint(path: Path) -> str:
    """A digest over names, sizes and times of all files below a folder that are not hidden, or of one file."""
    if path.is_file():
        return file_fingerprint(path)
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith(".")]
    rows = [[str(file.relative_to(path)), file_fingerprint(file)] for file in files]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def indexed(values: npt.ArrayLike) -> tuple[tuple[str, ...], npt.NDArray[np.int64]]:
    """Names of the distinct values, in ascending order, and each value's position among them."""
    distinct, positions = np.unique(np.asarray(values), return_inverse=True)
    return tuple(str(value) for value in distinct), positions.astype(np.int64)
