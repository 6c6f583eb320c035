"""Flower's `Grid` in process: many simulated nodes on a few worker processes, without Ray and without sockets."""

import copy
import time
from collections.abc import Collection, Iterable, Mapping
from types import TracebackType
from typing import Self

from flwr.app import Error, Message, RecordDict
from flwr.app.message import make_message
from flwr.app.user_config import UserConfig
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from google.protobuf.message import DecodeError

from fedofa.types.errors import CheckpointError, ConfigError
from server.carrier import (
    assume_identity,
    decode_message,
    decode_state,
    encode_parcel,
)
from server.dispatcher import Dispatcher, GridError, Outcome, Task
from server.resources import available_cores
from server.worker import FIRST_NODE_ID, ForkServer, WorkerSetup

_PULL_WAIT_SECONDS = 1.0


class InProcessGrid(Grid):
    """Runs an ordinary ClientApp for `num_nodes` simulated nodes; use it as a context manager, from one thread.

    Node i (0 <= i < num_nodes) has the Flower node id `FIRST_NODE_ID + i` and the node config
    `{"partition-id": i, "num-partitions": num_nodes}`. Messages are served first in, first out, by any free worker.
    A message whose ClientApp raises is answered by an error reply `CLIENT_APP_RAISED_EXCEPTION`, one whose worker
    dies by `CLIENT_APP_CRASHED`; the others go on. A message's TTL is the time that a worker may take over it: waiting
    for a worker, which no real device would do, does not count. A worker that takes longer is killed and replaced.

    A node's `Context.state` lasts from message to message, but only once it is committed: see `commit_states`.
    """

    enforces_ttl = True

    def __init__(
        self,
        client_app: str = "clients.client_app:app",
        *,
        num_nodes: int,
        run_config: UserConfig,
        num_workers: int | None = None,
    ) -> None:
        """Start the workers; returns when the ClientApp has been imported.

        `client_app` is "module:attribute", importable with this process's `sys.path`; `num_workers` defaults to
        `available_cores()`. `ConfigError` on an unusable argument or a ClientApp that cannot be imported.
        """
        num_workers = available_cores() if num_workers is None else num_workers
        _check_count("num_nodes", num_nodes)
        _check_count("num_workers", num_workers)
        _check_run_config(run_config)
        self._num_nodes = num_nodes
        self._num_pushed = 0
        self._sent: dict[str, Message] = {}  # by message id, without content: what an error reply needs
        self._states: dict[int, bytes] = {}  # by partition id; absent when empty
        self._pending_states: dict[str, tuple[int, bytes]] = {}  # by message id: (partition id, state)
        self._closed = False
        self.set_run(Run.create_empty(run_id=1))
        fork_server = ForkServer(WorkerSetup(client_app, num_nodes, run_config))
        self._dispatcher = Dispatcher(fork_server, num_workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all workers, also in the middle of a task, and wait for their end; more calls do nothing."""
        self._closed = True
        self._dispatcher.close()

    def set_run(self, run: Run) -> None:
        """Set the run that this grid, and every `Message` made in this process, belongs to."""
        if not isinstance(run, Run):
            raise ConfigError(f"set_run: expected a flwr Run, found {type(run).__name__}")
        self._run = run
        assume_identity(run.run_id, SUPERLINK_NODE_ID)

    @property
    def run(self) -> Run:
        """A copy of the run's description."""
        return copy.copy(self._run)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """The same as `Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)`."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """The ids of all nodes, in the order of their partitions."""
        return list(range(FIRST_NODE_ID, FIRST_NODE_ID + self._num_nodes))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queue messages, give each its id and return the ids at once; `GridError` queues none of them.

        A message takes along its node's state as it is committed now. Its content is copied no more than need be:
        messages that hold the same `bytes` object share one copy.
        """
        self._check_open()
        messages = list(messages)
        for message in messages:
            self._check_message(message)
        tasks = [self._encode_task(message) for message in messages]
        self._dispatcher.submit(tasks)
        return [task.message_id for task in tasks]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that are ready, in the order of their arrival; waits up to a second for the first one.

        Each reply is handed out once. A reply that nobody pulls is kept until the grid is closed.
        """
        return self._pull(set(message_ids), _PULL_WAIT_SECONDS)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push messages and pull until all are answered or `timeout` seconds have passed."""
        open_ids = set(self.push_messages(messages))
        deadline = time.monotonic() + timeout if timeout is not None else float("inf")
        replies: list[Message] = []
        while open_ids and (remaining_seconds := deadline - time.monotonic()) > 0:
            arrived = self._pull(open_ids, min(remaining_seconds, _PULL_WAIT_SECONDS))
            open_ids -= {reply.metadata.reply_to_message_id for reply in arrived}
            replies += arrived
        return replies

    def commit_states(self, message_ids: Iterable[str]) -> None:
        """Make the client states that came with these replies current; forget those of all other pulled replies.

        A client whose reply was refused thus keeps the state it had before. Of two replies of one node, the later in
        `message_ids` wins. `GridError`, with nothing changed, if an id has no pending state.
        """
        message_ids = list(message_ids)
        unknown = [message_id for message_id in message_ids if message_id not in self._pending_states]
        if unknown:
            raise GridError(
                f"commit_states: no pending state for message {unknown[0]!r} ({len(unknown)} such of "
                f"{len(message_ids)}); expected ids whose replies were pulled, without an error, since the last commit"
            )
        for message_id in message_ids:
            partition, state = self._pending_states[message_id]
            self._states.pop(partition, None)
            if state:
                self._states[partition] = state
        self._pending_states.clear()

    def export_states(self) -> dict[int, bytes]:
        """The committed client states, partition id -> bytes; partitions without state are absent."""
        return dict(self._states)

    def import_states(self, states: Mapping[int, bytes]) -> None:
        """Replace all client states by those of `export_states`; `CheckpointError`, with nothing changed, if unfit."""
        for partition, state in states.items():
            if partition not in range(self._num_nodes):
                raise CheckpointError(
                    f"client states: expected partition ids below {self._num_nodes}, found {partition}; "
                    "resume with the number of clients that the checkpoint was made with"
                )
            try:
                decode_state(state)
            except (DecodeError, ValueError, TypeError) as error:
                raise CheckpointError(
                    f"client state of partition {partition}: expected a serialised RecordDict, "
                    f"found {len(state)} bytes that are none ({error}); resume from another checkpoint"
                ) from error
        self._states = {partition: bytes(state) for partition, state in states.items() if state}
        self._pending_states.clear()

    def _check_open(self) -> None:
        if self._closed:
            raise GridError("the grid is closed; make a new one")

    def _check_message(self, message: Message) -> None:
        node_id = message.metadata.dst_node_id
        if not FIRST_NODE_ID <= node_id < FIRST_NODE_ID + self._num_nodes:
            raise GridError(
                f"push_messages: a message is for node {node_id}; expected one of get_node_ids(), "
                f"{FIRST_NODE_ID} to {FIRST_NODE_ID + self._num_nodes - 1}; nothing was sent"
            )
        if not message.has_content():
            raise GridError(f"push_messages: the message for node {node_id} has no content; nothing was sent")

    def _encode_task(self, message: Message) -> Task:
        self._num_pushed += 1
        message_id = f"message-{self._num_pushed}"
        message.metadata.__dict__["_message_id"] = message_id  # has no setter: Flower's own grids do the same
        self._sent[message_id] = make_message(metadata=copy.copy(message.metadata), content=RecordDict())
        state = self._states.get(message.metadata.dst_node_id - FIRST_NODE_ID, b"")
        return Task(message_id, encode_parcel(message, state), message.metadata.ttl)

    def _pull(self, message_ids: Collection[str], wait_seconds: float) -> list[Message]:
        self._check_open()
        outcomes = self._dispatcher.collect(message_ids, wait_seconds)
        return [self._decode_outcome(message_id, outcome) for message_id, outcome in outcomes.items()]

    def _decode_outcome(self, message_id: str, outcome: Outcome) -> Message:
        sent = self._sent.pop(message_id)
        if isinstance(outcome, str):
            return Message(Error(ErrorCode.CLIENT_APP_CRASHED, outcome), reply_to=sent)
        reply = decode_message(outcome)
        if reply.has_content():
            self._pending_states[message_id] = (sent.metadata.dst_node_id - FIRST_NODE_ID, outcome.state)
        return reply


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}: expected a whole number of at least 1, found {value!r}")


def _check_run_config(run_config: UserConfig) -> None:
    for key, value in run_config.items():
        if not isinstance(value, bool | int | float | str):
            raise ConfigError(
                f"run_config[{key!r}]: expected a bool, int, float or str, found {type(value).__name__}; "
                "write lists and nested settings as one string"
            )
