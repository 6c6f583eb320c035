"""IDX files, motion windows, class folders and Hugging Face datasets: right content, and one clear error each."""

import gzip
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedofa.data.readers import fashion_mnist
from fedofa.data.readers.har import window_starts
from fedofa.data.sources import load_source
from fedofa.types.errors import DatasetError

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED_DATA = Path(os.environ.get("FEDOFA_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
RECORDINGS = SHARED_DATA / "sp_sw_har.npz"


def idx(array: np.ndarray) -> bytes:
    return (
        bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()
    )


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """Six training and three test images of 4 x 5, one part gzipped."""
    folder = tmp_path / "idx"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("t10k", 3)):
        images = idx(rng.integers(0, 256, (count, 4, 5)))
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images, mtime=0))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(count) + 4))
    return folder


def test_idx_files_are_read_in_order(idx_folder: Path, tmp_path: Path) -> None:
    found = load_source("fashion_mnist", idx_folder, tmp_path / "cache")
    rng = np.random.default_rng(0)
    expected = np.concatenate([rng.integers(0, 256, (count, 1, 4, 5)) for count in (6, 3)])
    np.testing.assert_array_equal(found.images, expected)
    np.testing.assert_array_equal(found.labels, [4, 5, 6, 7, 8, 9, 4, 5, 6])
    np.testing.assert_array_equal(found.split, [0] * 6 + [1] * 3)
    assert found.class_names[5] == "Sandal"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-labels-idx1-ubyte", None, "apt-get install dataset-fashion-mnist, or give .*data.path"),
        ("train-labels-idx1-ubyte", b"", "begin with 00 00 08 01, found nothing"),
        ("train-labels-idx1-ubyte", idx(np.zeros((2, 2))), "begin with 00 00 08 01, found 00 00 08 02"),
        ("train-labels-idx1-ubyte", b"\0\0\x08\x01\0", "header of 8 bytes, found 5"),
        ("train-labels-idx1-ubyte", idx(np.zeros(6))[:-1], "header says 6 bytes, found 5"),
        ("train-labels-idx1-ubyte", idx(np.zeros(5)), "holds 6 images, but .* 5 labels"),
        ("train-labels-idx1-ubyte", idx(np.full(6, 10)), "labels from 0 to 9, found 10"),
        ("t10k-images-idx3-ubyte.gz", gzip.compress(idx(np.zeros((3, 4, 4))), mtime=0), "size of the test images"),
        ("t10k-images-idx3-ubyte.gz", b"no gzip", "t10k-images-idx3-ubyte.gz cannot be read"),
        ("t10k-images-idx3-ubyte.gz", gzip.compress(idx(np.zeros((3, 4, 5))), mtime=0)[:-9], "cannot be read"),
    ],
)
def test_damaged_idx_files_are_refused(
    idx_folder: Path, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    (idx_folder / name).unlink()
    if content is not None:
        (idx_folder / name).write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        load_source("fashion_mnist", idx_folder, tmp_path / "cache")


@pytest.mark.slow
def test_fashion_mnist_of_debian(tmp_path: Path) -> None:
    if not fashion_mnist.DEBIAN_FOLDER.is_dir():
        pytest.skip(f"no {fashion_mnist.DEBIAN_FOLDER}; apt-get install dataset-fashion-mnist")
    found = load_source("fashion_mnist", None, tmp_path)
    assert found.images.shape == (70_000, 1, 28, 28)
    assert found.split is not None
    np.testing.assert_array_equal(np.bincount(found.split), [60_000, 10_000])
    np.testing.assert_array_equal(np.bincount(found.labels), np.full(10, 7000))
    assert found.mean == pytest.approx((0.2860,), abs=1e-4)  # the figures usually quoted
    assert found.std == pytest.approx((0.3530,), abs=1e-4)


def write_recordings(path: Path, **changes: np.ndarray | None) -> Path:
    """Two subjects of 20 samples each; the second turns to another activity half way."""
    arrays: dict[str, np.ndarray | None] = {
        "imu": np.arange(240, dtype=np.float32).reshape(40, 6),
        "label": np.repeat([0, 0, 1, 0], 10).astype(np.uint8),
        "subject": np.repeat([7, 9], 20).astype(np.uint8),
        "watch": np.zeros(40, bool),
        "execution": np.ones(40, np.uint8),
        "timestamp_ms": np.arange(40, dtype=np.int64) * 10,
        "label_names": np.array(["SEATED", "WALKING"]),
        "channels": np.array(["ax", "ay", "az", "gx", "gy", "gz"]),
        **changes,
    }
    np.savez(path, **{key: array for key, array in arrays.items() if array is not None})  # type: ignore[arg-type]
    return path


def test_windows_hold_the_samples_as_recorded(tmp_path: Path) -> None:
    path = write_recordings(tmp_path / "har.npz")
    settings = {"window_samples": 8, "window_overlap": 0.5, "held_out": [9]}
    found = load_source("har", path, tmp_path / "cache", settings)
    imu = np.arange(240, dtype=np.float32).reshape(40, 6)
    expected = [imu[start : start + 8].T[None] for start in (0, 4, 8, 12, 20, 30)]
    assert found.images.dtype == np.float32
    np.testing.assert_array_equal(found.images, expected)
    np.testing.assert_array_equal(found.labels, [0, 0, 0, 0, 1, 0])
    np.testing.assert_array_equal(found.split, [0, 0, 0, 0, 1, 1])
    assert found.owner_names == ("subject 7", "subject 9")
    np.testing.assert_array_equal(found.owners, [0, 0, 0, 0, 1, 1])
    train = np.array(expected[:4], np.float64)
    assert found.mean == pytest.approx(train.mean(axis=(0, 1, 3)))  # one for each sensor axis
    assert found.std == pytest.approx(train.std(axis=(0, 1, 3)))


def test_each_setting_has_a_cache_entry_of_its_own(tmp_path: Path) -> None:
    path = write_recordings(tmp_path / "har.npz")
    settings = {"window_samples": 8, "held_out": [9]}
    counts = [
        len(load_source("har", path, tmp_path / "cache", {**settings, **change}).labels)
        for change in ({}, {"window_overlap": 0.0}, {"window_samples": 10}, {"window_samples": 8})
    ]
    assert counts == [6, 4, 5, 6]
    assert load_source("har", path, tmp_path / "cache", {**settings, "held_out": []}).split is None


@pytest.mark.parametrize("boundary", range(4))
def test_windows_cross_no_boundary_and_no_gap(boundary: int) -> None:
    rows = [np.zeros(20, np.uint8) for _ in range(4)]
    times = np.arange(20) * 10
    whole = window_starts(rows, times, 5, 5, 100)
    np.testing.assert_array_equal(whole, [0, 5, 10, 15])
    rows[boundary][7:] = 1
    np.testing.assert_array_equal(window_starts(rows, times, 5, 5, 100), [0, 7, 12])
    rows[boundary][7:] = 0
    late, back = times.copy(), times.copy()
    late[7:] += 91
    back[7:] -= 11
    for broken in (late, back):
        np.testing.assert_array_equal(window_starts(rows, broken, 5, 5, 100), [0, 7, 12])
    late[7:] -= 1
    np.testing.assert_array_equal(window_starts(rows, late, 5, 5, 100), whole)


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"imu": None}, {}, "lacks the keys imu"),
        ({"imu": np.zeros((40, 5), np.float32)}, {}, "one column per channel"),
        ({"imu": np.full((40, 6), np.nan)}, {}, "finite"),
        ({"label": np.full(40, 2)}, {}, "below the number of label_names"),
        ({"watch": np.zeros(39, bool)}, {}, "one entry per sample"),
        ({}, {"held_out": [8]}, r"held_out: expected subjects of .*\(7 to 9\), found \[8\]"),
        ({}, {"held_out": [7, 9]}, "at least one subject to train on"),
        ({}, {"window_samples": 21}, "lower data.window_samples"),
        ({}, {"window_samples": 0}, "data.window_samples: expected at least 1, found 0"),
        ({}, {"window_overlap": 1.0}, "data.window_overlap"),
        ({}, {"max_gap_ms": 0}, "data.max_gap_ms"),
    ],
)
def test_impossible_recordings_and_windows_are_refused(
    tmp_path: Path, changes: dict, settings: dict, message: str
) -> None:
    path = write_recordings(tmp_path / "har.npz", **changes)
    with pytest.raises(DatasetError, match=message):
        load_source("har", path, tmp_path / "cache", {"window_samples": 8, "held_out": [9], **settings})


def test_real_recordings(tmp_path: Path) -> None:
    if not RECORDINGS.exists():
        pytest.skip(f"no recordings at {RECORDINGS}; set FEDOFA_SHARED_DATA to their directory")
    found = load_source("har", RECORDINGS, tmp_path)
    assert found.images.shape == (5454, 1, 6, 100)
    assert len(found.owner_names) == 23
    assert found.split is not None and found.owners is not None
    tested = {found.owner_names[owner] for owner in found.owners[found.split == 1]}
    assert tested == {f"subject {number}" for number in range(19, 24)}
    scaled = (found.images[found.split == 0] - np.reshape(found.mean, (6, 1))) / np.reshape(found.std, (6, 1))
    np.testing.assert_allclose(scaled.mean(axis=(0, 1, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(scaled.std(axis=(0, 1, 3)), 1, atol=1e-4)


def grey(value: int, size: tuple[int, int] = (6, 4)) -> Image.Image:
    return Image.new("L", size, value)


def write_folder(root: Path, images: dict[str, Image.Image]) -> Path:
    for name, image in images.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return root


def test_classes_are_folders_by_name(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", {"b/1.png": grey(10), "a/2.png": grey(30), "a/1.png": grey(20)})
    (root / "a" / ".hidden").write_text("passed over")
    found = load_source("folder", root, tmp_path / "cache", {"image_size": None})
    assert found.class_names == ("a", "b")
    assert found.split is None
    assert found.images.shape == (3, 1, 4, 6)
    assert found.images[:, 0, 0, 0].tolist() == [20, 30, 10]
    assert found.labels.tolist() == [0, 0, 1]


def test_train_and_test_folders_are_the_official_split(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", {"train/a/1.png": grey(1), "train/b/1.png": grey(2), "test/b/9.png": grey(3)})
    found = load_source("folder", root, tmp_path / "cache")
    assert found.split is not None
    assert (found.split.tolist(), found.labels.tolist()) == ([0, 0, 1], [0, 1, 1])


def test_new_and_changed_files_are_seen(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", {"a/1.png": grey(1)})
    assert len(load_source("folder", root, tmp_path / "cache").labels) == 1
    write_folder(root, {"a/2.png": grey(2)})
    assert len(load_source("folder", root, tmp_path / "cache").labels) == 2
    assert load_source("folder", root, tmp_path / "cache", {"image_size": 2}).images.shape == (2, 1, 2, 2)


def colour(mode: str) -> tuple[Image.Image, list[int]]:
    """A picture of one colour in some mode, and the RGB that it should become."""
    red = Image.new("RGB", (4, 4), (200, 40, 0))
    if mode == "RGBA":
        return Image.new("RGBA", (4, 4), (200, 40, 0, 0)), [255, 255, 255]
    if mode == "half":
        return Image.new("RGBA", (4, 4), (200, 40, 0, 128)), [227, 147, 127]
    if mode == "P":
        return red.quantize(4), [200, 40, 0]
    return red, [200, 40, 0]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "half", "P"])
def test_colour_palette_and_transparency_become_rgb(tmp_path: Path, mode: str) -> None:
    picture, expected = colour(mode)
    root = write_folder(tmp_path / "set", {"a/1.png": picture, "a/2.png": grey(77, (4, 4))})
    found = load_source("folder", root, tmp_path / "cache")
    np.testing.assert_allclose(found.images[0, :, 2, 2], expected, atol=1)
    assert found.images[1, :, 2, 2].tolist() == [77, 77, 77], "grey among colours is grey in RGB"


def test_grey_of_one_and_sixteen_bits_and_with_transparency_stays_one_channel(tmp_path: Path) -> None:
    deep = Image.fromarray(np.full((4, 6), 0x80FF, np.uint16))
    images = {"a/1.png": Image.new("1", (6, 4), 1), "a/2.png": deep, "a/3.png": Image.new("LA", (6, 4), (9, 0))}
    found = load_source("folder", write_folder(tmp_path / "set", images), tmp_path / "cache")
    assert found.images[:, 0, 0, 0].tolist() == [255, 0x80, 255]


def test_a_mode_without_a_scale_is_refused(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", {"a/1.tiff": Image.new("F", (4, 4), 0.5)})
    with pytest.raises(DatasetError, match=r"1\.tiff: expected one of the colour modes .* found 'F'"):
        load_source("folder", root, tmp_path / "cache")


def test_unlike_sizes_need_a_size_and_keep_their_proportions(tmp_path: Path) -> None:
    wide = Image.new("L", (12, 4), 0)
    wide.paste(200, (4, 0, 8, 4))  # the middle square, which is what is kept
    root = write_folder(tmp_path / "set", {"a/1.png": grey(9), "a/2.png": wide})
    with pytest.raises(
        DatasetError, match=r"2\.png has shape \(1, 4, 12\).*1\.png, has \(1, 4, 6\): give data.image_s"
    ):
        load_source("folder", root, tmp_path / "cache")
    found = load_source("folder", root, tmp_path / "cache", {"image_size": 4})
    assert np.unique(found.images[1]).tolist() == [200]
    with pytest.raises(DatasetError, match="data.image_size: expected at least 1"):
        load_source("folder", root, tmp_path / "cache", {"image_size": 0})


def test_the_cameras_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    (tmp_path / "set/a").mkdir(parents=True)
    grey(5, (6, 4)).save(tmp_path / "set/a/1.jpg", exif=exif)
    assert load_source("folder", tmp_path / "set", tmp_path / "cache").images.shape == (1, 1, 6, 4)


def empty_class(root: Path) -> None:
    (root / "c").mkdir()


def stray_test_class(root: Path) -> None:
    write_folder(root, {"train/a/1.png": grey(1), "test/z/1.png": grey(1)})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "a/broken.png").write_bytes(b"no image"), r"a/broken\.png is not a readable image"),
        (lambda root: os.truncate(root / "a/1.png", 45), r"a/1\.png is not a readable image"),
        (empty_class, "class folder .*c holds no images"),
        (lambda root: (root / "a/inner").mkdir(), "found the folder inner"),
        (stray_test_class, r"test/z: expected the classes of .*train \(a\)"),
    ],
)
def test_spoilt_folders_are_refused(tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    root = write_folder(tmp_path / "set", {"a/1.png": grey(1), "b/1.png": grey(2)})
    spoil(root)
    with pytest.raises(DatasetError, match=message):
        load_source("folder", root, tmp_path / "cache")


def test_a_folder_must_be_given_exist_and_hold_classes(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="needs the path of .*data.path"):
        load_source("folder", None, tmp_path)
    with pytest.raises(DatasetError, match="no such folder"):
        load_source("folder", tmp_path / "nowhere", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="holds no folders"):
        load_source("folder", tmp_path / "empty", tmp_path / "cache")


def test_clients_and_sources_import_nothing_heavy() -> None:
    program = """
import sys
import clients.client_app, fedofa.data.federation, fedofa.data.readers.catalogue
print(*(name for name in ("datasets", "PIL", "pandas", "pyarrow", "huggingface_hub", "mlxtend") if name in sys.modules))
"""
    command = [sys.executable, "-c", program]
    output = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=True).stdout
    assert output == "\n"
