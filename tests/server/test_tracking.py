"""Trackers on local stores, over a made-up diary: each round once, runs that go back, stores that fail."""

import os
import shutil
import sqlite3
import struct
import subprocess
import sys
from types import SimpleNamespace

import pytest

from conf.schema import TrackingConf
from fedofa.types.errors import ConfigError, TrackingError
from server.tracking import backends
from server.tracking.backends import check_tracking, open_tracker
from server.tracking.following import Follower
from server.tracking.tracker import RunFacts, recall_identity, round_metrics, summary_figures

LOCAL = [
    pytest.param(name, marks=pytest.mark.skipif(bool(missing), reason=f"needs {missing}; pip install 'fedofa[{name}]'"))
    for name, packages in backends._PACKAGES.items()
    for missing in [[package for package in packages if backends.find_spec(package) is None]]
    if packages
]
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", 7, 5) + b"\x08\x06\0\0\0"


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """MLflow's database without runs, which takes seconds to make; None without MLflow."""
    if backends.find_spec("mlflow") is None:
        return None
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def folder(tmp_path, empty_store):
    """A run's folder, with a store beside it."""
    if empty_store:
        shutil.copy(empty_store, tmp_path)
    return tmp_path / "run"


def line(number: int, loss: float | None = None) -> dict:
    """A line of the diary."""
    return {
        "round": number,
        "cohort": [{"client": "a"}, {"client": "b"}, {"client": "c"}],
        "folded": 2,
        "failures": [{"client": "c", "reason": "late"}],
        "loss": loss if loss is not None else 1 / number,
        "truncated": {},
        "bytes_up": 10 * number,
        "scores": {"largest": {"accuracy": 0.5, "loss": 2.0}} if number % 2 == 0 else None,
    }


def conf(name: str, **settings) -> TrackingConf:
    return TrackingConf(**{"name": name, "project": "fedofa", "mode": "offline", **settings})


def facts(folder, last_round: int, main=None, **changeable) -> RunFacts:
    return RunFacts(folder, main or folder, {"seed": 3, "fleet.num_clients": 12}, changeable, last_round)


def follow(name: str, folder, lines: list[dict], told=None, **options) -> Follower:
    """Open a tracker for a run whose diary has these lines."""
    tracker = open_tracker(conf(name), facts(folder, len(lines), **options))
    follower = Follower(name, tracker, (told if told is not None else []).append)
    follower.catch_up(lines)
    return follower


def finished(number: int, **values) -> SimpleNamespace:
    """A round that has just been finished."""
    return SimpleNamespace(round=number, to_json=lambda: line(number, **values))


def losses(name: str, folder) -> list[tuple[int, float]]:
    """(round, loss) of a run, as the backend's own reader finds them."""
    return [(step, pytest.approx(value)) for step, value in points(name, folder, "loss")]


def points(name: str, folder, metric: str) -> list[tuple[int, float]]:
    if name == "mlflow":
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=f"sqlite:///{folder.parent / 'mlflow.db'}")
        history = client.get_metric_history(recall_identity(folder, "mlflow"), metric)
        return [(point.step, point.value) for point in sorted(history, key=lambda point: (point.step, point.timestamp))]
    if name == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
        return [(event.step, event.value) for event in events.Scalars(metric)]
    import wandb
    from offline_wandb import history

    wandb.teardown()  # its service still writes when a run has been finished, until it is stopped
    (file,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    return [(step, values[metric]) for step, values in history(file) if metric in values]


def test_a_line_of_the_diary_in_numbers():
    assert round_metrics(line(2)) == {
        "cohort": 3.0,
        "failures": 1.0,
        "folded": 2.0,
        "loss": 0.5,
        "bytes_up": 20.0,
        "accuracy/largest": 0.5,
        "test_loss/largest": 2.0,
    }
    nothing_folded = round_metrics({**line(1), "loss": None, "delta_norm": float("nan")})
    assert "loss" not in nothing_folded
    assert "delta_norm" not in nothing_folded


def test_a_summary_in_numbers():
    rows = [{"name": "largest", "accuracy": 0.5, "binding": "none", "recompute": True, "client_test_accuracy": None}]
    summary = {"rounds": 3, "shared_digest": "ab", "subnets": rows, "comparison": None, "versions": {"python": "3"}}
    assert summary_figures(summary) == {"final/rounds": 3.0, "final/largest/accuracy": 0.5}


@pytest.mark.parametrize("name", LOCAL)
def test_a_resumed_run_goes_on_in_the_same_place_with_each_round_once(name, folder):
    first = follow(name, folder, [])
    for number in (1, 2):
        first.round_finished(finished(number))
    first.close(finished=False)
    identity = recall_identity(folder, name)
    second = follow(name, folder, [line(1), line(2), line(3)])  # round 3 was kept, then the process was killed
    second.round_finished(finished(4))
    second.close(finished=True)
    assert losses(name, folder) == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)]
    assert [step for step, _ in points(name, folder, "accuracy/largest")] == [2, 4]
    assert recall_identity(folder, name) == identity


@pytest.mark.parametrize("name", LOCAL)
def test_rounds_that_were_cut_off_are_gone(name, folder):
    first = follow(name, folder, [line(1), line(2), line(3), line(4)])
    first.close(finished=True)
    second = follow(name, folder, [line(1), line(2)])  # resume_round=2
    second.round_finished(finished(3, loss=9.0))
    second.close(finished=False)
    assert losses(name, folder) == [(1, 1.0), (2, 0.5), (3, 9.0)]


@pytest.mark.parametrize("name", LOCAL)
def test_a_run_that_starts_over_may_have_other_settings(name, folder):
    follow(name, folder, []).close(finished=False)  # killed in its first round
    again = open_tracker(conf(name), RunFacts(folder, folder, {"seed": 4}, {"rounds": 9}, 0))
    again.log_round(1, {"loss": 0.75, "folded": 1.0})
    again.close(finished=True)
    assert losses(name, folder) == [(1, 0.75)]


@pytest.mark.parametrize("name", LOCAL)
def test_results_that_come_again_are_not_doubled(name, folder):
    lines = [line(1), line(2)]
    folder.mkdir()
    picture = folder / "rounds.png"
    picture.write_bytes(PNG)
    for _ in range(2):
        follower = follow(name, folder, lines)
        follower.results({"rounds": 2, "bytes_up": 30}, [picture])
        follower.close(finished=True)
    if name == "wandb":
        (copy,) = (folder / "wandb").glob("offline-run-*/files/rounds.png")
        assert copy.read_bytes() == PNG
        assert not copy.is_symlink()
    else:
        assert points(name, folder, "final/bytes_up") == [(2, 30.0)]
    assert [step for step, _ in losses(name, folder)] == [1, 2]


def test_mlflow_nests_the_comparison_and_says_how_runs_ended(folder, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    main, beside = folder, folder / "fedavg_weakest"
    outer = follow("mlflow", main, [line(1)], rounds=1)
    inner = follow("mlflow", beside, [], main=main)
    inner.close(finished=False)
    outer.close(finished=True)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    outer_run, inner_run = (client.get_run(recall_identity(folder, "mlflow")) for folder in (main, beside))
    assert inner_run.data.tags["mlflow.parentRunId"] == outer_run.info.run_id
    assert (outer_run.info.run_name, inner_run.info.run_name) == ("run", "run/fedavg_weakest")
    assert (outer_run.info.status, inner_run.info.status) == ("FINISHED", "KILLED")
    assert outer_run.data.params == {"seed": "3", "fleet.num_clients": "12"}
    assert outer_run.data.tags["rounds"] == "1"
    assert outer_run.info.artifact_uri.startswith((tmp_path / "mlflow_artifacts").as_uri())


def test_mlflow_takes_more_settings_than_one_call_may_carry(folder, tmp_path):
    pytest.importorskip("mlflow")
    settings = {f"setting.{number}": number for number in range(230)}
    open_tracker(conf("mlflow"), RunFacts(folder, folder, settings, {}, 0)).close(finished=True)
    with sqlite3.connect(tmp_path / "mlflow.db") as store:
        assert store.execute("select count(*) from params").fetchone() == (230,)


def test_a_store_that_breaks_is_named_once_and_caught_up_later(folder, tmp_path):
    pytest.importorskip("mlflow")
    told = []
    follower = follow("mlflow", folder, [line(1)], told)
    store = sqlite3.connect(tmp_path / "mlflow.db")
    store.execute("alter table metrics rename to lost")
    store.commit()
    for number in (2, 3):
        follower.round_finished(finished(number))
    follower.results({"rounds": 3}, [])
    follower.close(finished=True)
    (message,) = told
    assert message.startswith("tracking=mlflow failed in round 2: ")
    assert "after round 1" in message
    store.execute("alter table lost rename to metrics")
    store.commit()
    store.close()
    follow("mlflow", folder, [line(1), line(2), line(3)]).close(finished=True)
    assert losses("mlflow", folder) == [(1, 1.0), (2, 0.5), (3, 1 / 3)]


def test_a_full_disk_under_tensorboard_shows_in_the_round_that_it_costs(tmp_path):
    pytest.importorskip("tensorboard")
    told = []
    follower = follow("tensorboard", tmp_path / "run", [line(1)], told)
    follower._tracker._records._writer = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    follower.round_finished(finished(2))
    follower.round_finished(finished(3))
    follower.close(finished=True)
    (message,) = told
    assert message.startswith("tracking=tensorboard failed in round 2: OSError: [Errno 28]")


@pytest.mark.parametrize("name", LOCAL)
def test_a_tracker_that_cannot_be_opened_is_an_error(name, folder):
    folder.write_text("a file where the folder should be")
    with pytest.raises(TrackingError, match=f"tracking={name}: run 'run' cannot be opened: .*choose tracking=jsonl"):
        open_tracker(conf(name), facts(folder, 0))


def test_an_mlflow_server_that_is_not_there_is_an_error(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError, match="cannot be opened"):
        open_tracker(conf("mlflow", uri="http://127.0.0.1:9"), facts(tmp_path / "run", 0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "mlfow"}, "tracking.name: expected one of .*found 'mlfow'"),
        ({"name": "wandb", "mode": "on"}, "tracking.mode: expected one of .*found 'on'"),
        ({"name": "mlflow", "uri": "sqlite:///runs/a.db"}, "tracking.uri: expected an absolute path"),
    ],
)
def test_settings_that_no_tracker_has_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        check_tracking(conf(**settings))


def test_a_missing_package_is_named_with_the_extra_to_install(monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda package: None if package == "sqlalchemy" else object())
    with pytest.raises(ConfigError, match=r"needs sqlalchemy, .*not installed; pip install 'fedofa\[mlflow\]'"):
        check_tracking(conf("mlflow"))
    check_tracking(conf("jsonl"))


class OnlineRun:
    """Stands in for a run that W&B's server knows up to some step."""

    def __init__(self, step: int) -> None:
        self.step, self.logged, self.ended = step, [], None

    def log(self, values, step, commit):
        assert commit
        self.logged.append((step, values["loss"]))

    def finish(self, exit_code):
        self.ended = exit_code


def test_wandb_online_logs_only_what_the_server_lacks_and_never_goes_back(tmp_path, monkeypatch):
    """No server can be reached from a test: this holds the calls against W&B's documented ones."""
    wandb = pytest.importorskip("wandb")
    steps = {"first": 0}
    asked = []

    def init(**settings):
        asked.append(settings)
        return OnlineRun(steps.get(settings["id"], 0))

    monkeypatch.setattr(wandb, "init", init)
    folder = tmp_path / "run"
    online = conf("wandb", mode="online")

    def resumed(lines):
        tracker = open_tracker(online, facts(folder, len(lines)))
        Follower("wandb", tracker, print).catch_up(lines)
        return tracker._run.logged

    assert resumed([line(1)]) == [(1, 1.0)]
    steps[recall_identity(folder, "wandb")] = 3  # the server has rounds 1 and 2
    assert resumed([line(1), line(2), line(3)]) == [(3, 1 / 3)]
    assert asked[0]["id"] == asked[1]["id"]
    assert {settings["mode"] for settings in asked} == {"online"}
    assert resumed([line(1)]) == [(1, 1.0)]
    assert asked[3]["id"] != asked[2]["id"]


@pytest.mark.parametrize("name", LOCAL)
def test_nothing_is_sent_by_default(name, folder):
    """Python's own calls only: W&B's service is a program of its own, which in offline mode has no server to call."""
    script = f"""
import sys
from pathlib import Path
calls = []
def watch(event, arguments):
    local = event == "socket.connect" and not isinstance(arguments[1], tuple)  # a Unix socket
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname") and not local:
        calls.append(str(arguments))
sys.addaudithook(watch)
from conf.schema import TrackingConf
from server.tracking.backends import open_tracker
from server.tracking.tracker import RunFacts
folder = Path({str(folder)!r})
tracker = open_tracker(TrackingConf({name!r}, "fedofa", None, "offline"), RunFacts(folder, folder, {{}}, {{}}, 0))
tracker.log_round(1, {{"loss": 1.0, "folded": 1.0}})
tracker.close(finished=True)
assert not calls, calls
"""
    hides_telemetry = ("CI", "PYTEST_CURRENT_TEST", "DO_NOT_TRACK", "MLFLOW_DISABLE_TELEMETRY")
    environment = {key: value for key, value in os.environ.items() if key not in hides_telemetry}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
