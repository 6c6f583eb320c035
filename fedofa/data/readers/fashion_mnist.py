"""Fashion-MNIST in IDX files, gzipped or not."""

import gzip
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedofa.data.readers.base import Decoded, Source, tree_fingerprint
from fedofa.types.errors import DatasetError

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its files."""

_CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_PARTS = ("train", "t10k")
_MAGIC = bytes((0, 0, 8))  # IDX: two zeros, then 8 for unsigned bytes; the number of dimensions follows


def open_fashion_mnist(path: Path | None) -> Source:
    """Find the four IDX files in the folder `path`, or in that of Debian's package: `(1, 28, 28)`, 60,000 + 10,000."""
    folder = path or DEBIAN_FOLDER
    files = {name: _find(folder, name) for name in _file_names()}
    fingerprint = ", ".join(tree_fingerprint(file) for file in files.values())
    return Source(fingerprint, lambda: _decode(files))


def _file_names() -> list[str]:
    return [f"{part}-{kind}" for part in _PARTS for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]


def _find(folder: Path, name: str) -> Path:
    for file in (folder / name, folder / f"{name}.gz"):
        if file.is_file():
            return file
    raise DatasetError(
        f"source 'fashion_mnist' expects {name} or {name}.gz in {folder}, but neither is there: "
        "run apt-get install dataset-fashion-mnist, or give the folder of the files as data.path=..."
    )


def _decode(files: dict[str, Path]) -> Decoded:
    images, labels = [], []
    for part in _PARTS:
        images_file, labels_file = files[f"{part}-images-idx3-ubyte"], files[f"{part}-labels-idx1-ubyte"]
        images.append(read_idx(images_file, 3))
        labels.append(read_idx(labels_file, 1))
        if len(images[-1]) != len(labels[-1]):
            raise DatasetError(
                f"{images_file} holds {len(images[-1])} images, but {labels_file} {len(labels[-1])} labels: "
                "fetch both again"
            )
        if labels[-1].max(initial=0) >= len(_CLASS_NAMES):
            raise DatasetError(f"{labels_file}: expected labels from 0 to 9, found {labels[-1].max()}")
    sizes = [part.shape[1:] for part in images]
    if sizes[0] != sizes[1] or not len(images[0]):
        raise DatasetError(
            f"{files['train-images-idx3-ubyte']}: expected training images of the size of the test images, {sizes[1]}, "
            f"found {len(images[0])} of {sizes[0]}"
        )
    return Decoded(
        class_names=_CLASS_NAMES,
        labels=np.concatenate(labels).astype(np.int64),
        split=np.repeat([0, 1], [len(part) for part in images]).astype(np.uint8),
        image_shape=(1, *sizes[0]),
        images=np.concatenate(images)[:, None],
    )


def read_idx(path: Path, num_dimensions: int) -> npt.NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes, gzipped where its name ends in .gz.

    The file is 4 bytes of magic (0, 0, 8, number of dimensions), one big-endian 32-bit size a dimension, the values.
    Raises `DatasetError` when it is damaged or has another number of dimensions.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{path} cannot be read ({error}): fetch it again") from error
    expected = _MAGIC + bytes((num_dimensions,))
    if content[:4] != expected:
        raise DatasetError(
            f"{path} is no IDX file of unsigned bytes in {num_dimensions} dimensions: expected it to begin with "
            f"{expected.hex(' ')}, found {content[:4].hex(' ') or 'nothing'}"
        )
    header_bytes = 4 + 4 * num_dimensions
    if len(content) < header_bytes:
        raise DatasetError(f"{path} is truncated: expected a header of {header_bytes} bytes, found {len(content)}")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", num_dimensions, offset=4))
    values = np.frombuffer(content, np.uint8, offset=header_bytes)
    if values.size != np.prod(shape, dtype=object):
        raise DatasetError(
            f"{path} is damaged: its header says {' x '.join(map(str, shape))} bytes, found {values.size}: "
            "fetch it again"
        )
    return values.reshape(shape)
