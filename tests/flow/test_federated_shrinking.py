"""Federated shrinking and calibration through the command line: every schedule, resume, workers, refusals."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from conf.compose import compose_conf
from server.federation import build_parts

QUICK = ("evaluation.comparison=false", "evaluation.clients=false")
PROGRESSIVE = (*QUICK, "shrinking=progressive", "rounds=6", "evaluation.every=6", "aggregation=adam")


def lines(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "rounds.jsonl").read_text().splitlines()]


def test_the_sandwich_trains_matrices_and_says_who_taught_whom(simulate, tmp_path):
    summary = simulate(tmp_path / "run", *QUICK, "shrinking=sandwich")
    rows = {row["name"]: row for row in summary["subnets"]}
    phase = summary["shrinking"]["phases"][0]
    assert (phase["name"], phase["rounds"]) == ("sandwich", 3)
    assert phase["clients"] + len(phase["sitting_out"]) == 12 - len(summary["sitting_out"])
    untaught = 0
    for record in lines(tmp_path / "run"):
        assert record["phase"] == "sandwich"
        assert record["folded"] == len(record["cohort"]) > 0
        trained = {item["subnet"]: item["teacher"] for item in record["cohort"]}
        assert trained[rows["largest"]["digest"]] is None
        assert rows["smallest"]["digest"] in trained
        assert rows["largest"]["digest"] in trained.values(), "somebody learns from the largest"
        untaught += len(record["untaught"])
    assert untaught == sum(summary["shrinking"]["untaught_rounds"].values())
    tensors = load_file(tmp_path / "run/supernet.safetensors")
    matrices = {name: value for name, value in tensors.items() if ".matrix_" in name}
    assert len(matrices) == 8
    moved = {name for name, value in matrices.items() if np.abs(value - np.eye(len(value))).max() > 1e-5}
    assert moved >= {name for name in matrices if ".0.depthwise" in name}, "those of the smallest subnet's blocks"


def test_ordinary_runs_leave_matrices_alone_and_have_no_phase(simulate, tmp_path):
    summary = simulate(tmp_path / "run", *QUICK, "rounds=1")
    assert summary["shrinking"] is None
    assert lines(tmp_path / "run")[0]["phase"] is None
    tensors = load_file(tmp_path / "run/supernet.safetensors")
    assert all(np.array_equal(value, np.eye(len(value))) for name, value in tensors.items() if ".matrix_" in name)


@pytest.mark.slow
def test_progressive_resumed_in_the_middle_or_with_other_workers_ends_with_the_same_bits(simulate, tmp_path):
    """The teacher, kept since the second phase began, is in the checkpoint."""
    expected = simulate(tmp_path / "a", *PROGRESSIVE, "runtime.num_workers=1")
    whole = lines(tmp_path / "a")
    assert whole[0]["phase"] == "largest"
    assert any(item["teacher"] for item in whole[-1]["cohort"])
    other = simulate(tmp_path / "b", *PROGRESSIVE, "runtime.num_workers=2", "fleet.max_in_flight=1")
    assert other["shared_digest"] == expected["shared_digest"]
    again = simulate(tmp_path / "b", *PROGRESSIVE, "runtime.num_workers=2", "resume=true", "resume_round=5")
    assert again["shared_digest"] == expected["shared_digest"]
    keep = ("round", "cohort", "folded", "loss", "bytes_up", "bytes_down", "untaught", "sitting_out")
    for a, b in zip(lines(tmp_path / "b"), whole, strict=True):
        assert {key: a[key] for key in keep} == {key: b[key] for key in keep}


@pytest.mark.slow
def test_clients_calibrate_batch_norm_for_scores_frozen_training_and_teachers(simulate, tmp_path):
    """The server holds no calibration images at all."""
    more = (
        "evaluation.comparison=false",
        "shrinking=sandwich",
        "supernet.norm=batch",
        "finetune.statistics=frozen",
        "evaluation.calibration=clients",
        "aggregation.float_dtype=bfloat16",
        "evaluation.every=3",
    )
    summary = simulate(tmp_path / "a", *more, "runtime.num_workers=1")
    assert {row["name"] for row in summary["subnets"] if row["client_test_accuracy"] is not None} >= {"workstation"}
    assert summary["shared_digest"] == simulate(tmp_path / "b", *more, "runtime.num_workers=2")["shared_digest"]
    for record in lines(tmp_path / "a"):
        assert record["calibration_failures"] == {}
        assert record["folded"] > 0


@pytest.mark.slow
def test_law_7_shrinking_with_calibrating_clients_gives_the_same_digest_on_every_runtime(simulate, tmp_path):
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    present = [f"fleet.classes.{name}.availability=1.0" for name in ("sensor_board", "raspberry_pi", "phone")]
    settings = (
        *(*QUICK, *present, "fleet.classes.workstation.availability=1.0"),
        *("rounds=2", "fleet.num_clients=3", "fleet.clients_per_round=3", "data.test_examples=4000"),
        *("shrinking=sandwich", "supernet.norm=batch", "evaluation.calibration=clients"),
    )
    expected = simulate(tmp_path / "in_process", *settings, "runtime.num_workers=1")
    assert any(item["teacher"] for line in lines(tmp_path / "in_process") for item in line["cohort"])
    for runtime in ("ray", "superlink"):
        got = simulate(tmp_path / runtime, *settings, f"runtime={runtime}")
        assert got["num_failures"] == 0
        assert got["shared_digest"] == expected["shared_digest"]
        assert got["subnets"] == expected["subnets"]


@pytest.mark.slow
def test_attentive_needs_images_on_the_server_and_runs_with_them(simulate, overrides, tmp_path, capsys):
    from server.cli import main

    assert main(["simulate", *overrides(tmp_path / "run", "shrinking=attentive")]) == 1
    assert "data.calibration_examples: candidates of shrinking.schedule=attentive" in capsys.readouterr().err
    summary = simulate(tmp_path / "run", *QUICK, "rounds=2", "shrinking=attentive", "data.calibration_examples=50")
    assert summary["shrinking"]["phases"][0]["name"] == "attentive"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["shrinking=fast"], "shrinking/fast: no such option; available: attentive, none, progressive, sand"),
        (["shrinking.schedule=fast"], "shrinking.schedule: expected one of ['progressive', 'sandwich', 'turns',"),
        (["shrinking=sandwich", "shrinking.steps=9"], "shrinking.steps: every round is a step of the schedule, so "
         "expected 3 (rounds), found 9"),
        (["shrinking=progressive"], "(of a federation: rounds): expected at least 5, one a phase"),
        (["shrinking=sandwich", "supernet=fixed"], "shrinking.schedule: 'sandwich' needs a supernet of many subnets"),
        (["shrinking.schedule=phases", "shrinking.phases=[{name: a, steps: 2, elastic: {}}]"],
         "rounds: expected 2, the steps of all shrinking.phases, found 3"),
        (["shrinking.schedule=phases", "shrinking.phases=[{name: a, steps: 3, elastic: {kernel: [9]}}]"],
         "shrinking phase 'a', axis 'kernel': expected values out of [3, 5, 7], found [9]"),
        (["shrinking=sandwich", "shrinking.learning_rate=0.1"], "shrinking.learning_rate: unknown setting"),
        (["evaluation.calibration=nobody"], "evaluation.calibration: expected one of ['server', 'clients', "),
        (["evaluation.calibration=none", "supernet.norm=batch"], "evaluation.calibration=none: statistics that the "
         "supernet came with are those of one network; expected a space of 1 subnet, found "),
        (["evaluation.calibration=none", "supernet=fixed"], "finetune.statistics=frozen, found 'batch'"),
    ],
)  # fmt: skip
def test_bad_settings_are_one_clear_line(overrides, tmp_path, capsys, settings, expected):
    from server.cli import main

    given = overrides(tmp_path / "run", *settings)
    if "supernet=fixed" in settings:
        given = [item for item in given if not item.startswith(("supernet.final", "supernet.feature", "supernet.stag"))]
    assert main(["simulate", *given]) == 1
    message = " ".join(capsys.readouterr().err.split())
    assert expected in message
    assert not (tmp_path / "run").exists()


def test_the_comparison_starts_from_the_channels_that_the_run_started_from(overrides, tmp_path):
    """Not from those that the run's last phases ordered anew: every narrow subnet would be another network."""
    parts = build_parts(compose_conf(overrides(tmp_path, "shrinking=progressive", "rounds=6")))
    rng = np.random.default_rng(0)
    groups = parts.supernet.channel_groups()
    begun = {group: rng.permutation(size // 8) for group, size in groups.items()}
    begun = {group: (8 * order[:, None] + np.arange(8)).ravel() for group, order in begun.items()}
    parts = replace(parts, ordering=begun)
    strategy = parts.strategy(tmp_path / "run")
    smallest = parts.supernet.space.smallest()
    start = strategy.supernet.cut(smallest, strategy.state.tensors)
    entered = strategy.shrinking.entered(6, strategy.state)
    assert any(not np.array_equal(entered.ordering[group], begun[group]) for group in groups)
    comparison = parts.strategy(tmp_path / "comparison", uniform=True)
    again = comparison.supernet.cut(smallest, comparison.state.tensors)
    assert all(np.array_equal(again[name], tensor) for name, tensor in start.items())
