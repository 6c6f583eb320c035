"""Federations over each kind of source, and their errors, through the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from server.cli import main

QUICK = ("rounds=1", "evaluation.comparison=false", "evaluation.clients=false", "runtime.num_workers=2")


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Path:
    """Three subjects of four stretches each; the two activities differ in the sign of an axis."""
    rng = np.random.default_rng(0)
    label = np.tile(np.repeat([0, 1, 0, 1], 100), 3).astype(np.uint8)
    imu = rng.normal(size=(1200, 6)).astype(np.float32)
    imu[:, 2] += 9.8 * (1 - 2.0 * label)
    path = tmp_path_factory.mktemp("har") / "har.npz"
    np.savez(
        path,
        imu=imu,
        label=label,
        subject=np.repeat([1, 2, 3], 400),
        watch=np.zeros(1200, bool),
        execution=np.ones(1200, np.uint8),
        timestamp_ms=np.arange(1200) * 10,
        label_names=np.array(["DOWN", "UP"]),
        channels=np.array(["ax", "ay", "az", "gx", "gy", "gz"]),
    )
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Two classes of 40 grey pictures of unlike sizes."""
    root = tmp_path_factory.mktemp("folder")
    for index in range(80):
        path = root / ("dark" if index % 2 else "light") / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (20 + index % 3, 20), 60 if index % 2 else 190).save(path)
    return root


def test_subjects_are_clients_and_unseen_ones_the_test(simulate, tmp_path, recordings):
    summary = simulate(
        tmp_path / "run",
        "data=har",
        f"data.path={recordings}",
        "data.test_examples=null",
        "data.held_out=[2]",
        "data.window_samples=20",
        "partition.kind=natural",
        "fleet.num_clients=2",
        "fleet.clients_per_round=2",
        "partition.client_test_fraction=0.1",
        "finetune.epochs=4",
        *QUICK,
        "rounds=4",
    )
    assert summary["num_clients"] == 2
    saved = json.loads((tmp_path / "run/supernet.json").read_text())
    assert len(saved["normalisation"]["mean"]) == 6
    assert (saved["supernet"]["in_channels"], saved["supernet"]["num_classes"]) == (1, 2)
    assert summary["subnets"][0]["accuracy"] > 0.8, "a sign tells the two activities apart"


def test_class_folders_run_end_to_end(simulate, tmp_path, pictures):
    summary = simulate(
        tmp_path / "run", "data=folder", f"data.path={pictures}", "data.image_size=20", "data.test_examples=20",
        "fleet.num_clients=3", "fleet.clients_per_round=2", *QUICK
    )  # fmt: skip
    assert summary["rounds"] == 1


@pytest.fixture
def shrink(overrides, tmp_path):
    """Three steps of `fedofa shrink` of the small supernet; returns `summary.json` and `supernet.json`."""

    def run(*more: str) -> tuple[dict, dict]:
        kept = ("supernet.", "data.cache_dir=", "output_dir=")
        small = [item for item in overrides(tmp_path / "run") if item.startswith(kept)]
        steps = ["shrinking.steps=3", "shrinking.batch_size=8", "num_watched=1", "calibration_examples=20"]
        assert main(["shrink", *small, *steps, *more]) == 0
        return tuple(json.loads((tmp_path / "run" / name).read_text()) for name in ("summary.json", "supernet.json"))

    return run


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_windows_of_motion_train_a_supernet(shrink, recordings, norm):
    own = ["data.held_out=[2]", "data.window_samples=20", f"supernet.norm={norm}"]
    summary, saved = shrink("data=har", f"data.path={recordings}", *own)
    assert summary["steps"] == 3
    assert all(np.isfinite(row["loss"]) for row in summary["subnets"])
    assert len(saved["normalisation"]["mean"]) == 6, "one a row"
    assert (saved["supernet"]["in_channels"], saved["supernet"]["num_classes"]) == (1, 2)


def test_pictures_of_unlike_sizes_in_the_home_folder_train_a_supernet(shrink, pictures, monkeypatch):
    monkeypatch.setenv("HOME", str(pictures.parent))
    own = ["data.image_size=20", "data.test_examples=20"]
    _, saved = shrink("data=folder", f"data.path='~/{pictures.name}'", *own)
    assert (saved["supernet"]["in_channels"], saved["supernet"]["num_classes"]) == (1, 2)


def test_every_setting_of_a_source_reaches_it_from_shrink_as_from_simulate(
    overrides, tmp_path, capsys, monkeypatch, pictures
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    cache = next(item for item in overrides(tmp_path) if item.startswith("data.cache_dir="))
    asked = ["data=hf", f"data.path={pictures}", cache, f"output_dir={tmp_path / 'run'}", "data.label_column=kind"]
    for command in ("simulate", "shrink"):
        assert main([command, *asked]) == 1
        assert "no column 'kind'; it has image, label" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            ["data.name=mnist"],
            "unknown source 'mnist': expected one of cifar10, fashion_mnist, folder, har, hf, mnist5k",
        ),
        (["partition=natural"], "the source states no ids of those whom its examples come from"),
        (
            ["data=har", "data.path={har}", "data.held_out=[2]", "data.test_examples=null"],
            "there are 2 ids with at least",
        ),
        (["data=har", "data.path={har}"], "data.held_out: expected subjects of"),
        (["data=har", "data.path=nowhere.npz"], "nowhere.npz, but there is no such file: check data.path"),
        (["data=folder"], "source 'folder' needs the path of"),
        (["data=folder", "data.path={folder}"], "give data.image_size to resize all"),
        (["data=folder", "data.path={folder}", "data.image_size=20"], "only 80 examples are there to draw from"),
        (["data=hf"], "needs either data.path (a dataset on this machine) or data.hub_name (one on the hub)"),
        (["data=hf", "data.path={folder}", "data.label_column=kind"], "no column 'kind'; it has image, label"),
        (["data=fashion_mnist", "data.path=/nowhere"], "apt-get install dataset-fashion-mnist"),
        (["data.test_examples=null"], "the source has no official test part to take whole"),
        (["fleet.num_clients=2000"], "lower num_clients or min_examples until their product fits"),
    ],
)
def test_what_cannot_be_had_is_one_clear_line(
    overrides, tmp_path, capsys, monkeypatch, recordings, pictures, settings, expected
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    chosen = [item.format(har=recordings, folder=pictures) for item in settings]
    keep = [item for item in overrides(tmp_path / "run") if item.partition("=")[0] not in ("partition.kind",)]
    assert main(["simulate", *keep, *chosen]) == 1
    message = capsys.readouterr().err
    assert expected in " ".join(message.split())
    assert len(message.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
