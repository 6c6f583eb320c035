"""Reading .npz files whole, with one error for every way in which they can be damaged."""

import zipfile
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedofa.types.errors import DatasetError


def read_archive(path: Path, what: str, keys: tuple[str, ...]) -> dict[str, npt.NDArray]:
    """Return the arrays under `keys`; raises `DatasetError` when the file is damaged or lacks one.

    `what` the file is, in words ("JPEG pack").
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            absent = [key for key in keys if key not in file]
            if not absent:
                return {key: file[key] for key in keys}
            found = ", ".join(file)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DatasetError(f"{path} is not a readable .npz {what} ({error}): fetch or build it again") from error
    raise DatasetError(
        f"{what} {path} lacks the keys {', '.join(absent)} (found: {found or 'none'}): it has {', '.join(keys)}"
    )
