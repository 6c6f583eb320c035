"""A SuperLink and its SuperNodes as processes of this machine, on 127.0.0.1 only, and runs on them.

Everything is done with Flower's own commands (`flower-superlink`, `flower-supernode`, `flwr run`, `log` and `ls`) under
a Flower home of its own, which goes with the federation: the user's `~/.flwr` is neither read nor written.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import conf as conf_package
from conf.compose import encode_conf
from conf.schema import SimulateConf
from fedofa.types import errors
from fedofa.types.errors import ConfigError, FedofaError, RuntimeUnavailableError
from server.environment import ONE_THREAD, SILENT_FLOWER
from server.kept_process import KeptProcess
from server.resources import descendants
from server.run_log import FLOWER_LINE, RunLog, without_colours

HOST = "127.0.0.1"
MAX_NODES = 32
"""SuperNodes that `run_on_superlink` starts: one takes about 270 MB at rest, and 430 MB more while its client works."""

_CONNECTION = "loopback"
_START_SECONDS = 120.0
_POLL_SECONDS = 0.2
_RECONNECT_SECONDS = 3.0
_ENDING_SECONDS = 2.0  # between the end of the SuperLink's last connection and its exit status
_ERROR_LINE = re.compile(r"fedofa\.types\.errors\.(\w+): (.*)")
_LISTENING = "0A"  # TCP_LISTEN of the kernel's include/net/tcp_states.h
_DETAILS_PREFIX = "ServerApp failed with exception: "


def run_on_superlink(conf: SimulateConf) -> None:
    """Run a whole federation: one SuperLink, one SuperNode for each client, and the ServerApp that it starts.

    Raises:
        FedofaError: what the ServerApp raised, or `RuntimeUnavailableError`.
    """
    count = conf.fleet.num_clients
    if count > MAX_NODES:
        raise ConfigError(
            f"fleet.num_clients: runtime=superlink starts a SuperNode for each client and expects at most {MAX_NODES}, "
            f"found {count}; give fleet.num_clients=3 fleet.clients_per_round=3, or use runtime=in_process"
        )
    nodes = [{"partition-id": number, "num-partitions": count} for number in range(count)]
    with LoopbackFederation(nodes, port=conf.runtime.port) as federation:
        federation.run(app_folder(), {"config": encode_conf(conf)})


def app_folder() -> Path:
    """The checkout, from which `flwr run` packs the app.

    Raises:
        ConfigError: when the packages lie in no checkout.
    """
    folder = _import_root()
    if not (folder / "pyproject.toml").is_file():
        raise ConfigError(f"runtime=superlink: no pyproject.toml in {folder}; run it from a checkout of fedofa")
    return folder


def _import_root() -> Path:
    """The folder from which this process imports the packages."""
    return Path(next(iter(conf_package.__path__))).resolve().parent


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class LoopbackFederation:
    """One SuperLink and its SuperNodes; a context manager whose processes end with it or with this process.

    Nothing is encrypted or authenticated: every socket listens on 127.0.0.1, for processes of this machine alone.
    """

    def __init__(self, node_configs: Sequence[Mapping[str, int | str]], *, port: int = 0) -> None:
        """Prepare one SuperNode for each node config.

        Args:
            node_configs: what each ClientApp finds in `Context.node_config`.
            port: of the SuperLink; 0 takes a free one.
        """
        self._node_configs = list(node_configs)
        self._wanted_port = port
        self._processes: dict[str, KeptProcess] = {}  # the SuperLink comes first

    def __enter__(self) -> Self:
        self.port, *self._node_ports = _claim_ports(self._wanted_port, len(self._node_configs))
        self._folder = tempfile.TemporaryDirectory(prefix="fedofa-superlink-")
        self._home = Path(self._folder.name)
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill every process and wait for its end; more calls do nothing."""
        for process in reversed(self._processes.values()):
            process.close()
        self._folder.cleanup()

    @property
    def keeper_pids(self) -> dict[str, int]:
        """Name ("superlink", "supernode 0", ...) -> id of the process whose descendants are that part."""
        return {name: process.pid for name, process in self._processes.items()}

    @property
    def _superlink(self) -> KeptProcess:
        return self._processes["superlink"]

    def _start(self) -> None:
        connection = f'[superlink]\ndefault = "{_CONNECTION}"\n\n[superlink.{_CONNECTION}]\n'
        connection += f'address = "{HOST}:{self.port}"\ninsecure = true\n'
        (self._home / "config.toml").write_text(connection)
        self._environment = _environment(self._home)
        serve = ["--insecure", "--host", HOST, "--port"]
        command = ["flower-superlink", *serve, str(self.port), "--disable-runtime-dependency-installation"]
        self._processes["superlink"] = self._launch("superlink", command)
        self._await_superlink()
        for number, (config, port) in enumerate(zip(self._node_configs, self._node_ports, strict=True)):
            values = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
            join = ["--superlink", f"{HOST}:{self.port}", "--node-config", values]
            name = f"supernode {number}"
            command = ["flower-supernode", *serve, str(port), *join]
            self._processes[name] = self._launch(name, command)

    def _launch(self, name: str, command: Sequence[str], output: int | IO[bytes] | None = None) -> KeptProcess:
        return KeptProcess(command, self._home / f"{name}.log", self._environment, output)

    def _await_superlink(self) -> None:
        """Wait until our own SuperLink answers: its port may have gone to another process before it was bound."""
        deadline = time.monotonic() + _START_SECONDS
        while True:
            ready = _answers(f"http://{HOST}:{self.port}/health") and _listens(self._superlink.pid, self.port)
            status = self._superlink.poll()
            if status is not None:
                raise RuntimeUnavailableError(
                    f"the SuperLink ended at its start with status {status}: {self._superlink.tail()}"
                )
            if ready:
                return
            if time.monotonic() > deadline:
                raise RuntimeUnavailableError(f"no SuperLink within {_START_SECONDS:g} s: {self._superlink.tail()}")
            time.sleep(_POLL_SECONDS)

    def run(self, app_dir: Path, run_config: Mapping[str, str], report: Callable[[str], None] = _report) -> None:
        """Submit a Flower app and wait until its ServerApp has ended.

        Args:
            app_dir: a folder whose `pyproject.toml` has `[tool.flwr.app]`; what it includes is what every node runs.
            run_config: overrides of `[tool.flwr.app.config]`.
            report: is given each line that the ServerApp prints, and a line for each SuperNode that ends.

        Raises:
            FedofaError: the one that the ServerApp raised.
            RuntimeUnavailableError: the app is refused, the ServerApp raised anything else, or the SuperLink ended.
        """
        settings = self._home / "run.toml"
        # JSON strings are strings of TOML too
        settings.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in run_config.items()))
        submission = ["flwr", "run", str(app_dir), _CONNECTION, "--run-config", str(settings), "--format", "json"]
        run_id = str(self._ask(submission)["run-id"])
        log = RunLog(report)
        outcome = self._await_end(run_id, log, report)
        if outcome["status"] != "finished:completed":
            error = _failure(outcome["status"], str(outcome["status-details"]), log.failure)
            if isinstance(error, RuntimeUnavailableError):
                for line in log.failure:
                    report(line)
            raise error

    def _await_end(self, run_id: str, log: RunLog, report: Callable[[str], None]) -> dict[str, Any]:
        """Follow a run to its end, through as many connections as that takes; returns its row of `flwr ls`."""
        gone: set[str] = set()
        while True:
            self._follow(run_id, log, gone, report)
            outcome = self._ask(["flwr", "ls", _CONNECTION, "--run-id", run_id, "--format", "json"])["runs"][0]
            if outcome["status"].startswith("finished"):
                return outcome
            deadline = time.monotonic() + _RECONNECT_SECONDS
            while time.monotonic() < deadline:
                self._watch(gone, report)
                time.sleep(_POLL_SECONDS)

    def _ask(self, command: Sequence[str]) -> dict[str, Any]:
        """The answer of one of Flower's commands.

        Raises:
            RuntimeUnavailableError: with its reason for failing.
        """
        with self._launch("command", command, subprocess.PIPE) as process, process.stdout as output:
            text = output.read().decode(errors="replace")
        try:
            answer = json.loads(text)
        except ValueError:
            answer = {"error-message": " ".join(text.split()) or "no answer"}
        if not answer.get("success"):
            said = str(answer.get("error-message")).splitlines()
            reason = " ".join(without_colours(line).strip() for line in said if line and not FLOWER_LINE.match(line))
            self._check_superlink(self._superlink.poll(_ENDING_SECONDS))
            raise RuntimeUnavailableError(f"`{' '.join(command[:2])}` failed: {reason}")
        return answer

    def _check_superlink(self, status: int | None) -> None:
        """Raise `RuntimeUnavailableError` when the SuperLink, without which nothing goes on, has an exit status."""
        if status is not None:
            raise RuntimeUnavailableError(
                f"the SuperLink ended in the middle of the run with status {status}: {self._superlink.tail()}; "
                "go on with the same command and resume=true"
            )

    def _follow(self, run_id: str, log: RunLog, gone: set[str], report: Callable[[str], None]) -> None:
        """Read the run's log from its beginning to the end of the connection, and watch the processes meanwhile."""
        command = ["flwr", "log", run_id, _CONNECTION, "--stream"]
        log.rewind()
        buffer = b""
        with self._launch("log", command, subprocess.PIPE) as process, process.stdout as output:
            os.set_blocking(output.fileno(), False)
            while True:
                chunk = output.read()
                if chunk == b"":
                    break
                if chunk is None:
                    self._watch(gone, report)
                    time.sleep(_POLL_SECONDS)
                    continue
                *lines, buffer = (buffer + chunk).split(b"\n")
                for line in lines:
                    log.add(line.decode(errors="replace").rstrip())

    def _watch(self, gone: set[str], report: Callable[[str], None]) -> None:
        """Say once of every SuperNode that it ended; the others go on.

        Raises:
            RuntimeUnavailableError: when the SuperLink ended.
        """
        self._check_superlink(self._superlink.poll())
        for name, process in self._processes.items():
            status = process.poll()
            if status is not None and name not in gone:
                gone.add(name)
                report(f"{name} ended with status {status}: {process.tail(1)}")


def _environment(home: Path) -> dict[str, str]:
    """This process's environment, for Flower's commands: one thread each, quiet, nothing but loopback, our packages."""
    inherited = [str(Path(entry).resolve()) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return {
        **os.environ,
        **ONE_THREAD,
        **SILENT_FLOWER,
        "FLWR_HOME": str(home),
        "NO_PROXY": HOST,
        "no_proxy": HOST,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONPATH": os.pathsep.join([str(_import_root()), *inherited]),
        "PYTHONUNBUFFERED": "1",
        "PYTHONUTF8": "1",
    }


def _claim_ports(wanted: int, num_others: int) -> list[int]:
    """Distinct ports of 127.0.0.1 that nobody listens on: the wanted one, or any for 0, then as many others.

    Raises:
        ConfigError: when the wanted one is taken or no port, or too few are free.
    """
    with contextlib.ExitStack() as probes:
        ports = []
        for port in (wanted, *[0] * num_others):
            probe = probes.enter_context(socket.socket())
            if port:  # also one whose last connections are still in TIME_WAIT
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except (OSError, OverflowError) as error:
                raise ConfigError(
                    f"runtime.port: {HOST}:{port} cannot be used: {error}; choose another port, or 0 for any free one"
                ) from error
            ports.append(probe.getsockname()[1])
        return ports


def _listens(root: int, port: int) -> bool:
    """Whether a process or a descendant of it listens on a port of 127.0.0.1; true where /proc/net cannot tell."""
    try:
        rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    except OSError:
        return True
    address = f"{int.from_bytes(socket.inet_aton(HOST), sys.byteorder):08X}:{port:04X}"
    wanted = {f"socket:[{row[9]}]" for row in rows if row[1] == address and row[3] == _LISTENING}
    return any(not wanted.isdisjoint(_open_files(pid)) for pid in descendants(root))


def _open_files(pid: int) -> set[str]:
    """What the file descriptors of a process refer to, such as "socket:[INODE]"; empty when it has ended."""
    found = set()
    with contextlib.suppress(OSError):
        for item in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                found.add(os.readlink(item))
    return found


def _answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as response:
            return response.status == 200
    except (OSError, urllib.error.URLError):
        return False


def _failure(status: str, details: str, tail: Sequence[str]) -> FedofaError:
    """The error of a run that failed: the ServerApp's own where it is one of ours."""
    reason = details.removeprefix(_DETAILS_PREFIX)
    for line in reversed(tail):
        match = _ERROR_LINE.match(line)
        kind = getattr(errors, match[1], None) if match else None
        if match and isinstance(kind, type) and issubclass(kind, FedofaError):
            return kind(reason if reason.startswith(match[2]) else match[2])
    return RuntimeUnavailableError(f"the run ended as {status}: {reason}")
