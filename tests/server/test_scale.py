"""The server holds little: its memory grows neither with the cohort nor with the number of clients."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from conf.compose import compose_conf
from fedofa.device.cost import LocalWork
from fedofa.types.device import DeviceProfile
from server.federation import build_parts, messages_in_flight
from server.fleet import ClientInfo, plan_fleet
from server.resources import memory_file_bytes, resident_bytes

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MEGABYTE = 2**20
SAMPLE_SECONDS = 0.1

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is read from /proc")


@dataclass
class Run:
    """A finished process: what it printed, and the most that its memory files held, its own and its whole tree's."""

    output: str = ""
    own_file_bytes: int = 0
    all_file_bytes: int = 0

    @property
    def facts(self) -> dict:
        """The JSON object in the last line."""
        return json.loads(self.output.splitlines()[-1])

    @property
    def server_bytes(self) -> int:
        """Peak resident memory, as the process states it, plus its memory files."""
        return self.facts["peak_bytes"] + self.own_file_bytes

    @property
    def all_bytes(self) -> int:
        """The same over the server and its workers, each at its own peak."""
        return self.facts["summed_peak_bytes"] + self.all_file_bytes


def watch(*command: str) -> Run:
    """Run a Python program and look at its memory all the time."""
    path = os.pathsep.join([str(ROOT), str(HERE)])
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    run = Run()
    try:
        while process.poll() is None:
            own, everything = memory_file_bytes(process.pid)
            run.own_file_bytes, run.all_file_bytes = max(run.own_file_bytes, own), max(run.all_file_bytes, everything)
            time.sleep(SAMPLE_SECONDS)
        run.output, _ = process.communicate()
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, run.output
    return run


def test_memory_files_are_counted_once_and_apart_from_resident_memory():
    script = (
        "import os, time\n"
        "fd = os.memfd_create('x'); os.write(fd, bytes(40 << 20))\n"
        "os.fork() and print('ready', flush=True)\n"
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, process_group=0) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            files = memory_file_bytes(process.pid)
            resident = resident_bytes(process.pid)
        finally:
            os.killpg(process.pid, 9)
    assert files == (40 * MEGABYTE, 40 * MEGABYTE)
    assert 4 * MEGABYTE < resident < 40 * MEGABYTE, "the file is not in it"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "num_subnets"), [("equal", 2), ("unlike", 100)])
def test_a_hundred_large_replies_take_hardly_more_memory_than_ten(kind, num_subnets):
    """Replies of up to 8 M parameters; two subnets in all (the sandwich rule adds one), or one for every client."""
    script = str(HERE / "scale_script.py")
    ten, hundred = (watch(script, "100", str(cohort), kind) for cohort in (10, 100))
    assert ten.facts["parameters"] >= 8e6
    assert (ten.facts["folded"], hundred.facts["folded"]) == ([10, 10], [100, 100])
    assert hundred.facts["distinct_subnets"] == [num_subnets] * 2
    print({name: [getattr(run, name) // MEGABYTE for run in (ten, hundred)] for name in ("server_bytes", "all_bytes")})
    assert hundred.server_bytes <= 1.2 * ten.server_bytes
    assert hundred.all_bytes <= 1.2 * ten.all_bytes


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_clients(tmp_path):
    """The benchmark's own rows: the same examples and the same cohort size, a hundred clients or a thousand."""
    row = str(ROOT / "benchmarks/scale.py")
    runs = []
    for num_clients in (100, 1000):
        build_parts(compose_conf(["partition=iid", f"fleet.num_clients={num_clients}", f"data.cache_dir={tmp_path}"]))
        runs.append(watch(row, "--row", str(num_clients), "20", "--rounds", "3", "--cache", str(tmp_path)))
    few, many = runs
    assert many.server_bytes <= 1.2 * few.server_bytes
    assert many.all_bytes <= 1.2 * few.all_bytes


@pytest.mark.slow
def test_the_default_job_takes_a_thousand_clients(tmp_path):
    sizes = ["fleet.num_clients=1000", "fleet.clients_per_round=100", "rounds=1"]
    rest = ["evaluation.comparison=false", f"data.cache_dir={tmp_path}", f"output_dir={tmp_path / 'run'}"]
    watch("-m", "server", "simulate", *sizes, *rest)
    (record,) = [json.loads(line) for line in (tmp_path / "run/rounds.jsonl").read_text().splitlines()]
    assert (len(record["cohort"]), record["folded"]) == (100, 100)
    clients = [item["client"] for item in record["cohort"]]
    assert clients == sorted(clients), "the diary lists the cohort by client, in whatever order it was sent"


def test_workers_of_this_machine_get_few_messages_in_advance():
    few, many = (compose_conf([f"runtime.num_workers={count}"]) for count in (2, 64))
    assert messages_in_flight(few) == 4
    assert messages_in_flight(many) == many.fleet.max_in_flight == 8


def test_equal_clients_of_a_weak_class_share_a_search(tmp_path):
    few = ["partition=iid", "fleet.num_clients=10", "fleet.clients_per_round=5", f"data.cache_dir={tmp_path}"]
    parts = build_parts(compose_conf(few))
    profile = DeviceProfile("board", 2.2e6, 5e7, 1e5, 1e5)
    clients = [ClientInfo(number, f"c{number}", profile, num_train, 1) for number, num_train in enumerate([9, 9, 5000])]
    sizes = []

    def work_of(num_train: int) -> LocalWork:
        sizes.append(num_train)
        return LocalWork(num_train, num_train, 16, 1, 4)

    plan = plan_fleet(clients, parts.search, work_of, 60.0)
    assert sizes == [5000, 9]
    assert set(plan.assignments) == {"c0", "c1"}
    assert plan.assignments["c0"].fit is plan.assignments["c1"].fit
    assert "exceeded" in plan.sitting_out["c2"]
