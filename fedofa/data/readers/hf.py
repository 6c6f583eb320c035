"""Any Hugging Face dataset with an image and a label column, by name on the hub or from this machine's disk.

No code of a dataset is ever run: the package `datasets` reads its own format, Parquet and image folders.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedofa.data.extras import missing_extra, silenced_datasets
from fedofa.data.readers.base import Decoded, Source, indexed, tree_fingerprint
from fedofa.data.readers.pixels import Picture, check_image_size, count_channels, decode_pictures
from fedofa.types.errors import DatasetError

if TYPE_CHECKING:
    from datasets import Dataset

_PURPOSE = "read the source 'hf'"
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class _Request:
    """What to read of which dataset; the fields are the settings of the same names."""

    path: Path | None
    hub_name: str | None
    hub_config: str | None
    revision: str | None
    train_split: str
    test_split: str | None
    image_column: str
    label_column: str
    client_column: str | None
    image_size: int | None

    @property
    def where(self) -> str:
        """The dataset's name or path, for errors."""
        return str(self.path or self.hub_name)


def open_hf(
    path: Path | None,
    *,
    hub_name: str | None = None,
    hub_config: str | None = None,
    revision: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
    client_column: str | None = None,
    image_size: int | None = None,
) -> Source:
    """Find the dataset at `path`, or `hub_name` on the hub: exactly one of them.

    Args:
        path: what `save_to_disk` wrote, a Parquet file, or a folder of Parquet files or of images in class folders.
        hub_name, hub_config: "owner/name" on the hub and, where it has several, the configuration.
        revision: branch, tag or commit on the hub; None is the main branch. A commit that was decoded before is found
            without asking the hub.
        train_split, test_split: names of the splits; None for a test split where there is none or none is wanted.
        image_column, label_column: labels are class labels, whole numbers or strings.
        client_column: whom the examples come from, for natural partitions.
        image_size: side in pixels that images are cut and resized to (`pixels.decode_pictures`).
    """
    check_image_size(image_size)
    if (path is None) == (hub_name is None):
        raise DatasetError(
            "source 'hf' needs either data.path (a dataset on this machine) or data.hub_name (one on the hub), "
            f"found {'neither' if path is None else 'both'}"
        )
    if path is not None and not path.exists():
        raise DatasetError(f"source 'hf' expects a dataset at {path}, but there is no such path: check data.path")
    version = tree_fingerprint(path) if path is not None else _hub_commit(str(hub_name), revision)
    request = _Request(
        path,
        hub_name,
        hub_config,
        version if path is None else None,
        train_split,
        test_split,
        image_column,
        label_column,
        client_column,
        image_size,
    )
    return Source(version, partial(_decode, request))


def _hub_commit(hub_name: str, revision: str | None) -> str:
    """The commit that a revision stands for; asks the hub unless it is one."""
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
    except ImportError as error:
        raise missing_extra("datasets", _PURPOSE) from error
    try:
        commit = HfApi().dataset_info(hub_name, revision=revision, timeout=20).sha
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise DatasetError(
            f"source 'hf': the hub has no dataset {hub_name!r} at revision {revision or 'main'!r} that you may read: "
            "check data.hub_name and data.revision"
        ) from error
    except Exception as error:  # the transport below the client raises errors of its own
        raise _unreachable(hub_name, error) from error
    if commit is None:
        raise DatasetError(f"source 'hf': the hub names no commit of {hub_name!r}; give one as data.revision")
    return commit


def _unreachable(hub_name: str, error: Exception) -> DatasetError:
    return DatasetError(
        f"source 'hf': {hub_name!r} cannot be fetched from the Hugging Face hub ({_reason(error)}): connect this "
        "machine, or download the dataset elsewhere (save_to_disk or Parquet files) and give its folder as "
        "data.path=... in place of data.hub_name"
    )


def _reason(error: BaseException) -> str:
    """The first line of what went wrong, of the cause where `datasets` only says that something did."""
    told = error.__cause__ if error.__cause__ is not None and "while generating" in str(error) else error
    return (str(told).strip() or type(told).__name__).splitlines()[0]


def _decode(request: _Request) -> Decoded:
    with silenced_datasets(_PURPOSE):
        parts = _splits(request)
        for part in parts:
            _check_columns(request, part)
        class_names, labels = _labels(request, parts)
        owner_names, owners = _owners(request, parts)
        pictures = partial(_pictures, request, parts)
        channels = count_channels(pictures())
        first = next(decode_pictures(pictures(), channels, request.image_size))
    return Decoded(
        class_names=class_names,
        labels=labels,
        split=np.repeat([0, 1], [len(part) for part in parts]).astype(np.uint8) if len(parts) == 2 else None,
        image_shape=first.shape,
        images=decode_pictures(pictures(), channels, request.image_size),
        owner_names=owner_names,
        owners=owners,
    )


def _splits(request: _Request) -> list[Dataset]:
    """The training split and, where one is asked for, the test split; neither is empty."""
    import datasets

    loaded = _load(request)
    if isinstance(loaded, datasets.Dataset):
        if request.test_split is not None:
            raise DatasetError(
                f"dataset {request.where} has no splits; data.test_split: expected null, found {request.test_split!r}"
            )
        splits = {request.train_split: loaded}
    else:
        splits = {str(name): split for name, split in loaded.items()}
    names = [name for name in (request.train_split, request.test_split) if name is not None]
    for name in names:
        if name not in splits:
            raise DatasetError(
                f"dataset {request.where} has no split {name!r}; it has {', '.join(splits)}: "
                "set data.train_split or data.test_split"
            )
        if not len(splits[name]):
            raise DatasetError(f"dataset {request.where}: expected examples in the split {name!r}, found none")
    return [splits[name] for name in names]


def _load(request: _Request) -> Any:
    """The dataset with its splits, images still encoded."""
    import datasets

    path = request.path
    try:
        if path is None:
            return datasets.load_dataset(str(request.hub_name), request.hub_config, revision=request.revision)
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return datasets.load_from_disk(str(path))
        if path.is_file():
            return datasets.load_dataset("parquet", data_files=str(path))
        return datasets.load_dataset(str(path), request.hub_config)
    except Exception as error:  # `datasets`, Arrow and the transport raise errors of many kinds
        if path is None:
            raise _unreachable(str(request.hub_name), error) from error
        raise DatasetError(
            f"{path} is not a readable dataset ({_reason(error)}): expected what save_to_disk wrote, a Parquet file, "
            "or a folder of Parquet files or of images in class folders"
        ) from error


def _check_columns(request: _Request, part: Dataset) -> None:
    """Raise `DatasetError` for a column that is absent or holds something else than asked."""
    import datasets

    wanted = {"image_column": request.image_column, "label_column": request.label_column}
    if request.client_column is not None:
        wanted["client_column"] = request.client_column
    for setting, column in wanted.items():
        if column not in part.column_names:
            raise DatasetError(
                f"dataset {request.where} has no column {column!r}; it has {', '.join(part.column_names)}: "
                f"set data.{setting}"
            )
    feature = part.features[request.image_column]
    if not isinstance(feature, datasets.Image) and getattr(feature, "dtype", None) != "binary":
        raise DatasetError(
            f"data.image_column: column {request.image_column!r} of {request.where} holds {feature}, expected images"
        )


def _labels(request: _Request, parts: list[Dataset]) -> tuple[tuple[str, ...], npt.NDArray[np.int64]]:
    """Class names and every example's label, the parts end to end."""
    import datasets

    column = request.label_column
    values = _values(request, parts, column)
    feature = parts[0].features[column]
    if not isinstance(feature, datasets.ClassLabel):
        return indexed(values)
    if any(part.features[column] != feature for part in parts):
        raise DatasetError(f"dataset {request.where}: the splits name the classes of column {column!r} differently")
    labels = values.astype(np.int64)
    if labels.min() < 0:
        raise DatasetError(
            f"dataset {request.where}: column {column!r} holds {labels.min()} for examples without a label; "
            "choose splits that are labelled"
        )
    return tuple(feature.names), labels


def _owners(request: _Request, parts: list[Dataset]) -> tuple[tuple[str, ...], npt.NDArray[np.int64] | None]:
    """Names of those whom the examples come from, and every example's; none without a client column."""
    if request.client_column is None:
        return (), None
    return indexed(_values(request, parts, request.client_column))


def _values(request: _Request, parts: list[Dataset], column: str) -> npt.NDArray:
    """A column of whole numbers or strings, the parts end to end."""
    rows = (row for part in parts for row in part.with_format(None).select_columns(column))
    values = [_cell(row, column) for row in rows]
    absent = next((index for index, value in enumerate(values) if value is None), None)
    if absent is not None:
        raise DatasetError(f"dataset {request.where}: column {column!r} is empty for example {absent}; fill it")
    array = np.asarray(values) if {type(value) for value in values} <= {int, bool, str} else np.empty(0)
    if array.shape != (len(values),) or array.dtype.kind not in "iubU":
        found = parts[0].features[column]
        raise DatasetError(
            f"dataset {request.where}: column {column!r} holds {found}, expected class labels, whole numbers or strings"
        )
    return array


def _pictures(request: _Request, parts: list[Dataset]) -> Iterator[Picture]:
    """Every example's encoded image, the parts end to end."""
    import datasets

    number = 0
    for part in parts:
        column = part.with_format(None).select_columns(request.image_column)
        for row in column.cast_column(request.image_column, datasets.Image(decode=False)):
            name = f"{number} of {request.where}"
            yield Picture(name, _content(name, _cell(row, request.image_column)))
            number += 1


def _cell(row: Any, column: str) -> Any:
    """One value of a row, which `datasets` types too loosely."""
    return row[column]


def _content(name: str, cell: dict[str, Any] | None) -> bytes | Path:
    """What a cell of an image column holds: a file's bytes, or its path on this machine."""
    if cell is not None and cell.get("bytes"):
        return cell["bytes"]
    if cell is not None and cell.get("path"):
        return Path(cell["path"])
    raise DatasetError(f"image {name}: the cell is empty; expected an image")
