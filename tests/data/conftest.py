"""A JPEG pack small enough to build in every test, in the format of the real ones."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def encode_jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


@pytest.fixture(name="encode_jpeg")
def encode_jpeg_fixture() -> Callable[[np.ndarray], bytes]:
    """Return the function that turns `(height, width, 3)` pixels into a JPEG."""
    return encode_jpeg


@pytest.fixture
def write_pack(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a pack of 12 images of one grey each, with keys replaced or (None) left out."""

    def write(**changes: np.ndarray | None) -> Path:
        greys = np.arange(12) * 20
        jpegs = [encode_jpeg(np.full((8, 8, 3), grey, dtype=np.uint8)) for grey in greys]
        arrays: dict[str, np.ndarray | None] = {
            "jpeg": np.frombuffer(b"".join(jpegs), dtype=np.uint8),
            "offset": np.cumsum([0, *map(len, jpegs)]),
            "label": np.arange(12, dtype=np.uint8) % 3,
            "split": np.repeat([0, 1], [8, 4]).astype(np.uint8),
            "name": np.array(["cat", "dog", "ship"]),
            **changes,
        }
        path = tmp_path / "pack.npz"
        present = {key: array for key, array in arrays.items() if array is not None}
        np.savez(path, allow_pickle=True, **present)
        return path

    return write


@pytest.fixture(scope="session")
def warm_cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache directory shared by the tests that only read the real mnist5k."""
    return tmp_path_factory.mktemp("cache")
