"""Sweeps and studies as a user runs them: interrupted, continued, with a run that fails among them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from server.cli import main

QUICK = ("rounds=4", "evaluation.comparison=false", "evaluation.clients=false", "evaluation.every=4")


@pytest.fixture
def settings(overrides):
    """Settings of the small federation for a sweep, which gives every run its own folder."""
    return lambda *more: [item for item in overrides("x", *QUICK, *more) if not item.startswith("output_dir=")]


def start(*arguments: str, cwd: Path | None = None) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "server", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=cwd)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    output, _ = process.communicate(timeout=400)
    return process.returncode, output


def wait_for(path: Path, num_lines: int) -> None:
    deadline = time.monotonic() + 300
    while not (path.is_file() and len(path.read_text().splitlines()) >= num_lines):
        assert time.monotonic() < deadline, f"{path} never had {num_lines} lines"
        time.sleep(0.02)


def digests(folder: Path) -> dict[str, str]:
    return {path.parent.name: json.loads(path.read_text())["shared_digest"] for path in folder.glob("*/summary.json")}


def one(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was_and_ends_like_one_that_was_not_killed(settings, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, output = finish(start("simulate", "-m", *settings("seed=0,1", f"hydra.sweep.dir={whole}")))
    assert code == 0, output

    command = ["simulate", "-m", *settings("seed=0,1", f"hydra.sweep.dir={killed}")]
    process = start(*command)
    names = sorted(digests(whole))
    wait_for(killed / names[1] / "rounds.jsonl", 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = (killed / names[0] / "summary.json").stat()
    assert not (killed / names[1] / "summary.json").exists(), "the second run was under way"

    code, output = finish(start(*command))
    assert code == 0, output
    assert "1 runs done, 1 were done before, 0 failed" in output
    assert digests(killed) == digests(whole)
    again = (killed / names[0] / "summary.json").stat()
    assert (again.st_mtime_ns, again.st_ino) == (first.st_mtime_ns, first.st_ino), "the first run was not run again"
    records = [json.loads(line) for line in (killed / names[1] / "rounds.jsonl").read_text().splitlines()]
    assert [record["round"] for record in records] == [1, 2, 3, 4]


@pytest.mark.slow
def test_joblib_gives_the_same_results_and_leaves_a_console_in_every_folder(settings, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="the extra `sweeps` is not installed")
    alone, together = tmp_path / "alone", tmp_path / "together"
    code, output = finish(start("simulate", "-m", *settings("seed=0,1", f"hydra.sweep.dir={alone}")))
    assert code == 0, output
    launcher = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", f"hydra.sweep.dir={together}")
    code, output = finish(start("simulate", "-m", *settings("seed=0,1", *launcher)))
    assert code == 0, output
    assert digests(together) == digests(alone)
    assert len(digests(together)) == 2
    for console in together.glob("*/console.txt"):
        assert "round 4 of 4" in console.read_text()
    assert len(list(together.glob("*/console.txt"))) == 2


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_others_are_done_and_compared(settings, tmp_path):
    command = settings("fleet.clients_per_round=13,6", f"hydra.sweep.dir={tmp_path}/sweep")
    code, output = finish(start("simulate", "-m", *command))
    assert code == 1
    assert "1 of 2 runs failed, the others are done: fleet.clients_per_round=13" in output
    assert "expected at most fleet.num_clients (12), found 13" in output
    assert "Traceback" not in output
    assert len(digests(tmp_path / "sweep")) == 1

    assert main(["compare", str(tmp_path / "sweep")]) == 0
    content = json.loads((tmp_path / "sweep" / "comparison.json").read_text())
    (row,) = content["runs"]
    assert row["finished"]
    assert {"largest", "smallest", "phone"} <= set(row["accuracy"])
    assert (tmp_path / "sweep" / "comparison.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_killed_study_goes_on_and_tries_what_it_would_have_tried(settings, tmp_path):
    pytest.importorskip("optuna", reason="the extra `sweeps` is not installed")
    search = ("finetune.learning_rate=tag(log,interval(0.01,0.3))", "finetune=choice(full,bias)")
    study = ("study.trials=3", "study.objectives=[accuracy.largest,bytes_up]", "study.seed=4")
    command = ["sweep", *settings(*search, *study)]
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    code, output = finish(start(*command, cwd=tmp_path / "whole"))
    assert code == 0, output
    assert "Pareto set" in output
    expected = digests(tmp_path / "whole" / "runs" / "studies" / "study")
    assert len(expected) == 3

    process = start(*command, cwd=tmp_path / "killed")
    folder = tmp_path / "killed" / "runs" / "studies" / "study"
    deadline = time.monotonic() + 300
    while len(list(folder.glob("*/rounds.jsonl"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    code, output = finish(start(*command, cwd=tmp_path / "killed"))
    assert code == 0, output
    assert digests(folder) == expected

    code, output = finish(start(*command, "rounds=5", cwd=tmp_path / "killed"))
    assert code == 1
    assert "holds a study with another fixed" in output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["sweep", "rounds=3"], "sweep: nothing to search"),
        (["sweep", "seed=0,1", "study.trails=3"], "study.trails"),
        (["sweep", "seed=0,1", "study.objectives=[accurracy.largest]"], "unknown figure 'accurracy.largest'; known:"),
        (["sweep", "seed=range(1,1)"], "seed: expected range(start,stop,step)"),
        (["sweep", "seed=0,1", "study.name=../x"], "study.name: expected the name of a folder"),
        (["sweep", "seed=0,1", "rouns=3"], "rouns: unknown setting; did you mean 'rounds'?"),
        (["compare"], "compare: expected at least one folder"),
        (["compare", "/nonexistent"], "/nonexistent is no folder"),
        (["simulate", "-m", "seed=0,1", "output_dir=x"], "choose theirs with hydra.sweep.dir"),
    ],
)
def test_what_cannot_be_done_is_one_clear_line(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    assert expected in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "runs").exists()
