"""A client in a 320 MB memory cgroup: what stock fine-tuning is killed in, a plan that fits the budget completes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cgroup_client import BATCH_SIZE, NUM_EXAMPLES, SIDE

from fedofa.finetune.budget import plan_for_budget
from fedofa.finetune.inputs import ImageForm
from fedofa.finetune.trainer import LocalTraining
from fedofa.supernet.chain import ChainSupernet
from fedofa.supernet.ready_made import READY_MADE

ROOT = Path(__file__).parents[2]
CLIENT = Path(__file__).with_name("cgroup_client.py")
LIMIT = 320 << 20
SUPERNET = ChainSupernet(replace(READY_MADE["mobilenet_v2"], num_classes=10, resolutions=(SIDE,)))
SUBNET = SUPERNET.space.largest()

pytestmark = pytest.mark.slow


def own_controller() -> Path:
    """The directory of this process's group under the memory controller of cgroup v1."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    path = next((path for _, controllers, path in lines if "memory" in controllers.split(",")), None)
    if path is None:
        pytest.skip("no memory controller of cgroup v1")
    return Path("/sys/fs/cgroup/memory") / path.lstrip("/")


@pytest.fixture
def group() -> Iterator[Path]:
    """An empty group of 320 MB below this process's own; whatever is left in it is killed and it is removed."""
    path = own_controller() / f"fedofa-test-{os.getpid()}-{time.monotonic_ns()}"
    try:
        path.mkdir()
    except OSError as error:
        pytest.skip(f"no memory group can be made: {error}")
    try:
        (path / "memory.limit_in_bytes").write_text(str(LIMIT))
        yield path
    finally:
        for pid in (path / "cgroup.procs").read_text().split():
            os.kill(int(pid), signal.SIGKILL)
        for _ in range(100):
            try:
                path.rmdir()
                break
            except OSError:
                time.sleep(0.1)


def start(group: Path, mode: str) -> subprocess.Popen[str]:
    """The client, in the group from its first instruction on."""
    command = [sys.executable, str(CLIENT), mode, json.dumps(SUPERNET.description())]
    inside = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs"), *command]
    pipe, environment = subprocess.PIPE, {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(inside, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)


def kills(group: Path) -> int:
    """How many processes of the group the kernel killed for want of memory."""
    words = dict(line.split() for line in (group / "memory.oom_control").read_text().splitlines())
    return int(words["oom_kill"])


def test_a_planned_client_completes_what_stock_fine_tuning_is_killed_in(group):
    with start(group, "stock") as process:
        out, _ = process.communicate("\n")
    assert process.returncode == -signal.SIGKILL
    assert "done" not in out
    assert kills(group) == 1

    training = LocalTraining(batch_size=BATCH_SIZE, max_steps=2)
    with start(group, "lean") as process:
        left = LIMIT - int(process.stdout.readline())
        found = plan_for_budget(SUPERNET, SUBNET, training, NUM_EXAMPLES, ImageForm((3, SIDE, SIDE)), left)
        out, errors = process.communicate(json.dumps(found.plan.to_json()) + "\n")
    assert process.returncode == 0, errors[-2000:]
    assert found.plan.name == "full"
    assert json.loads(out.splitlines()[-1]) == {
        "done": True,
        "steps": 2,
        "moved": len(found.plan.trainable),
        "finite": True,
    }
    assert kills(group) == 1
