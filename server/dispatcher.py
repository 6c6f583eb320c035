"""Gives queued messages to worker processes and collects what they answer, on a thread of its own."""

import math
import threading
import time
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait

from fedofa.types.errors import FedofaError, WireError
from server.carrier import MemoryFiles, Parcel, receive_parcel, send_parcel
from server.worker import ForkServer, describe_exit

MAX_IDLE_DEATHS = 10
"""Workers that may die in a row before they have served anything; then the grid gives up."""


@dataclass(frozen=True, slots=True)
class Task:
    """One message on its way to a worker."""

    message_id: str
    parcel: Parcel
    seconds: float
    """How long a worker may take over it."""


Outcome = Parcel | str
"""A worker's reply, or why there is none."""


class GridError(FedofaError, RuntimeError):
    """The grid is closed, its workers cannot be kept alive, or a message does not belong to it."""


@dataclass(slots=True)
class _Worker:
    connection: Connection  # closed when it is of no more use; the worker then ends
    ready: bool = False
    task: Task | None = None
    deadline: float = math.inf  # of its task, on the monotonic clock
    overdue: bool = False  # killed at the deadline
    num_served: int = 0
    fault: str = ""  # why the connection was closed, if not because the worker was gone

    def is_idle(self) -> bool:
        """Whether it can take a task."""
        return self.ready and self.task is None and not self.overdue and not self.connection.closed


class Dispatcher:
    """Gives queued tasks to idle workers, first in, first out, and collects what they answer, on its own thread.

    `submit`, `collect` and `close` may be called from another thread; everything else happens on this one.
    """

    def __init__(self, fork_server: ForkServer, num_workers: int) -> None:
        self._fork_server = fork_server
        self._num_workers = num_workers
        self._wake_reader, self._wake_writer = Pipe(duplex=False)
        self._files = MemoryFiles()
        self._workers: dict[int, _Worker] = {}
        self._queue: deque[Task] = deque()
        self._num_started = 0
        self._num_idle_deaths = 0
        self._changed = threading.Condition()  # guards the four fields below
        self._inbox: list[Task] = []
        self._outcomes: dict[str, Outcome] = {}
        self._closing = False
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="fedofa-dispatcher", daemon=True)
        self._thread.start()

    def submit(self, tasks: list[Task]) -> None:
        """Queue tasks; `GridError` if the workers are gone for good."""
        with self._changed:
            if self._failure is not None:
                raise GridError(f"the grid can serve no more messages: {self._failure}; make a new one")
            must_wake = not self._inbox
            self._inbox += tasks
        if must_wake:
            self._wake_writer.send_bytes(b"")

    def collect(self, message_ids: Collection[str], wait_seconds: float) -> dict[str, Outcome]:
        """Take the outcomes of these messages that are there; waits for the first one."""
        with self._changed:
            self._changed.wait_for(lambda: not self._outcomes.keys().isdisjoint(message_ids), wait_seconds)
            arrived = [message_id for message_id in self._outcomes if message_id in message_ids]
            return {message_id: self._outcomes.pop(message_id) for message_id in arrived}

    def close(self) -> None:
        """End the thread, the workers and the fork server; more calls do nothing."""
        with self._changed:
            already_closing, self._closing = self._closing, True
        if not already_closing:
            self._wake_writer.send_bytes(b"")
        self._thread.join()
        self._wake_writer.close()
        self._wake_reader.close()

    def _run(self) -> None:
        try:
            for _ in range(self._num_workers):
                self._start_worker()
            while not self._closing:
                self._hand_out()
                self._wait_and_handle()
        except (EOFError, ConnectionError):
            self._fail("the process that forks the workers has ended")
        except Exception as error:  # whatever it is, those who wait for a reply must hear of it
            self._fail(f"{type(error).__name__}: {error}")
        finally:
            self._fork_server.close()
            for worker in self._workers.values():
                worker.connection.close()
            self._files.clear()

    def _start_worker(self) -> None:
        self._num_started += 1
        self._workers[self._num_started] = _Worker(self._fork_server.start_worker(self._num_started))

    def _hand_out(self) -> None:
        for worker in self._workers.values():
            if self._queue and worker.is_idle():
                worker.task = self._queue.popleft()
                worker.deadline = time.monotonic() + worker.task.seconds
                try:
                    send_parcel(worker.connection, worker.task.parcel, self._files)
                except OSError as error:
                    self._hang_up(worker, error)

    def _wait_and_handle(self) -> None:
        workers = {worker.connection: worker for worker in self._workers.values() if not worker.connection.closed}
        ready = wait([self._wake_reader, self._fork_server.control, *workers], self._kill_overdue())
        if self._wake_reader in ready:
            self._take_inbox()
        for connection in workers.keys() & set(ready):
            self._receive(workers[connection])
        if self._fork_server.control in ready:
            self._handle_exit(*self._fork_server.receive_exit())

    def _kill_overdue(self) -> float | None:
        """Kill workers whose task is past its deadline; the seconds until the next deadline, None without one."""
        now, pending = time.monotonic(), [math.inf]
        for number, worker in self._workers.items():
            if worker.task is None or worker.overdue:
                continue
            if worker.deadline > now:
                pending.append(worker.deadline)
            else:
                worker.overdue = True
                self._fork_server.kill_worker(number)
        return None if min(pending) == math.inf else min(pending) - now

    def _take_inbox(self) -> None:
        self._wake_reader.recv_bytes()
        with self._changed:
            tasks, self._inbox = self._inbox, []
        for task in tasks:
            self._files.hold(task.parcel.blobs())
        self._queue.extend(tasks)

    def _receive(self, worker: _Worker) -> None:
        """Take what a worker sent: a reply to its task or, without one, word that it is ready."""
        try:
            if worker.task is None:
                worker.connection.recv_bytes()
                worker.ready = True
                return
            reply = receive_parcel(worker.connection, {})
        except (EOFError, OSError, WireError) as error:
            self._hang_up(worker, error)
        else:
            worker.num_served += 1
            self._num_idle_deaths = 0
            self._finish(worker, reply)

    def _hang_up(self, worker: _Worker, error: Exception) -> None:
        """Close a connection that is of no more use: the worker ends, if it has not yet, and its exit is reported."""
        if not isinstance(error, EOFError | ConnectionError):
            worker.fault = str(error)
        worker.connection.close()

    def _finish(self, worker: _Worker, outcome: Outcome) -> None:
        task, worker.task = worker.task, None
        if task is not None:
            self._files.release(task.parcel.blobs())
            self._publish({task.message_id: outcome})

    def _handle_exit(self, number: int, returncode: int) -> None:
        """Answer the task that a worker leaves behind and start another worker in its place."""
        worker = self._workers[number]
        if worker.task is not None and not worker.connection.closed and worker.connection.poll():
            self._receive(worker)
        cause = "; ".join(filter(None, [describe_exit(returncode), worker.fault]))
        if worker.task is not None and worker.overdue:
            self._finish(worker, f"no answer within {worker.task.seconds:g} s; its process was ended")
        elif worker.task is not None:
            self._finish(worker, f"the worker died while serving this message: {cause}")
        elif worker.num_served == 0:
            self._num_idle_deaths += 1
        worker.connection.close()
        del self._workers[number]
        if self._num_idle_deaths == MAX_IDLE_DEATHS:
            raise GridError(f"{MAX_IDLE_DEATHS} workers in a row died before they served anything, the last by {cause}")
        self._start_worker()

    def _fail(self, reason: str) -> None:
        with self._changed:
            self._failure = reason
            unserved, self._inbox = [*self._queue, *self._inbox], []
        unserved += [worker.task for worker in self._workers.values() if worker.task is not None]
        self._publish({task.message_id: f"the grid can serve no more messages: {reason}" for task in unserved})

    def _publish(self, outcomes: Mapping[str, Outcome]) -> None:
        with self._changed:
            self._outcomes.update(outcomes)
            self._changed.notify_all()
