"""Whole federations that a tracker follows: read back with the backend's own reader after a resume in between."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

QUICK = ("finetune.decay=none", "evaluation.clients=false", "evaluation.every=1", "runtime.num_workers=2")
COURSE = ("loss", "folded", "failures", "bytes_down", "bytes_up", "wall_seconds", "delta_norm", "covered_fraction")


def diary(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def expected(folder: Path, name: str) -> list[tuple[int, float]]:
    """(round, value) of a metric as the diary has it."""
    values = []
    for line in diary(folder):
        if name.startswith("accuracy/"):
            value = line["scores"][name.removeprefix("accuracy/")]["accuracy"]
        else:
            value = len(line[name]) if isinstance(line[name], list) else line[name]
        values.append((line["round"], pytest.approx(value)))
    return values


def stop_and_go_on(simulate, folder: Path, *more: str) -> dict:
    """Two rounds, then resumed for a third."""
    simulate(folder, *QUICK, *more, "rounds=2")
    return simulate(folder, *QUICK, *more, "rounds=3", "resume=true")


def test_mlflow(simulate, tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="pip install 'fedofa[mlflow]'")
    pytest.importorskip("sqlalchemy", reason="pip install 'fedofa[mlflow]'")
    folder = tmp_path / "run"
    summary = stop_and_go_on(simulate, folder, "tracking=mlflow")
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fedofa")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"run", "run/fedavg_weakest"}, "a resumed run is the same run"
    main, beside = runs["run"], runs["run/fedavg_weakest"]
    assert beside.data.tags["mlflow.parentRunId"] == main.info.run_id
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert main.data.params["fleet.num_clients"] == "12"
    assert (main.data.params["uniform"], beside.data.params["uniform"]) == ("False", "True")
    assert main.data.tags["rounds"] == "3"

    def course(run, name):
        return sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, name))

    for name in (*COURSE, "accuracy/largest", "accuracy/sensor_board"):
        assert course(main, name) == expected(folder, name), name
    for name in (*COURSE, "accuracy/uniform"):
        assert course(beside, name) == expected(folder / "fedavg_weakest", name), name
    assert main.data.metrics["final/bytes_up"] == summary["bytes_up"]
    assert main.data.metrics["final/largest/accuracy"] == summary["subnets"][0]["accuracy"]
    assert beside.data.metrics["final/accuracy"] == summary["comparison"]["accuracy"]
    files = {file.path for file in client.list_artifacts(main.info.run_id)}
    assert files == {"accuracy_vs_macs.png", "rounds.png", "summary.json", "config.json"}


def test_tensorboard(simulate, tmp_path):
    pytest.importorskip("tensorboard", reason="pip install 'fedofa[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    summary = stop_and_go_on(simulate, folder, "tracking=tensorboard")
    for run, names in ((folder, ("accuracy/largest",)), (folder / "fedavg_weakest", ("accuracy/uniform",))):
        events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
        for name in (*COURSE, *names):
            assert [(event.step, event.value) for event in events.Scalars(name)] == expected(run, name), name
        (settings, *_) = events.Tensors("settings/text_summary")
        assert b"| fleet.num_clients | `12` |" in settings.tensor_proto.string_val[0]
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0}).Reload()
    final = [(event.step, event.value) for event in events.Scalars("final/largest/accuracy")]
    assert final[-1] == (3, pytest.approx(summary["subnets"][0]["accuracy"]))
    pictures = events.Images("rounds")
    assert [event.step for event in pictures] == [2, 3]
    assert pictures[-1].encoded_image_string == (folder / "rounds.png").read_bytes()


def test_wandb_offline(simulate, tmp_path):
    pytest.importorskip("wandb", reason="pip install 'fedofa[wandb]'")
    from offline_wandb import history

    folder = tmp_path / "run"
    stop_and_go_on(simulate, folder, "tracking=wandb")
    for run in (folder, folder / "fedavg_weakest"):
        (file,) = (run / "wandb").glob("offline-run-*/run-*.wandb")
        rows = history(file)
        for name in (*COURSE, "accuracy/largest" if run == folder else "accuracy/uniform"):
            assert [(step, values[name]) for step, values in rows] == expected(run, name), name
    assert (folder / "wandb/latest-run/files/rounds.png").read_bytes() == (folder / "rounds.png").read_bytes()


def test_a_tracker_that_fails_does_not_change_the_run(simulate, overrides, tmp_path, capsys, monkeypatch):
    pytest.importorskip("tensorboard", reason="pip install 'fedofa[tensorboard]'")
    from server.cli import main
    from server.tracking.tensorboard_files import TensorBoardFiles

    quick = (*QUICK, "evaluation.comparison=false")
    whole = simulate(tmp_path / "whole", *quick)
    log_round = TensorBoardFiles.log_round

    def full_disk(self, round_number, metrics):
        if round_number >= 2:
            raise OSError(28, "No space left on device")
        log_round(self, round_number, metrics)

    monkeypatch.setattr(TensorBoardFiles, "log_round", full_disk)
    assert main(["simulate", *overrides(tmp_path / "run", *quick, "tracking=tensorboard")]) == 0
    message = " ".join(capsys.readouterr().err.split())
    assert message.count("tracking=tensorboard failed in round 2: OSError: [Errno 28] No space left") == 1
    assert message.count("tracking=") == 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["shared_digest"] == whole["shared_digest"]
    assert [line["round"] for line in diary(tmp_path / "run")] == [1, 2, 3]


def test_a_tracker_that_cannot_be_opened_stops_the_run_at_its_start(overrides, tmp_path, capsys):
    pytest.importorskip("sqlalchemy", reason="pip install 'fedofa[mlflow]'")
    from server.cli import main

    store = f"tracking.uri=sqlite:///{tmp_path}/nowhere/mlflow.db"
    (tmp_path / "nowhere").write_text("no folder")
    assert main(["simulate", *overrides(tmp_path / "run", "tracking=mlflow", store)]) == 1
    message = " ".join(capsys.readouterr().err.split())
    assert "tracking=mlflow: run 'run' cannot be opened" in message
    assert "choose tracking=jsonl" in message
    assert not (tmp_path / "run" / "rounds.jsonl").exists()
