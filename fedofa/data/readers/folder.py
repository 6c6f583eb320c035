"""Image files in one folder a class, with or without `train` and `test` folders above."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from fedofa.data.readers.base import Decoded, Source, found_folder, tree_fingerprint
from fedofa.data.readers.pixels import Picture, check_image_size, count_channels, decode_pictures
from fedofa.types.errors import DatasetError


def open_folder(path: Path | None, *, image_size: int | None = None) -> Source:
    """Find `path/<class>/<image>`, or `path/train/<class>/<image>` and `path/test/<class>/<image>`.

    Classes are numbered in the order of their names; hidden files are passed over. `image_size` is the side in pixels
    that images are cut and resized to (`pixels.decode_pictures`); None where all have one size.
    """
    check_image_size(image_size)
    root = found_folder("folder", path, "a folder with one folder of images a class")
    return Source(tree_fingerprint(root), partial(_decode, root, image_size))


def _decode(root: Path, image_size: int | None) -> Decoded:
    parts = [root / "train", root / "test"] if _subfolders(root / "train") else [root]
    class_names = tuple(folder.name for folder in _subfolders(parts[0]))
    if not class_names:
        raise DatasetError(
            f"source 'folder': {root} holds no folders; expected {root}/<class>/<image> or {root}/train/<class>/<image>"
        )
    files, labels, split = [], [], []
    for number, part in enumerate(parts):
        for folder in _subfolders(part):
            if folder.name not in class_names:
                raise DatasetError(f"{folder}: expected the classes of {parts[0]} ({', '.join(class_names)})")
            found = _image_files(folder)
            files += found
            labels += [class_names.index(folder.name)] * len(found)
            split += [number] * len(found)
    pictures = partial(_pictures, files)
    channels = count_channels(pictures())
    first = next(decode_pictures(pictures(), channels, image_size))
    return Decoded(
        class_names=class_names,
        labels=np.array(labels, dtype=np.int64),
        split=np.array(split, dtype=np.uint8) if any(split) else None,
        image_shape=first.shape,
        images=decode_pictures(pictures(), channels, image_size),
    )


def _subfolders(path: Path) -> list[Path]:
    """The folders in a folder, by name; none where there is no such folder."""
    if not path.is_dir():
        return []
    return sorted(item for item in path.iterdir() if item.is_dir() and not item.name.startswith("."))


def _image_files(folder: Path) -> list[Path]:
    """The files of one class; raises `DatasetError` when there are none, or folders among them."""
    items = sorted(item for item in folder.iterdir() if not item.name.startswith("."))
    inner = [item for item in items if not item.is_file()]
    if inner:
        raise DatasetError(f"class folder {folder}: expected image files only, found the folder {inner[0].name}")
    if not items:
        raise DatasetError(f"class folder {folder} holds no images: add some or remove it")
    return items


def _pictures(files: list[Path]) -> Iterator[Picture]:
    return (Picture(str(file), file) for file in files)
