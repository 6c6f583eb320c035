"""Law 7: whatever runs the clients, the same replies give the same shared weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

QUICK = ("evaluation.comparison=false", "evaluation.clients=false")


@pytest.fixture(scope="module")
def expected(tmp_path_factory, cache_dir):
    """The digest of an in-process run with one worker, by the settings beyond the small federation's."""
    from conftest import SMALL

    from conf.compose import compose_conf
    from server.runtimes import run_federation

    known: dict[tuple[str, ...], str] = {}

    def digest(*more: str) -> str:
        if more not in known:
            folder = tmp_path_factory.mktemp("in-process")
            always = (f"data.cache_dir={cache_dir}", f"output_dir={folder}", "runtime.num_workers=1", *QUICK)
            run_federation(compose_conf([*SMALL, *always, *more]))
            known[more] = summary_digest(folder)
        return known[more]

    return digest


def summary_digest(folder: Path) -> str:
    import json

    return json.loads((folder / "summary.json").read_text())["shared_digest"]


def test_two_workers(simulate, tmp_path, expected):
    assert simulate(tmp_path / "run", "runtime.num_workers=2", *QUICK)["shared_digest"] == expected()


@pytest.mark.slow
def test_ray(simulate, tmp_path, expected):
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    summary = simulate(tmp_path / "run", "runtime=ray", *QUICK)
    assert summary["shared_digest"] == expected()
    assert summary["num_failures"] == 0


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
def test_a_ray_cluster_that_is_there_already(simulate, tmp_path, expected, ray_cluster):
    wait_for_port(ray_cluster)
    summary = simulate(tmp_path / "run", "runtime=ray", f"runtime.address={ray_cluster}", *QUICK)
    assert summary["shared_digest"] == expected()


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
    """A killed process and a hung client cost only themselves; a refused delta is refused as everywhere."""
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    import json

    more = ("fleet.num_clients=18", "fleet.clients_per_round=18", "fleet.quorum_fraction=0.1", "rounds=1", *QUICK)
    more = (*more, "fleet.reply_seconds=15", *(f"fleet.classes.{name}.availability=1" for name in CLASSES))
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
    assert "no answer within 15 s" in failures["client-0015"]


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
