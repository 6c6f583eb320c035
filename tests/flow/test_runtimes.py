"""Ray as a runtime: an existing cluster, clients that fail, errors. Law 7 over all runtimes is in `test_superlink`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

QUICK = ("evaluation.comparison=false", "evaluation.clients=false")


@pytest.fixture
def ray_cluster():
    """A cluster of this test's own on loopback; its address."""
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray = str(Path(sys.executable).with_name("ray"))
    environment = {**os.environ, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    start = [ray, "start", "--head", "--node-ip-address=127.0.0.1", f"--port={port}", "--include-dashboard=false"]
    head = subprocess.Popen(
        [*start, "--num-cpus=2", "--block"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield f"127.0.0.1:{port}"
    finally:
        head.terminate()
        head.wait(60)


@pytest.mark.slow
def test_a_ray_cluster_that_is_there_already_gives_the_same_digest(simulate, tmp_path, ray_cluster):
    wait_for_port(ray_cluster)
    summary = simulate(tmp_path / "ray", "runtime=ray", f"runtime.address={ray_cluster}", *QUICK)
    assert summary["num_failures"] == 0
    assert summary["shared_digest"] == simulate(tmp_path / "in_process", *QUICK)["shared_digest"]


def wait_for_port(address: str) -> None:
    import socket
    import time

    host, port = address.split(":")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host, int(port)), 1).close()
            return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(f"nothing listens on {address}")


@pytest.mark.slow
def test_clients_fail_on_ray_without_harm_to_others(overrides, tmp_path):
    """A killed process and a hung client cost only themselves; a refused delta is refused as everywhere.

    The first answer waits for Ray to start its processes, which on a busy machine takes more than 15 s.
    """
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    import json

    more = ("fleet.num_clients=18", "fleet.clients_per_round=18", "fleet.quorum_fraction=0.1", "rounds=1", *QUICK)
    more = (*more, "fleet.reply_seconds=40", *(f"fleet.classes.{name}.availability=1" for name in CLASSES))
    settings = [*overrides(tmp_path / "run", *more), "runtime=ray"]
    code = "import json, sys; from conf.compose import compose_conf; from server.ray_engine import run_on_ray; "
    code += "run_on_ray(compose_conf(json.loads(sys.argv[1])), client_app='hostile_app:app')"
    path = os.pathsep.join([str(Path(__file__).parent), os.getcwd(), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code, json.dumps(settings)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": path}, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (record,) = [json.loads(line) for line in (tmp_path / "run/rounds.jsonl").read_text().splitlines()]
    failures = {failure["client"]: failure["reason"] for failure in record["failures"]}
    assert set(failures) == {f"client-{number:04d}" for number in range(16)}, "each costs only itself"
    assert record["folded"] == 2
    assert "out of battery" in failures["client-0000"]
    assert "no answer within 40 s" in failures["client-0015"]


CLASSES = ("sensor_board", "raspberry_pi", "phone", "workstation")


@pytest.mark.parametrize(
    ("address", "complaint"),
    [
        ("127.0.0.1:1", "runtime.address: the Ray cluster at '127.0.0.1:1' cannot be reached"),
        ("somewhere:", "runtime.address: expected 'auto', 'host:port' or 'ray://host:port', found 'somewhere:'"),
    ],
)
def test_a_cluster_that_cannot_be_reached_is_one_clear_line(overrides, tmp_path, capsys, address, complaint):
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    from server.cli import main

    assert main(["simulate", *overrides(tmp_path / "run", "runtime=ray", f"runtime.address='{address}'")]) == 1
    assert complaint in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
