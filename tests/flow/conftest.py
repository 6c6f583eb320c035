"""A small but whole federation: 12 unlike clients, elastic kernels, real digits, three rounds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = [
    "rounds=3",
    "fleet.num_clients=12",
    "fleet.clients_per_round=6",
    "data.test_examples=200",
    "partition.kind=dirichlet",
    "partition.alpha=1.0",
    "partition.client_test_fraction=0.9",
    "finetune.epochs=1",
    "supernet.final_width=32",
    "supernet.feature_width=32",
    "supernet.stages=[{width: 16, stride: 2, activation: relu, squeeze_excite: true},"
    "{width: 16, stride: 2, activation: h_swish, squeeze_excite: false}]",
    "fleet.classes.sensor_board.memory_bytes=1.2e6",
    "evaluation.every=2",
    "assignment.archive_devices=50",
]


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def overrides(cache_dir):
    """Settings of the small federation with its own cache; more may be added."""
    return lambda output_dir, *more: [*SMALL, f"data.cache_dir={cache_dir}", f"output_dir={output_dir}", *more]


@pytest.fixture(scope="session")
def run_fedofa():
    """Run `fedofa simulate` as a user would, in a process of its own; returns the summary."""

    def run(output_dir: Path, *overrides: str) -> dict:
        command = [sys.executable, "-m", "server", "simulate", *overrides]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ}, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads((output_dir / "summary.json").read_text())

    return run


@pytest.fixture
def simulate(overrides, run_fedofa):
    """Run the small federation, with more settings where given; returns the summary."""
    return lambda output_dir, *more: run_fedofa(output_dir, *overrides(output_dir, *more))
