"""A client without torch inside a 192 MB memory cgroup completes a round in which stock fine-tuning is killed."""

import contextlib
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedofa.finetune.plans import build_plan
from fedofa.finetune.recipe import LocalTraining
from fedofa.supernet.chain import ChainSupernet
from fedofa.supernet.ready_made import READY_MADE
from fedofa.types.plan import FineTunePlan
from fedofa.update.exchange import ClientTask, decode_delta, encode_task
from server.compiled import compiled
from server.environment import ONE_THREAD

CONTROLLER = Path("/sys/fs/cgroup/memory")
LIMIT_BYTES = 192 << 20
SPEC = replace(READY_MADE["mobilenet_v2"], num_classes=100, resolutions=(224,))
SCRIPT = Path(__file__).with_name("boxed_training.py")


@pytest.fixture
def cgroup():
    """A memory cgroup of 192 MB, version 1."""
    group = CONTROLLER / f"fedofa-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(LIMIT_BYTES))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"no memory controller of cgroup v1 that can be written to: {error}")
    yield group
    group.rmdir()


def run_inside(group: Path, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *(str(item) for item in arguments)]
    boxed = ["sh", "-c", f'echo $$ > "{group}/cgroup.procs" && exec "$@"', "sh", *command]
    path = os.pathsep.join([str(SCRIPT.parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": path}
    return subprocess.run(boxed, env=environment, capture_output=True, text=True, timeout=300, check=False)


def write_task(path: Path, plan: FineTunePlan, supernet: ChainSupernet, *, compiles: bool) -> None:
    subnet, graph = supernet.space.largest(), None
    tensors = {name: item.detach().numpy() for name, item in supernet.build(subnet).state_dict().items()}
    if compiles:
        graph, tensors = compiled(supernet, subnet, plan, tensors)
    normalisation = {"mean": [0.5] * 3, "std": [0.25] * 3}
    training = asdict(LocalTraining(batch_size=16, learning_rate=0.01))
    task = ClientTask(1, 0, subnet, plan, supernet.description(), training, normalisation, 0, graph=graph)
    path.write_bytes(encode_task(task, tensors))


@pytest.mark.slow
def test_a_round_that_kills_stock_fine_tuning_fits_192_megabytes_without_torch(cgroup, tmp_path):
    supernet = ChainSupernet(SPEC, torch.Generator().manual_seed(0))
    blocks = supernet.block_costs(supernet.space.largest())
    bias, full = (build_plan(kind, blocks, statistics="frozen") for kind in ("bias", "full"))
    write_task(tmp_path / "full", full, supernet, compiles=False)
    stock = run_inside(cgroup, "torch", tmp_path / "full", tmp_path / "none")
    assert stock.returncode == -9, stock.stderr[-2000:]
    assert not (tmp_path / "none").exists()

    write_task(tmp_path / "bias", bias, supernet, compiles=True)
    done = run_inside(cgroup, "onnxruntime", tmp_path / "bias", tmp_path / "delta")
    assert done.returncode == 0, done.stderr[-2000:]
    assert int((cgroup / "memory.max_usage_in_bytes").read_text()) <= LIMIT_BYTES
    delta = decode_delta((tmp_path / "delta").read_bytes())
    assert set(delta.weights) == set(bias.trainable)
    assert all(np.isfinite(values).all() for values in delta.weights.values())
    assert np.abs(delta.weights["stem.norm.bias"]).max() > 0, "gradients reach the first layer"
