"""Whole federations on a real SuperLink: the result of the in-process runtime, failures, errors, and nothing left."""

import io
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk
from hostile_nodes_app import KINDS

import server.strategy as strategy_module
import server.superlink as superlink_module
from clients.device import device_checksum
from clients.local import client_id
from conf.compose import compose_conf, encode_conf
from fedofa.device.profile import load_device
from fedofa.types.errors import ConfigError
from server.devices import KeptDevice
from server.federation import build_parts
from server.fleet import draw_cohort
from server.grid import InProcessGrid
from server.resources import descendants
from server.superlink import HOST, LoopbackFederation, RuntimeUnavailableError, app_folder

QUICK = ("evaluation.comparison=false", "evaluation.clients=false")
PRESENT = [
    f"fleet.classes.{name}.availability=1.0" for name in ("sensor_board", "raspberry_pi", "phone", "workstation")
]
APP = """
[project]
name = "{name}"
version = "1.0.0"

[tool.flwr.app]
publisher = "tests"

[tool.flwr.app.components]
serverapp = "server.server_app:app"
clientapp = "{module}:app"

[tool.flwr.app.config]
config = ""
overrides = ""
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def programs(root: int) -> list[str]:
    """Flower's programs among a process's descendants: "flower-superlink", "flwr-serverapp", ..."""
    names = ("flower-superlink", "flower-supernode", "flower-superexec", "flwr-serverapp", "flwr-clientapp")
    lines = [command_line(pid) for pid in descendants(root) if "server.keeper" not in command_line(pid)]
    return [name for line in lines for name in names if f"/{name} " in line]


def socket_addresses(pids: list[int]) -> tuple[set[str], set[str]]:
    """(addresses that the processes listen on, addresses at the other ends of their TCP connections)."""
    inodes = set()
    for pid in pids:
        try:
            targets = [os.readlink(item) for item in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue  # it ended meanwhile
        inodes |= {target[8:-1] for target in targets if target.startswith("socket:[")}
    listening, remote = set(), set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for row in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = row.split()
            if fields[9] not in inodes:
                continue
            address = fields[1 if fields[3] == "0A" else 2].partition(":")[0]
            words = [bytes.fromhex(address[at : at + 8])[::-1] for at in range(0, len(address), 8)]
            (listening if fields[3] == "0A" else remote).add(socket.inet_ntop(family, b"".join(words)))
    return listening, remote


def start(overrides, output_dir: Path, *more: str) -> subprocess.Popen:
    """The command, which heeds Ctrl-C even where a script has the tests in its background and so ignores it."""
    settings = overrides(output_dir, "runtime=superlink", *QUICK, *more)
    command = ["env", "--default-signal=INT", sys.executable, "-m", "server", "simulate", *settings]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_law_7_every_runtime_gives_the_same_digest_and_a_superlink_speaks_to_nobody_else(overrides, simulate, tmp_path):
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    small = ("rounds=2", "fleet.num_clients=3", "fleet.clients_per_round=3", "data.test_examples=4000", *PRESENT)
    expected = simulate(tmp_path / "in_process", *small, *QUICK, "runtime.num_workers=1")
    kernels = {row["digest"]: set(row["choices"]["kernel"]) for row in expected["subnets"]}
    for line in (tmp_path / "in_process/rounds.jsonl").read_text().splitlines():
        trained = set().union(*(kernels[item["subnet"]] for item in json.loads(line)["cohort"]))
        assert {3, 7} <= trained, "unlike kernels, of which one is made from the other"
    two = simulate(tmp_path / "two_workers", *small, *QUICK, "runtime.num_workers=2")
    ray = simulate(tmp_path / "ray", *small, *QUICK, "runtime=ray")
    assert two["shared_digest"] == ray["shared_digest"] == expected["shared_digest"]
    output_dir = tmp_path / "superlink"
    process = start(overrides, output_dir, *small)
    listening, remote, seen = set(), set(), set()
    while process.poll() is None:
        family = descendants(process.pid)
        heard, spoken = socket_addresses(family)
        listening, remote, seen = listening | heard, remote | spoken, seen | set(programs(process.pid))
        time.sleep(0.2)
    with process.stderr as errors:
        printed = errors.read()
    assert process.returncode == 0, printed[-3000:]
    assert {"flower-superlink", "flower-supernode", "flower-superexec", "flwr-serverapp", "flwr-clientapp"} <= seen
    assert listening == {HOST}
    assert remote <= {HOST, "0.0.0.0"}
    assert not any(alive(pid) for pid in family)
    assert "round 2 of 2: 3 of 3 clients" in printed
    assert "INFO" not in printed, "Flower's own lines are left out"

    got = json.loads((output_dir / "summary.json").read_text())
    assert got["shared_digest"] == expected["shared_digest"]
    assert got["subnets"] == expected["subnets"]
    assert (got["bytes_down"], got["bytes_up"]) == (expected["bytes_down"], expected["bytes_up"])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_outlives_the_command(overrides, tmp_path, number):
    process = start(overrides, tmp_path / "run", "fleet.num_clients=2", "fleet.clients_per_round=2", *PRESENT)
    complete = {"flower-superlink", "flower-supernode", "flwr-serverapp", "flwr-clientapp"}
    wait_for(lambda: complete <= set(programs(process.pid)) or process.poll() is not None, 240)
    family = descendants(process.pid)
    process.send_signal(number)
    with process.stderr as errors:
        printed = errors.read()
    assert process.wait(60) == (130 if number == signal.SIGINT else -number), printed[-3000:]
    assert len(family) > 10
    wait_for(lambda: not any(alive(pid) for pid in family), 60)


def hostile_app(folder: Path) -> Path:
    folder.mkdir()
    for module in ("hostile_app", "hostile_nodes_app"):
        shutil.copy(Path(__file__).with_name(f"{module}.py"), folder)
    (folder / "pyproject.toml").write_text(APP.format(name="hostile", module="hostile_nodes_app"))
    return folder


def kill_supernode(federation: LoopbackFederation, name: str, marks: Path) -> None:
    """Kill one SuperNode once its client is in the middle of its round."""
    keeper = federation.keeper_pids[name]
    wait_for(lambda: any(int(mark.name) in descendants(keeper) for mark in marks.iterdir()), 300)
    os.kill(descendants(keeper)[1], signal.SIGKILL)


@pytest.mark.slow
def test_on_a_superlink_a_misbehaving_client_costs_only_itself(overrides, tmp_path, monkeypatch):
    count = len(KINDS) + 1
    small = ("rounds=1", f"fleet.num_clients={count}", f"fleet.clients_per_round={count}", *PRESENT, *QUICK)
    patience = (
        "fleet.quorum_fraction=0.1",
        "fleet.max_in_flight=6",
        "fleet.reply_seconds=100",
        "fleet.join_seconds=120",
    )
    marks = tmp_path / "marks"
    marks.mkdir()
    monkeypatch.setenv("FEDOFA_TEST_MARKS", str(marks))
    conf = compose_conf(overrides(tmp_path / "hostile", *small, *patience))
    nodes = [{"partition-id": number, "num-partitions": count} for number in range(count)]
    said = []
    with LoopbackFederation(nodes) as federation:
        killer = threading.Thread(target=kill_supernode, args=(federation, "supernode 8", marks), daemon=True)
        killer.start()
        federation.run(hostile_app(tmp_path / "app"), {"config": encode_conf(conf)}, said.append)
        killer.join(1)
    assert [line for line in said if line.startswith("supernode 8 ended with status 137")]
    (record,) = [json.loads(line) for line in (tmp_path / "hostile/rounds.jsonl").read_text().splitlines()]
    assert {item["client"] for item in record["cohort"]} == {client_id(number) for number in range(count)}
    reasons = {item["client"]: item["reason"] for item in record["failures"]}
    assert set(reasons) == {client_id(number) for number in KINDS}
    for number, (words, _) in KINDS.items():
        assert words in reasons[client_id(number)]
    summary = json.loads((tmp_path / "hostile/summary.json").read_text())

    def without_culprits(*arguments):
        return [item for item in draw_cohort(*arguments) if item.client.client_id not in reasons]

    monkeypatch.setattr(strategy_module, "draw_cohort", without_culprits)
    strategy = build_parts(conf).strategy(tmp_path / "clean")
    run_config = {"config": encode_conf(conf)}
    with InProcessGrid(num_nodes=count, run_config=run_config, num_workers=1) as grid:
        strategy.start(grid, num_rounds=1)
    assert strategy.state.digest() == summary["shared_digest"]


@pytest.mark.slow
def test_nodes_send_what_was_measured_on_them_and_their_links_are_measured(overrides, tmp_path):
    board, run = tmp_path / "board.json", tmp_path / "run"
    crawl = "uplink_bytes_per_second=1", "downlink_bytes_per_second=1"  # stated; no subnet travels so slowly in a round
    nodes_of = overrides(run, "rounds=1", "fleet.num_clients=2", "fleet.clients_per_round=2", *PRESENT, *QUICK)
    supernet = [item for item in nodes_of if item.startswith("supernet.")]
    quick = ("passes=3", "burst=1", "calibration_subnets=8", "max_spread=1e9", "clock=cpu", "memory_bytes=1e8")
    profile = ("supernet=small", "in_channels=1", "num_classes=10", *supernet, *quick, *crawl, f"output={board}")
    subprocess.run([sys.executable, "-m", "server", "profile", *profile], check=True)
    classes = [
        f"fleet.classes.{item.split('.')[2]}.{fact}" for item in PRESENT for fact in ("memory_bytes=1e8", *crawl)
    ]
    by_search = ("assignment.by=search", "assignment.archive_devices=50", "assignment.link_probe_bytes=1000000")
    conf = compose_conf([*nodes_of, *classes, *by_search])
    nodes = [{"partition-id": number, "num-partitions": 2} for number in range(2)]
    with LoopbackFederation([{**nodes[0], "device": str(board)}, nodes[1]]) as federation:
        federation.run(app_folder(), {"config": encode_conf(conf)})

    kept = [KeptDevice.from_json(json.loads((run / f"devices/{client_id(n)}.json").read_text()), "") for n in range(2)]
    assert kept[0].table == load_device(board).latency
    assert kept[0].checksum == device_checksum(board.read_bytes())
    assert kept[1].table is None
    for device in kept:
        assert 1.0 < device.uplink_bytes_per_second < math.inf
        assert 1.0 < device.downlink_bytes_per_second < math.inf
    summary = json.loads((run / "summary.json").read_text())
    assert not summary["sitting_out"], "with the rates that they state, both would"
    (record,) = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    assert {item["client"] for item in record["cohort"]} == {client_id(0), client_id(1)} and not record["failures"]


def kill_once_a_serverapp_runs(superlink: int) -> None:
    wait_for(lambda: "flwr-serverapp" in programs(superlink))
    os.kill(superlink, signal.SIGKILL)


@pytest.mark.slow
def test_errors_on_a_superlink_are_one_clear_line(overrides, tmp_path):
    said = []
    with LoopbackFederation([]) as federation:
        with pytest.raises(ConfigError, match="^rouns: unknown setting; did you mean 'rounds'"):
            federation.run(app_folder(), {"overrides": "rouns=3"}, said.append)
        settings = overrides(tmp_path / "run", "fleet.join_seconds=1")
        with pytest.raises(ConfigError, match="^no client joined within 1 s, 12 were expected"):
            federation.run(app_folder(), {"config": encode_conf(compose_conf(settings))}, said.append)
        assert not said
        with pytest.raises(RuntimeUnavailableError, match=r"^`flwr run` failed: .*Invalid run configuration.$"):
            federation.run(app_folder(), {"surprise": "1"}, said.append)

        superlink = descendants(federation.keeper_pids["superlink"])[1]
        killer = threading.Thread(target=kill_once_a_serverapp_runs, args=(superlink,), daemon=True)
        killer.start()
        settings = overrides(tmp_path / "run", "fleet.join_seconds=600")
        with pytest.raises(
            RuntimeUnavailableError, match="^the SuperLink ended in the middle of the run with status 137"
        ):
            federation.run(app_folder(), {"config": encode_conf(compose_conf(settings))}, said.append)
        killer.join(1)


def test_the_packed_app_is_all_that_a_node_needs():
    root = app_folder()
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(root))) as packed:
        names = set(packed.namelist())
    code = [path for package in ("fedofa", "clients", "server", "conf") for path in (root / package).rglob("*.py")]
    settings = list((root / "conf").rglob("*.yaml"))
    assert len(settings) > 10
    expected = {path.relative_to(root).as_posix() for path in (*code, *settings)}
    assert names == expected | {"pyproject.toml", ".info/CONTENT"}


def test_clients_that_do_not_join_are_counted_and_the_others_go_on(overrides, tmp_path):
    conf = compose_conf(overrides(tmp_path / "run", "fleet.join_seconds=0"))
    strategy = build_parts(conf).strategy(tmp_path / "run")
    with InProcessGrid(num_nodes=10, run_config={"config": encode_conf(conf)}, num_workers=1) as grid:
        clients, refused = strategy.enrol(grid)
    assert len(clients) == 10
    assert refused == {"2 of 12 clients": "did not join within 0 s"}


def test_a_taken_port_is_one_clear_line(overrides, tmp_path, capsys):
    from server.cli import main

    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["simulate", *overrides(tmp_path / "run", "runtime=superlink", f"runtime.port={port}")]) == 1
    message = " ".join(capsys.readouterr().err.split())
    assert f"runtime.port: {HOST}:{port} cannot be used: [Errno 98] Address already in use; choose another" in message


class Healthy(BaseHTTPRequestHandler):
    """Answers as a SuperLink that is somebody else's."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format, *arguments):
        pass


def test_a_superlink_whose_port_went_to_another_one_says_so(monkeypatch):
    with ThreadingHTTPServer((HOST, 0), Healthy) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        monkeypatch.setattr(superlink_module, "_claim_ports", lambda wanted, num_others: [other.server_port])
        with pytest.raises(
            RuntimeUnavailableError, match=r"ended at its start with status 1: .*address already in use"
        ):
            LoopbackFederation([]).__enter__()
        other.shutdown()


def test_the_ports_of_a_federation_are_distinct():
    ports = superlink_module._claim_ports(0, 500)  # claimed in turn, two of so many would be the same
    assert len(set(ports)) == 501
    wanted = ports[0]
    assert superlink_module._claim_ports(wanted, 2)[0] == wanted


FLWR = """#!{python}
import json, pathlib, sys
count = pathlib.Path(__file__).with_name(sys.argv[1])
calls = int(count.read_text()) + 1 if count.exists() else 1
count.write_text(str(calls))
if sys.argv[1] == "run":
    print(json.dumps({{"success": True, "run-id": 7}}))
elif sys.argv[1] == "log":
    print(*["round 1", "round 2", "round 3"][: 2 * calls - 1], sep="\\n")
    sys.exit("connection reset" if calls == 1 else 0)
else:
    status = "running" if calls == 1 else "finished:completed"
    print(json.dumps({{"success": True, "runs": [{{"status": status, "status-details": ""}}]}}))
"""


def test_a_run_outlives_the_connection_that_reads_its_log(tmp_path, monkeypatch):
    for name, text in (("flwr", FLWR), ("flower-superlink", "#!{python}\nimport time\ntime.sleep(600)\n")):
        (tmp_path / name).write_text(text.format(python=sys.executable))
        (tmp_path / name).chmod(0o755)
    environment = superlink_module._environment
    monkeypatch.setattr(superlink_module, "_environment", lambda home: {**environment(home), "PATH": str(tmp_path)})
    monkeypatch.setattr(superlink_module, "_answers", lambda url: True)
    monkeypatch.setattr(superlink_module, "_listens", lambda root, port: True)
    monkeypatch.setattr(superlink_module, "_RECONNECT_SECONDS", 0.3)
    said = []
    with LoopbackFederation([]) as federation:
        federation.run(tmp_path, {}, said.append)
    assert said == ["round 1", "round 2", "round 3"]
    assert {name: (tmp_path / name).read_text() for name in ("run", "log", "ls")} == {"run": "1", "log": "2", "ls": "2"}


def test_more_supernodes_than_a_machine_can_hold_are_refused(overrides, tmp_path, capsys):
    from server.cli import main

    assert main(["simulate", *overrides(tmp_path / "run", "runtime=superlink", "fleet.num_clients=33")]) == 1
    message = " ".join(capsys.readouterr().err.split())
    assert "fleet.num_clients: runtime=superlink starts a SuperNode for each client and expects at most 32" in message
