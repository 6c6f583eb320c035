"""Worker processes that run a ClientApp: a clean process that loads it once, and forks of that process that serve it.

The parent starts one fork server as a fresh interpreter; it imports torch and the ClientApp and then forks a worker
whenever the parent asks, so that workers share those pages and never inherit the parent's threads. It is not the one
of `multiprocessing`: that one imports the parent's `__main__` again (a script without a guard would recurse), serves
the whole process with one list of modules, ignores those it cannot import, and stays alive after its last user.
"""

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import signal
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, Pipe, wait
from multiprocessing.reduction import recv_handle, send_handle

from flwr.app import Context, Message
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp

from fedofa.types.errors import ConfigError
from server.carrier import (
    Handle,
    MemoryFiles,
    Parcel,
    assume_identity,
    decode_message,
    decode_state,
    encode_parcel,
    encode_state,
    receive_parcel,
    send_parcel,
)
from server.environment import KEPT_PAGES, ONE_THREAD
from server.serving import error_reply, one_line, serve

FIRST_NODE_ID = 1_000_000_000
"""Flower node id of partition 0: far from any partition id, so that neither passes for the other."""

_CLOSE_TIMEOUT_SECONDS = 10.0
_REQUEST = struct.Struct("cq")  # what to do, worker number
_START, _KILL = b"s", b"k"  # a file descriptor follows the first
_EXIT_RECORD = struct.Struct("qq")  # worker number, exit code (negative: signal)
_BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from server.worker import main; main(*map(int, sys.argv[2:]))"
)
# For every worker at once, even if the app imports them only when called; `torch.optim` imports the second one at its
# first use: a second of CPU time and 70 MB, which every collection in the worker would then go through.
_PRELOADED = ("torch", "torch._dynamo", "clients.torch_engine")


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """What every worker of a grid knows from the start."""

    client_app: str
    num_nodes: int
    run_config: UserConfig

    def context(self, message: Message, state: bytes) -> Context:
        """The Flower context of the node that `message` is for."""
        node_id = message.metadata.dst_node_id
        return Context(
            run_id=message.metadata.run_id,
            node_id=node_id,
            node_config={"partition-id": node_id - FIRST_NODE_ID, "num-partitions": self.num_nodes},
            state=decode_state(state),
            run_config=dict(self.run_config),
        )


class ForkServer:
    """The parent's end of the fork server; used by one thread at a time.

    Its process and every worker end when this object is closed or when the parent dies, however it dies.
    """

    def __init__(self, setup: WorkerSetup) -> None:
        """Start the process and wait until it has loaded the ClientApp; `ConfigError` says why it could not."""
        self.control, theirs = Pipe()
        lifeline, self._lifeline = os.pipe()  # never written to: its end tells the workers that the parent is gone
        self._process = _launch(theirs.fileno(), lifeline)
        theirs.close()
        os.close(lifeline)
        try:
            self._await_loaded(setup)
        except BaseException:
            self._process.kill()
            self.close()
            raise

    def _await_loaded(self, setup: WorkerSetup) -> None:
        try:
            self.control.send_bytes(json.dumps(asdict(setup)).encode())
            failure = json.loads(self.control.recv_bytes())
        except (EOFError, ConnectionError):
            failure = {"reason": f"the process that loads it ended with {describe_exit(self._process.wait())}"}
        if failure:
            error = ConfigError(
                f"client_app {setup.client_app!r} cannot be loaded by a worker: {failure['reason']}; expected "
                "'module:attribute' that names a flwr.clientapp.ClientApp and that a new interpreter with this "
                "process's sys.path can import"
            )
            if "traceback" in failure:
                error.add_note(f"In the worker:\n{failure['traceback']}")
            raise error

    def start_worker(self, number: int) -> Connection:
        """Fork a worker; its end of the connection sends one empty frame when it is ready for its first parcel."""
        ours, theirs = Pipe()
        with theirs:
            self.control.send_bytes(_REQUEST.pack(_START, number))
            send_handle(self.control, theirs.fileno(), self._process.pid)
        return ours

    def kill_worker(self, number: int) -> None:
        """End a worker in the middle of whatever it does; its exit is reported as any other, nothing if it is gone."""
        self.control.send_bytes(_REQUEST.pack(_KILL, number))

    def receive_exit(self) -> tuple[int, int]:
        """(number, exit code) of a worker that ended; call it when `control` is ready. `EOFError`: the server ended."""
        return _EXIT_RECORD.unpack(self.control.recv_bytes())

    def close(self) -> None:
        """Kill all workers and end the process; returns when they are gone."""
        self.control.close()
        os.close(self._lifeline)
        try:
            self._process.wait(_CLOSE_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def describe_exit(returncode: int) -> str:
    """A process's end in words: "exit code 3", "signal 9 (Killed)"."""
    if returncode >= 0:
        return f"exit code {returncode}"
    return f"signal {-returncode} ({signal.strsignal(-returncode)})"


def _launch(control_fd: int, lifeline_fd: int) -> subprocess.Popen[bytes]:
    search_path = json.dumps([os.path.abspath(entry) for entry in sys.path])
    command = [sys.executable, "-u", "-c", _BOOTSTRAP, search_path, str(control_fd), str(lifeline_fd)]
    # Blocked until the child ignores it: Ctrl-C goes to the whole process group and is the parent's to handle.
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            pass_fds=(control_fd, lifeline_fd),
            env={**os.environ, **ONE_THREAD, **KEPT_PAGES},
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def main(control_fd: int, lifeline_fd: int) -> None:
    """The fork server's process: load the ClientApp, report, fork workers until the parent closes `control_fd`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    with contextlib.suppress(EOFError, ConnectionError), Connection(control_fd) as control:
        setup = WorkerSetup(**json.loads(control.recv_bytes()))
        try:
            app = _load_client_app(setup.client_app)
        except BaseException as error:  # also SystemExit: whatever the module does, the parent hears of it
            failure = {"reason": one_line(error), "traceback": traceback.format_exc()}
            control.send_bytes(json.dumps(failure).encode())
            return
        control.send_bytes(json.dumps({}).encode())
        gc.collect()
        gc.freeze()  # keeps the collector of a worker from touching, and so copying, the shared pages
        _fork_on_request(control, lifeline_fd, lambda connection: _serve(connection, app, setup))


def _load_client_app(client_app: str) -> ClientApp:
    app = pkgutil.resolve_name(client_app)
    if not isinstance(app, ClientApp):
        raise TypeError(f"expected a ClientApp, found {type(app).__name__}")
    for name in _PRELOADED:
        importlib.import_module(name)
    return app


def _fork_on_request(control: Connection, lifeline_fd: int, serve: Callable[[Connection], None]) -> None:
    numbers_by_pid: dict[int, int] = {}
    exits_fd, wakeup_fd = os.pipe()  # the interpreter writes to the second one on every SIGCHLD
    os.set_blocking(exits_fd, False)
    os.set_blocking(wakeup_fd, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakeup_fd)
    try:
        while True:
            ready = wait([control, exits_fd])
            if exits_fd in ready:
                os.read(exits_fd, 4096)
                _report_exits(control, numbers_by_pid)
            if control in ready:
                request, number = _REQUEST.unpack(control.recv_bytes())
                if request == _KILL:
                    _kill(numbers_by_pid, number)
                    continue
                worker_fd = recv_handle(control)
                pid = _fork_worker(worker_fd, lifeline_fd, (control.fileno(), exits_fd, wakeup_fd), serve)
                numbers_by_pid[pid] = number
                os.close(worker_fd)
    finally:
        for pid in numbers_by_pid:
            os.kill(pid, signal.SIGKILL)
        for pid in numbers_by_pid:
            os.waitpid(pid, 0)


def _kill(numbers_by_pid: dict[int, int], number: int) -> None:
    for pid, candidate in numbers_by_pid.items():
        if candidate == number:
            os.kill(pid, signal.SIGKILL)


def _report_exits(control: Connection, numbers_by_pid: dict[int, int]) -> None:
    while numbers_by_pid:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        number = numbers_by_pid.pop(pid, None)
        if number is not None:
            control.send_bytes(_EXIT_RECORD.pack(number, os.waitstatus_to_exitcode(status)))


def _fork_worker(
    worker_fd: int, lifeline_fd: int, server_fds: tuple[int, ...], serve: Callable[[Connection], None]
) -> int:
    """Returns the worker's pid in the fork server; in the worker it does not return."""
    pid = os.fork()
    if pid:
        return pid
    exit_code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for fd in server_fds:
            os.close(fd)
        threading.Thread(target=_exit_with_parent, args=(lifeline_fd,), daemon=True).start()
        serve(Connection(worker_fd))
        exit_code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(exit_code)


def _exit_with_parent(lifeline_fd: int) -> None:
    os.read(lifeline_fd, 1)
    os._exit(0)


def _serve(connection: Connection, app: ClientApp, setup: WorkerSetup) -> None:
    """A worker's life: one parcel in, one parcel out, until the parent closes the connection."""
    import torch

    torch.set_num_threads(1)
    files = MemoryFiles()
    recent: dict[Handle, bytes] = {}
    with contextlib.suppress(EOFError, ConnectionError):
        connection.send_bytes(b"")
        while True:
            task = receive_parcel(connection, recent)
            files.clear()
            reply = _answer(task, app, setup)
            files.hold(reply.blobs())
            send_parcel(connection, reply, files)
            del task, reply
            gc.collect()  # Flower's record views are reference cycles, which would let whole payloads pile up


def _answer(task: Parcel, app: ClientApp, setup: WorkerSetup) -> Parcel:
    """Run the ClientApp on one message; one that fails leaves its state unchanged."""
    message = decode_message(task)
    assume_identity(message.metadata.run_id, message.metadata.dst_node_id)
    try:
        context = setup.context(message, task.state)
        reply = serve(app, message, context)
        return encode_parcel(reply, b"" if reply.has_error() else encode_state(context.state))
    except Exception as error:  # a reply or a state that cannot be packed
        return encode_parcel(error_reply(message, error), b"")
