"""Whole federations through the command line: results, determinism, resume after kill -9, damaged checkpoints."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from server.resources import descendants


def lines(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "rounds.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    return tmp_path_factory.mktemp("whole") / "run"


def test_a_run_leaves_everything_that_a_person_looks_at(simulate, tmp_path):
    output_dir = tmp_path / "run"
    summary = simulate(output_dir, "runtime.num_workers=1")
    assert summary["rounds"] == 3
    assert summary["num_clients"] == 12
    names = [row["name"] for row in summary["subnets"]]
    assert names[:2] == ["largest", "smallest"]
    assert {"sensor_board", "raspberry_pi", "phone", "workstation"} <= set(names)
    for row in summary["subnets"]:
        assert {"name", "digest", "macs", "params", "accuracy"} <= set(row)
        assert 0 <= row["accuracy"] <= 1
    by_name = {row["name"]: row for row in summary["subnets"]}
    assert by_name["sensor_board"]["binding"] == "memory"
    assert by_name["workstation"]["binding"] == "none"
    assert by_name["workstation"]["digest"] == by_name["largest"]["digest"]
    assert by_name["sensor_board"]["macs"] < by_name["workstation"]["macs"]
    for key in ("bytes_down", "bytes_up", "wall_seconds", "cpu_seconds", "peak_rss_bytes"):
        assert summary[key] > 0, key
    assert summary["comparison"]["digest"] == by_name["sensor_board"]["digest"]
    assert summary["comparison"]["rounds"] == 3

    records = lines(output_dir)
    assert [record["round"] for record in records] == [1, 2, 3]
    assert [record["scores"] is not None for record in records] == [False, True, True]
    for record in records:
        assert record["folded"] == len(record["cohort"]) > 0
        assert record["failures"] == []
    assert sum(record["bytes_up"] for record in records) == summary["bytes_up"]

    tensors = load_file(output_dir / "supernet.safetensors")
    assert np.isfinite(tensors["classifier.weight"]).all()
    assert json.loads((output_dir / "supernet.json").read_text())["supernet"]["family"] == "mobilenet_v3"
    for picture in ("accuracy_vs_macs.png", "rounds.png"):
        data = (output_dir / picture).read_bytes()
        assert data.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", data[16:24])
        assert width > 600
        assert height > 400
    assert not [path for path in output_dir.rglob("*writing*")]


def test_the_sandwich_is_in_every_cohort(simulate, tmp_path):
    summary = simulate(tmp_path / "run", "evaluation.comparison=false", "evaluation.clients=false")
    digests = {row["name"]: row for row in summary["subnets"]}
    for record in lines(tmp_path / "run"):
        subnets = {item["subnet"] for item in record["cohort"]}
        assert digests["smallest"]["digest"] in subnets
        strongest = max(
            (row["macs"] for name, row in digests.items() if name in {c["device_class"] for c in record["cohort"]})
        )
        assert any(row["macs"] == strongest and row["digest"] in subnets for row in digests.values())


def test_one_or_two_workers_and_one_client_at_a_time_give_the_same_digest(simulate, tmp_path):
    quick = ("evaluation.comparison=false", "evaluation.clients=false")
    digests = {
        simulate(tmp_path / "a", "runtime.num_workers=1", *quick)["shared_digest"],
        simulate(tmp_path / "b", "runtime.num_workers=2", *quick)["shared_digest"],
        simulate(tmp_path / "c", "runtime.num_workers=3", "fleet.max_in_flight=1", *quick)["shared_digest"],
    }
    assert len(digests) == 1
    assert simulate(tmp_path / "d", "seed=1", *quick)["shared_digest"] not in digests


def start(overrides, output_dir: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "server", "simulate", *overrides(output_dir, *more)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("kill_in", ["main run", "comparison"])
def test_killed_and_resumed_equals_never_killed(simulate, overrides, tmp_path, kill_in):
    more = ("rounds=6", "aggregation=adam", "evaluation.clients=false")
    expected = simulate(tmp_path / "whole", *more)
    output_dir = tmp_path / "killed"
    watched = output_dir / ("fedavg_weakest/rounds.jsonl" if kill_in == "comparison" else "rounds.jsonl")
    process = start(overrides, output_dir, *more)
    wait_for(lambda: (watched.exists() and watched.read_text().count("\n") >= 2) or process.poll() is not None)
    assert process.poll() is None, process.stderr.read()[-2000:]
    family = descendants(process.pid)
    assert len(family) >= 3, "parent, fork server, workers"
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    process.stderr.close()
    wait_for(lambda: not any(alive(pid) for pid in family), 30)
    assert not [name for name in os.listdir("/dev/shm") if "fedofa" in name]

    got = simulate(output_dir, *more, "resume=true")
    assert got["shared_digest"] == expected["shared_digest"]
    assert got["subnets"] == expected["subnets"]
    assert got["comparison"]["accuracy"] == expected["comparison"]["accuracy"]
    assert [record["round"] for record in lines(output_dir)] == [1, 2, 3, 4, 5, 6]
    keep = ("round", "cohort", "folded", "loss", "bytes_up", "scores")
    for a, b in zip(lines(output_dir), lines(tmp_path / "whole"), strict=True):
        assert {key: a[key] for key in keep} == {key: b[key] for key in keep}
    assert (got["bytes_down"], got["bytes_up"]) == (expected["bytes_down"], expected["bytes_up"])


def test_damaged_checkpoints_are_refused_and_the_one_before_is_offered(simulate, overrides, tmp_path):
    output_dir = tmp_path / "run"
    quick = ("evaluation.comparison=false", "evaluation.clients=false")
    expected = simulate(output_dir, *quick)
    tensors = output_dir / "checkpoints/round-000003/state.safetensors"
    manifest = tensors.with_name("checkpoint.json")

    def refused(*more: str) -> str:
        process = start(overrides, output_dir, *quick, "resume=true", *more)
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 1
        assert "Traceback" not in stderr
        return " ".join(stderr.split())

    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-10])
    message = refused()
    assert "truncated" in message
    assert "resume_round=2" in message
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    tensors.write_bytes(flipped)
    assert "checksum does not match" in refused()
    tensors.write_bytes(whole)
    text = manifest.read_text()
    manifest.write_text(text.replace('"round": 3', '"round": 2'))
    assert "checksum does not match" in refused()
    manifest.write_text(text)
    assert "seed: 0 then, 7 now" in refused("seed=7")
    assert "no checkpoint of round 1; there are [2, 3]" in refused("resume_round=1")

    tensors.write_bytes(flipped)
    again = simulate(output_dir, *quick, "resume=true", "resume_round=2")
    assert again["shared_digest"] == expected["shared_digest"]


def test_a_new_run_never_overwrites_an_old_one(simulate, tmp_path):
    quick = ("rounds=1", "evaluation.comparison=false", "evaluation.clients=false")
    first = simulate(tmp_path / "run", *quick)
    simulate(tmp_path / "run", *quick, "seed=5")
    (old,) = [path for path in tmp_path.iterdir() if path.name.startswith("run.")]
    assert json.loads((old / "summary.json").read_text())["shared_digest"] == first["shared_digest"]


def test_batch_norm_half_precision_wire_and_frozen_plans_run_end_to_end(simulate, tmp_path):
    summary = simulate(
        tmp_path / "run",
        "supernet.norm=batch",
        "data.calibration_examples=100",
        "aggregation.float_dtype=bfloat16",
        "finetune=last_blocks",
        "finetune.plans=['last_blocks(1)']",
        "finetune.statistics=frozen",
        "finetune.optimiser=adamw",
        "finetune.learning_rate=0.003",
        "finetune.proximal_mu=0.01",
        "evaluation.comparison=false",
    )
    assert summary["subnets"][0]["plan"] is None
    plans = {row["plan"] for row in summary["subnets"] if row["plan"]}
    assert plans == {"last_blocks(1)"}
    assert summary["bytes_up"] < summary["bytes_down"]
    untrained = {name for name, share in summary["untrainable"].items() if share == 1.0}
    assert "stem.conv.weight" in untrained


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("rouns=3", "rouns: unknown setting; did you mean 'rounds'?"),
        ("rounds=abc", "rounds: Value 'abc' of type 'str' could not be converted to Integer"),
        ("data=mnist", "data/mnist: no such option; available: cifar10, fashion_mnist, folder, har, hf, mnist5k"),
        ("finetune.plans=[fll]", "unknown plan 'fll'; known: full"),
        ("fleet.clients_per_round=13", "expected at most fleet.num_clients (12), found 13"),
        ("supernet.norm=batch", "data.calibration_examples: expected at least 2"),
        ("supernet.kernels=[3,4]", "kernel sizes must be odd, found [4]"),
        ("runtime.name=rya", "runtime.name: expected one of ['in_process', 'ray', 'superlink'], found 'rya'"),
        ("partition.alpha=0", "alpha"),
    ],
)
def test_bad_settings_are_one_clear_line(overrides, tmp_path, capsys, setting, expected):
    from server.cli import main

    assert main(["simulate", *overrides(tmp_path / "run", setting)]) == 1
    message = " ".join(capsys.readouterr().err.split())
    assert expected in message
    assert not (tmp_path / "run").exists()


def test_a_fleet_that_can_train_nothing_is_an_error_that_names_the_budget(overrides, tmp_path, capsys):
    from server.cli import main

    tiny = [
        f"fleet.classes.{name}.memory_bytes=1e3" for name in ("sensor_board", "raspberry_pi", "phone", "workstation")
    ]
    assert main(["simulate", *overrides(tmp_path / "run", *tiny)]) == 1
    message = " ".join(capsys.readouterr().err.split())
    assert "no client can train any subnet" in message
    assert "memory is exceeded" in message


def test_clients_that_fit_nothing_sit_out_by_name(simulate, tmp_path):
    summary = simulate(
        tmp_path / "run",
        "fleet.classes.sensor_board.memory_bytes=1e3",
        "evaluation.comparison=false",
        "evaluation.clients=false",
    )
    assert 3 <= len(summary["sitting_out"]) <= 4, "three tenths of twelve"
    for client, reason in summary["sitting_out"].items():
        assert client.startswith("client-")
        assert "memory is exceeded" in reason
    asked = {item["client"] for record in lines(tmp_path / "run") for item in record["cohort"]}
    assert not asked & set(summary["sitting_out"])
