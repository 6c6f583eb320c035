"""`fedofa simulate` from the weights of a described chain: where the run starts, and what only the plan changes."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fedofa.supernet.chain import BlockSize, ChainSpec, ChainSupernet
from fedofa.supernet.layouts import LAYOUTS

SPEC = ChainSpec(
    (BlockSize(8), BlockSize(16, 3, 4, 2), BlockSize(16, 3, 4), BlockSize(24, 3, 4, 2)),
    in_channels=1,
    num_classes=6,
    stem_width=8,
    feature_width=32,
)
CHAIN = [
    "supernet=mobilenet_v2",
    "supernet.blocks=[{width: 8},{width: 16, expand: 4, stride: 2},{width: 16, expand: 4},"
    "{width: 24, expand: 4, stride: 2}]",
    "supernet.stem_width=8",
    "supernet.feature_width=32",
    "supernet.resolutions=[20,28]",
    "supernet.mean=[0.25]",
    "supernet.std=[0.5]",
    "finetune=head",
    "finetune.statistics=frozen",
    "data.calibration_examples=100",
    "runtime.num_workers=1",
    "rounds=1",
    "evaluation.comparison=false",
    "evaluation.clients=false",
]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A file of random weights in torchvision's layout, and the tensors in it under the names here."""
    supernet = ChainSupernet(SPEC, torch.Generator().manual_seed(7))
    keys = LAYOUTS["torchvision_mobilenet"].keys(supernet.network_spec(supernet.space.largest()))
    shared = supernet.shared()
    with torch.no_grad():
        for name, tensor in shared.items():
            if ".norm." in name:
                tensor.add_(0.1)
    path = tmp_path_factory.mktemp("weights") / "net.pth"
    torch.save({key: shared[name].detach().clone() for name, key in keys.items()}, path)
    return path, {name: shared[name].detach().numpy() for name in keys}


@pytest.fixture
def command(overrides, tmp_path):
    def run(*more: str) -> subprocess.CompletedProcess:
        shared = [item for item in overrides(tmp_path / "run") if not item.startswith("supernet.")]
        line = [sys.executable, "-m", "server", "simulate", *shared, *CHAIN, *more]
        return subprocess.run(line, capture_output=True, text=True, timeout=300, env={**os.environ}, check=False)

    return run


@pytest.mark.slow
def test_a_run_starts_from_the_file_and_trains_a_classifier_for_its_own_classes(command, pretrained, tmp_path):
    path, weights = pretrained
    done = command(f"supernet.pretrained={path}")
    assert done.returncode == 0, done.stderr[-3000:]
    tensors = load_file(tmp_path / "run" / "supernet.safetensors")
    for name, value in weights.items():
        if not name.startswith("classifier."):
            assert np.array_equal(tensors[name], value), name
    assert tensors["classifier.weight"].shape == (10, 32)
    assert tensors["classifier.bias"].any(), "the fresh classifier has been trained"
    importance = np.abs(weights["stages.1.0.project.conv.weight"]).sum((0, 2, 3))
    assert (np.diff(importance[tensors["ordering/stages.1.0.mid"]]) <= 0).all()
    described = json.loads((tmp_path / "run" / "supernet.json").read_text())
    assert described["supernet"]["family"] == "chain"
    assert described["normalisation"] == {"mean": [0.25], "std": [0.5]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["data.calibration_examples=0"], "data.calibration_examples: expected at least 2"),
        (
            ["supernet.stem_width=16"],
            "net.pth: the weights do not fit the described network: 11 problems: features.0.0.weight: expected shape "
            "(16, 1, 3, 3), found (8, 1, 3, 3); ",
        ),
    ],
    ids=["no calibration", "other sizes"],
)
@pytest.mark.slow
def test_what_cannot_be_started_from_is_said_in_one_error(command, pretrained, change, message):
    done = command(f"supernet.pretrained={pretrained[0]}", *change)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert message in " ".join(done.stderr.split())
