"""Hugging Face datasets from disk, in every form; the hub is never asked."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from fedofa.data.sources import ImageSet, load_source
from fedofa.types.errors import DatasetError

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def table(count: int = 6, label: object = None, **columns: object) -> "datasets.Dataset":
    """Grey pictures 0, 10, 20...; the label is a class of three unless given."""
    pictures = [Image.new("L", (4, 4), 10 * index) for index in range(count)]
    features = {"picture": datasets.Image()}
    content = {
        "picture": pictures,
        "kind": [index % 3 for index in range(count)] if label is None else label,
        **columns,
    }
    made = datasets.Dataset.from_dict(content)
    made = made.cast_column("picture", features["picture"])
    return made if label is not None else made.cast_column("kind", datasets.ClassLabel(names=["x", "y", "z"]))


SETTINGS = {"image_column": "picture", "label_column": "kind"}


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., ImageSet]:
    """Save what is given, load it as a source."""

    def read(dataset: object, **settings: object) -> ImageSet:
        path = tmp_path / "saved"
        dataset.save_to_disk(path)  # type: ignore[attr-defined]
        return load_source("hf", path, tmp_path / "cache", {**SETTINGS, **settings})

    return read


def test_a_saved_dataset_is_read_in_order(read: Callable[..., ImageSet]) -> None:
    found = read(table())
    assert found.class_names == ("x", "y", "z")
    assert found.images.shape == (6, 1, 4, 4)
    assert found.images[:, 0, 0, 0].tolist() == [0, 10, 20, 30, 40, 50]
    assert found.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert (found.split, found.owners) == (None, None)


def test_splits_and_owners(read: Callable[..., ImageSet]) -> None:
    parts = {"learn": table(4, who=["w2", "w1", "w1", "w2"]), "judge": table(2, who=["w3", "w3"])}
    found = read(datasets.DatasetDict(parts), train_split="learn", test_split="judge", client_column="who")
    assert found.split is not None and found.owners is not None
    assert found.split.tolist() == [0, 0, 0, 0, 1, 1]
    assert found.owner_names == ("w1", "w2", "w3")
    assert found.owners.tolist() == [1, 0, 0, 1, 2, 2]


@pytest.mark.parametrize(
    ("label", "names", "labels"),
    [
        (["dog", "cat", "dog"], ("cat", "dog"), [1, 0, 1]),
        ([7, 3, 11], ("3", "7", "11"), [1, 0, 2]),
        ([True, False, True], ("False", "True"), [1, 0, 1]),
    ],
)
def test_labels_of_other_kinds_are_numbered_in_order(
    read: Callable[..., ImageSet], label: list, names: tuple, labels: list
) -> None:
    found = read(table(3, label))
    assert (found.class_names, found.labels.tolist()) == (names, labels)


@pytest.mark.parametrize("form", ["parquet file", "parquet folder", "image folder"])
def test_parquet_and_image_folders_are_read(tmp_path: Path, form: str) -> None:
    path = tmp_path / "set"
    path.mkdir()
    settings = SETTINGS
    if form == "image folder":
        settings = {}
        for index, name in enumerate(("x", "y", "x", "y")):
            (path / name).mkdir(exist_ok=True)
            Image.new("L", (4, 4), 10 * index).save(path / name / f"{index}.png")
    else:
        table().to_parquet(path / "train.parquet")
        path = path / "train.parquet" if form == "parquet file" else path
    found = load_source("hf", path, tmp_path / "cache", settings)
    assert found.class_names[:2] == ("x", "y")
    names = [found.class_names[label] for label in found.labels]
    greys = found.images[:, 0, 0, 0].tolist()
    if form == "image folder":
        assert sorted(zip(greys, names, strict=True)) == [(0, "x"), (10, "y"), (20, "x"), (30, "y")]
    else:
        assert (greys, names) == ([0, 10, 20, 30, 40, 50], ["x", "y", "z", "x", "y", "z"])


def test_unlike_sizes_need_a_size(read: Callable[..., ImageSet]) -> None:
    pictures = [Image.new("RGB", (4, 4)), Image.new("RGB", (5, 4))]
    dataset = datasets.Dataset.from_dict({"picture": pictures, "kind": [0, 1]}).cast_column("picture", datasets.Image())
    with pytest.raises(DatasetError, match=r"image 1 of .*\(3, 4, 5\).*give data.image_size"):
        read(dataset)
    assert read(dataset, image_size=3).images.shape == (2, 3, 3, 3)


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({}, {"image_column": "image"}, r"no column 'image'; it has picture, kind: set data.image_column"),
        ({}, {"label_column": "label"}, r"no column 'label'; it has picture, kind: set data.label_column"),
        ({}, {"client_column": "who"}, r"no column 'who'; it has picture, kind: set data.client_column"),
        ({}, {"image_column": "kind"}, "data.image_column: column 'kind' .* expected images"),
        ({}, {"test_split": "test"}, "has no splits; data.test_split: expected null, found 'test'"),
        ({"label": [0.5] * 6}, {}, "column 'kind' holds .*float.*expected class labels, whole numbers or strings"),
        ({"label": ["a", None] * 3}, {}, "column 'kind' is empty for example 1"),
        ({"who": [[1]] * 6}, {"client_column": "who"}, "column 'who' holds .*expected"),
    ],
)
def test_what_does_not_suit_the_dataset_is_refused(
    read: Callable[..., ImageSet], columns: dict, settings: dict, message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        read(table(**columns), **settings)


def test_an_unknown_split_lists_those_that_exist(read: Callable[..., ImageSet]) -> None:
    splits = datasets.DatasetDict({"train": table(), "dev": table(2)})
    with pytest.raises(DatasetError, match="no split 'test'; it has train, dev: set data.train_split"):
        read(splits, test_split="test")


def test_an_empty_dataset_is_refused_without_noise(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import pyarrow.parquet

    pyarrow.parquet.write_table(table(2).data.table.slice(0, 0), tmp_path / "none.parquet")
    capfd.readouterr()
    with pytest.raises(DatasetError, match=r"none\.parquet is not a readable dataset"):
        load_source("hf", tmp_path / "none.parquet", tmp_path / "cache", SETTINGS)
    assert capfd.readouterr() == ("", "")


def test_unlabelled_examples_are_refused(read: Callable[..., ImageSet]) -> None:
    unlabelled = table(3, [0, -1, 1]).cast_column("kind", datasets.ClassLabel(names=["x", "y"]))
    with pytest.raises(DatasetError, match="column 'kind' holds -1"):
        read(unlabelled)


@pytest.mark.parametrize(
    ("path", "settings", "message"),
    [
        (None, {}, "either data.path .* or data.hub_name .* found neither"),
        (".", {"hub_name": "a/b"}, "found both"),
        ("nowhere", {}, "no such path: check data.path"),
        (".", {}, "is not a readable dataset .*save_to_disk"),
        (None, {"hub_name": "a/b"}, "'a/b' cannot be fetched .*data.path"),
        (None, {"hub_name": "a/b", "revision": "0" * 40}, "'a/b' cannot be fetched .*data.path"),
        (None, {"hub_name": "a//b"}, "no dataset 'a//b' at revision 'main'"),
    ],
)
def test_a_dataset_that_cannot_be_had_is_one_error(
    tmp_path: Path, path: str | None, settings: dict, message: str
) -> None:
    (tmp_path / "here").mkdir()
    where = None if path is None else tmp_path / "here" / path
    with pytest.raises(DatasetError, match=message) as caught:
        load_source("hf", where, tmp_path / "cache", settings)
    assert "\n" not in str(caught.value)


def test_a_changed_column_setting_is_decoded_anew(read: Callable[..., ImageSet]) -> None:
    both = table(3, ["a", "b", "a"], other=[5, 6, 7])
    assert read(both).class_names == ("a", "b")
    assert read(both, label_column="other").class_names == ("5", "6", "7")
