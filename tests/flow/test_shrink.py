"""`fedofa shrink` through the command line: results, kill and resume, a simulation that starts from it, errors."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from conf.compose import compose_shrink_conf
from server.cli import main
from server.shrink import build_run, with_largest_statistics

SMALL = [
    "shrinking.steps=12",
    "shrinking.batch_size=16",
    "checkpoint_every=3",
    "num_watched=2",
    "calibration_examples=100",
    "data.test_examples=200",
    "supernet.final_width=32",
    "supernet.feature_width=32",
    "supernet.resolutions=[16]",
    "supernet.stages=[{width: 16, stride: 2, activation: relu, squeeze_excite: true},"
    "{width: 16, stride: 2, activation: h_swish, squeeze_excite: false}]",
]


@pytest.fixture
def command(cache_dir):
    """The whole command with its own cache."""

    def build(output_dir, *more: str) -> list[str]:
        settings = [*SMALL, f"data.cache_dir={cache_dir}", f"output_dir={output_dir}", *more]
        return [sys.executable, "-m", "server", "shrink", *settings]

    return build


@pytest.fixture
def shrink(command):
    """Run it in a process of its own; returns the summary."""

    def run(output_dir, *more: str) -> dict:
        done = subprocess.run(command(output_dir, *more), capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads((output_dir / "summary.json").read_text())

    return run


@pytest.mark.slow
def test_a_killed_run_goes_on_and_leaves_what_a_whole_one_leaves(shrink, command, tmp_path):
    settings = ["shrinking=progressive", "shrinking.steps=40", "supernet.norm=batch"]
    whole = shrink(tmp_path / "whole", *settings)
    assert whole["steps"] == 40
    assert [row["name"] for row in whole["subnets"]] == ["largest", "smallest", "random 1", "random 2"]
    for row in whole["subnets"]:
        assert {"macs", "params", "digest", "accuracy", "accuracy_before", "accuracy_uncalibrated"} <= set(row)
    assert len(whole["phases"]) == len(["largest", "kernel", "depth", "expand, first phase", "expand"])
    assert (tmp_path / "whole/accuracy_vs_macs.png").read_bytes().startswith(b"\x89PNG")
    tensors = load_file(tmp_path / "whole/supernet.safetensors")
    assert tensors["stem.norm.running_var"].min() > 0
    assert (tensors["stem.norm.running_mean"] != 0).any(), "the largest subnet's statistics"
    assert any(name.startswith("ordering/") for name in tensors), "the expand phases order channels"

    process = subprocess.Popen(command(tmp_path / "killed", *settings), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (tmp_path / "killed/checkpoints/step-000006").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed/summary.json").exists()
    again = shrink(tmp_path / "killed", *settings, "resume=true")
    assert again["shared_digest"] == whole["shared_digest"]
    assert again["subnets"] == whole["subnets"]
    lines = [(tmp_path / name / "steps.jsonl").read_text() for name in ("whole", "killed")]
    assert lines[0] == lines[1]
    assert [json.loads(line)["step"] for line in lines[0].splitlines()] == list(range(1, 41))


def test_the_largest_subnets_statistics_lie_where_a_cut_finds_them(cache_dir, tmp_path):
    settings = [*SMALL, "supernet.norm=batch", f"data.cache_dir={cache_dir}", f"output_dir={tmp_path}"]
    run = build_run(compose_shrink_conf(settings), tmp_path)
    rng, supernet = np.random.default_rng(0), run.supernet
    supernet.set_ordering({group: rng.permutation(size) for group, size in supernet.channel_groups().items()})
    state, largest = supernet.state(), supernet.space.largest()
    calibrated = run.scorer.calibrated_tensors(state, largest)
    kept = supernet.cut(largest, with_largest_statistics(run).tensors)
    assert kept.keys() == calibrated.keys()
    for name, tensor in kept.items():
        assert np.array_equal(tensor.numpy(), calibrated[name]), name


@pytest.mark.slow
def test_a_simulation_starts_from_a_shrunk_supernet(shrink, simulate, tmp_path):
    space = [item for item in SMALL if item.startswith("supernet.")]
    trained = shrink(tmp_path / "shrink", "shrinking.steps=150", "shrinking.batch_size=32")
    accuracy = {row["name"]: row["accuracy"] for row in trained["subnets"]}
    summary = simulate(
        tmp_path / "run", *space, f"supernet_weights={tmp_path / 'shrink'}", "rounds=1", "finetune.learning_rate=1e-5",
        "evaluation.comparison=false", "evaluation.clients=false", "evaluation.every=1",
    )  # fmt: skip
    assert accuracy["largest"] > 0.5
    for row in summary["subnets"]:
        if row["name"] in accuracy:
            assert abs(row["accuracy"] - accuracy[row["name"]]) < 0.02, "the test set and the weights are the same"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["shrinking.schedule=fast"], "shrinking.schedule: expected one of"),
        (["shrinking.teacher_loss.kind=mse"], "loss of the teacher: expected one of"),
        (["shrinking=turns", "shrinking.teacher_share=2"], "shrinking.teacher_share: expected a number in [0, 1]"),
        (["shrinking.teacher_share=0.5"], "shrinking.teacher_share: only shrinking.schedule=turns reads it, found 0.5"),
        (["shrinking.phases=[{name: a}]"], "shrinking.phases: only shrinking.schedule=phases reads it, found"),
        (["shrinking.steps=null"], "shrinking.steps: expected a whole number with 'sandwich', found null"),
        (["resume_step=2"], "resume_step: expected resume=true beside resume_step=2, found false"),
        (["shrinking=attentive", "shrinking.candidates=0"], "candidates: expected at least 1, found 0"),
        (["shrinking=attentive", "shrinking.macs_targets=[1000]"], "no subnet has 1,000 MACs; the smallest, "),
        (
            ["shrinking.schedule=phases", "shrinking.phases=[{name: a, steps: 2, elastic: {kernel: [4]}}]"],
            "phase 'a', axis 'kernel': expected values out of [3, 5, 7], found [4]",
        ),
        (
            ["shrinking=progressive", "shrinking.steps=2"],
            "(of a federation: rounds): expected at least 5",
        ),
        (["supernet_weights=/nowhere"], "supernet_weights: /nowhere cannot be read"),
        (["checkpoint_every=0"], "checkpoint_every: expected at least 1, found 0"),
        (["num_threads=0"], "num_threads: expected at least 1, found 0"),
        (["shrinking.prefer=worst"], "shrinking.prefer: only shrinking.schedule=attentive reads it, found 'worst'"),
        (["shrinking.optimiser=adamw"], "shrinking.learning_rate: expected below 0.1 with adamw"),
    ],
)
def test_bad_settings_are_one_clear_error(command, tmp_path, capfd, overrides, message):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/summary.json").write_text("{}")
    assert main(command(tmp_path / "run", *overrides)[3:]) == 1
    text = capfd.readouterr().err
    assert text.startswith("error: ")
    assert message in text.replace("\n", " ")
    assert (tmp_path / "run/summary.json").read_text() == "{}", "the earlier run is where it was"


def test_weights_that_the_run_would_move_aside_are_refused(command, tmp_path, capfd):
    weights = tmp_path / "run" / "fedavg_weakest"
    (tmp_path / "run").mkdir()
    (tmp_path / "run/summary.json").write_text("{}")
    assert main(command(tmp_path / "run", f"supernet_weights={weights}")[3:]) == 1
    text = capfd.readouterr().err.replace("\n", " ")
    assert f"supernet_weights: {weights} lies in output_dir ({tmp_path / 'run'}), whose content is moved aside" in text


def test_a_run_goes_on_only_with_the_weights_that_it_started_from(command, tmp_path, capfd):
    settings = ["shrinking.steps=2", "num_watched=0", "checkpoint_every=1"]
    assert main(command(tmp_path / "weights", *settings)[3:]) == 0
    started = [*settings, f"supernet_weights={tmp_path / 'weights'}"]
    assert main(command(tmp_path / "run", *started)[3:]) == 0
    (tmp_path / "weights").rename(tmp_path / "moved")
    again = [*settings, f"supernet_weights={tmp_path / 'moved'}", "resume=true", "resume_step=1"]
    assert main(command(tmp_path / "run", *again)[3:]) == 0
    description = json.loads((tmp_path / "moved/supernet.json").read_text())
    description["normalisation"]["mean"] = [0.25]
    (tmp_path / "moved/supernet.json").write_text(json.dumps(description))
    capfd.readouterr()
    assert main(command(tmp_path / "run", *again)[3:]) == 1
    assert "supernet_weights" in capfd.readouterr().err


def test_training_that_ends_in_useless_weights_is_no_result(command, tmp_path, capfd):
    """The only loss that is known, that of the first weights, was fine."""
    rate = ["shrinking=turns", "shrinking.steps=1", "shrinking.learning_rate=1e30", "shrinking.max_gradient_norm=0"]
    assert main(command(tmp_path / "run", *rate)[3:]) == 1
    text = capfd.readouterr().err.replace("\n", " ")
    assert "step 1: the trained subnets' losses are not finite" in text
    assert not (tmp_path / "run/summary.json").exists()
    assert not (tmp_path / "run/supernet.safetensors").exists()


def test_the_settings_of_shrink_are_printed(capsys):
    assert main(["settings", "shrink", "shrinking=attentive", "shrinking.candidates=7"]) == 0
    printed = capsys.readouterr().out
    assert "schedule: attentive" in printed
    assert "candidates: 7" in printed
    assert "rounds:" not in printed
