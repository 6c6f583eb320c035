"""The in-process grid: what goes out comes back, whatever happens to the workers."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.run import Run
from hypothesis import given, settings
from hypothesis import strategies as st

from fedofa.types.errors import CheckpointError, ConfigError, WireError
from server.carrier import (
    INLINE_LIMIT_BYTES,
    MemoryFiles,
    assume_identity,
    decode_message,
    encode_parcel,
    receive_parcel,
    send_parcel,
)
from server.dispatcher import MAX_IDLE_DEATHS, GridError
from server.grid import InProcessGrid
from server.resources import available_cores
from server.worker import FIRST_NODE_ID, describe_exit

HERE = Path(__file__).parent
MEGABYTE = 2**20
RUN_CONFIG = {"name": "test", "rounds": 3, "rate": 0.5, "flag": True}


@pytest.fixture(scope="module", autouse=True)
def importable_apps() -> Iterator[None]:
    """Lets workers, which get this process's `sys.path`, import the ClientApps beside this file."""
    sys.path.insert(0, str(HERE))
    yield
    sys.path.remove(str(HERE))


def make_grid(app: str = "grid_apps:app", num_nodes: int = 4, num_workers: int = 2) -> InProcessGrid:
    return InProcessGrid(app, num_nodes=num_nodes, run_config=dict(RUN_CONFIG), num_workers=num_workers)


@pytest.fixture(scope="module")
def shared_grid(importable_apps: None) -> Iterator[InProcessGrid]:
    with make_grid(num_nodes=40) as grid:
        yield grid


@pytest.fixture
def grid(shared_grid: InProcessGrid) -> InProcessGrid:
    """A grid whose nodes have no state; shared, because each one costs an import of torch."""
    shared_grid.import_states({})
    return shared_grid


def message_to(node_id: int, kind: str = "query", /, **records: dict | ArrayRecord) -> Message:
    content = RecordDict()
    for name, record in records.items():
        content[name] = record if isinstance(record, ArrayRecord) else ConfigRecord(record)
    return Message(content, node_id, kind)


def worker_pids(replies: list[Message]) -> set[int]:
    return {int(str(reply.content.config_records["context"]["pid"])) for reply in replies}


def failing(node_id: int, how: str) -> Message:
    return message_to(node_id, "query.fail", fail={"how": how})


def raw_array(data: bytes) -> Array:
    return Array("uint8", (len(data),), "raw", data)


def descendants(pid: int) -> set[int]:
    """Ids of all processes below `pid`, zombies apart."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rsplit(")", 1)[1].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            parents[int(stat.parent.name)] = int(parent)
    found, frontier = set(), {pid}
    while frontier:
        frontier = {child for child, parent in parents.items() if parent in frontier}
        found |= frontier
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool], timeout_seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def open_fds() -> dict[str, str]:
    gc.collect()
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue
    return found


# --- messages ---------------------------------------------------------------------------------------------------------


def test_the_client_app_sees_its_node_and_the_run_config(grid: InProcessGrid) -> None:
    node_id = grid.get_node_ids()[3]
    (reply,) = grid.send_and_receive([message_to(node_id)])
    context = dict(reply.content.config_records["context"])
    assert context.pop("pid") != os.getpid()
    assert context == {
        "run_id": grid.run.run_id,
        "node_id": node_id,
        "node_config.partition-id": 3,
        "node_config.num-partitions": 40,
        "run_config.name": "test",
        "run_config.rounds": 3,
        "run_config.rate": 0.5,
        "run_config.flag": True,
    }
    assert (reply.metadata.src_node_id, reply.metadata.dst_node_id) == (node_id, 1)


def test_node_ids_are_no_partition_ids(grid: InProcessGrid) -> None:
    assert grid.get_node_ids() == [FIRST_NODE_ID + i for i in range(40)]
    assert set(grid.get_node_ids()).isdisjoint(range(40))
    assert [node.node_id for node in grid.get_nodes()] == grid.get_node_ids()


def test_forty_large_messages_come_back_right_and_in_order_of_ids(grid: InProcessGrid) -> None:
    payloads = [bytes([i]) * (4 * MEGABYTE) for i in range(40)]
    messages = [
        message_to(node_id, payload=ArrayRecord({"big": raw_array(data), "small": raw_array(data[:10])}))
        for node_id, data in zip(grid.get_node_ids(), payloads, strict=True)
    ]
    ids = grid.push_messages(messages)
    assert [message.metadata.message_id for message in messages] == ids
    assert len(set(ids)) == 40
    replies: dict[str, Message] = {}
    while len(replies) < 40:
        arrived = grid.pull_messages(ids)
        assert not replies.keys() & {reply.metadata.reply_to_message_id for reply in arrived}
        replies |= {reply.metadata.reply_to_message_id: reply for reply in arrived}
    for message_id, message, data in zip(ids, messages, payloads, strict=True):
        record = replies[message_id].content.array_records["payload"]
        assert list(record) == ["big", "small"]
        assert record["big"] == raw_array(data)
        assert record["small"] == raw_array(data[:10])
        assert message.content.array_records["payload"]["big"].data is data


def test_numpy_arrays_and_many_records_survive(grid: InProcessGrid) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in [(3,), (300, 300), (0, 4), (200, 100)]]
    record = ArrayRecord([*arrays])
    (reply,) = grid.send_and_receive([message_to(grid.get_node_ids()[0], one=record, note={"a": [1, 2]}, two=record)])
    for name in ("one", "two"):
        for sent, received in zip(arrays, reply.content.array_records[name].to_numpy_ndarrays(), strict=True):
            np.testing.assert_array_equal(sent, received)
    assert list(reply.content)[:3] == ["one", "note", "two"]
    assert reply.content.config_records["note"]["a"] == [1, 2]


def test_a_new_payload_is_not_taken_for_an_older_one(grid: InProcessGrid) -> None:
    """Sizes and file descriptors are equal from message to message; only the bytes differ."""
    node_id = grid.get_node_ids()[0]
    for i in range(12):
        (reply,) = grid.send_and_receive([message_to(node_id, p=ArrayRecord({"a": raw_array(bytes([i]) * MEGABYTE)}))])
        assert reply.content.array_records["p"]["a"].data == bytes([i]) * MEGABYTE


def test_an_array_that_looks_like_a_handle_stays_an_array(grid: InProcessGrid, tmp_path: Path) -> None:
    with open(tmp_path / "secret", "w+b") as secret:
        secret.write(b"secret")
        secret.flush()
        lure = f"[{os.getpid()}, {secret.fileno()}, 6, 0]".encode()
        record = ArrayRecord({"empty": raw_array(b""), "lure": raw_array(lure)})
        (reply,) = grid.send_and_receive([message_to(grid.get_node_ids()[0], p=record)])
    assert reply.content.array_records["p"]["lure"].data == lure
    assert reply.content.array_records["p"]["empty"].data == b""


def test_each_reply_is_handed_out_once(grid: InProcessGrid) -> None:
    ids = grid.push_messages([message_to(node_id) for node_id in grid.get_node_ids()[:2]])
    replies = []
    while len(replies) < 2:
        replies += grid.pull_messages(ids)
    assert {reply.metadata.reply_to_message_id for reply in replies} == set(ids)
    assert grid.pull_messages(ids) == []
    assert grid.pull_messages(["never pushed"]) == []


def test_two_workers_serve_at_the_same_time(grid: InProcessGrid, tmp_path: Path) -> None:
    first, second = grid.get_node_ids()[:2]
    folder = {"folder": str(tmp_path)}
    replies = grid.send_and_receive([message_to(n, "query.meet", meeting=folder) for n in (first, second)])
    assert len(worker_pids(replies)) == 2


def test_one_worker_serves_in_order_and_a_timeout_ends_the_wait(importable_apps: None, tmp_path: Path) -> None:
    with make_grid(num_workers=1) as grid:
        ids = grid.push_messages([message_to(grid.get_node_ids()[i % 4]) for i in range(20)])
        replies: list[Message] = []
        while len(replies) < 20:
            replies += grid.pull_messages(ids)
        assert [reply.metadata.reply_to_message_id for reply in replies] == ids
        stuck = message_to(grid.get_node_ids()[0], "query.sleep", sleep={"file": str(tmp_path / "begun")})
        assert grid.send_and_receive([stuck], timeout=0.2) == []


def test_messages_made_in_a_client_app_bear_its_node(grid: InProcessGrid) -> None:
    node_id = grid.get_node_ids()[5]
    (reply,) = grid.send_and_receive([message_to(node_id, "evaluate")])
    assert reply.content.config_records["own"]["src_node_id"] == node_id


def test_the_run_can_be_set(grid: InProcessGrid) -> None:
    try:
        grid.set_run(Run.create_empty(run_id=42))
        (reply,) = grid.send_and_receive([grid.create_message(RecordDict(), "query", grid.get_node_ids()[0], "7")])
    finally:
        grid.set_run(Run.create_empty(run_id=1))
    assert reply.content.config_records["context"]["run_id"] == 42
    assert reply.metadata.group_id == "7"


def test_workers_use_one_torch_thread(grid: InProcessGrid) -> None:
    (reply,) = grid.send_and_receive([message_to(grid.get_node_ids()[0], "query.process")])
    assert reply.content.config_records["process"]["num_torch_threads"] == 1


@pytest.mark.parametrize("node_id", [0, 3, FIRST_NODE_ID - 1, FIRST_NODE_ID + 40])
def test_a_message_to_no_node_is_refused_with_its_whole_batch(grid: InProcessGrid, node_id: int) -> None:
    good = message_to(grid.get_node_ids()[0])
    with pytest.raises(GridError, match=f"node {node_id}; expected one of .*nothing was sent"):
        grid.push_messages([good, message_to(node_id)])
    assert good.metadata.message_id == ""


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"num_nodes": 0}, "num_nodes: expected a whole number of at least 1, found 0"),
        ({"num_workers": 0}, "num_workers: expected a whole number of at least 1, found 0"),
        ({"run_config": {"a": [1]}}, r"run_config\['a'\]: expected a bool, int, float or str, found list"),
    ],
)
def test_unusable_arguments_are_refused(arguments: dict, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        InProcessGrid("grid_apps:app", **{"num_nodes": 2, "run_config": {}, **arguments})


def test_available_cores_follows_the_affinity_mask() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert available_cores() == len(allowed)


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "code", "reason"),
    [
        ("raise", ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "ValueError: two lines"),
        ("sys.exit", ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "SystemExit: leaving"),
        (
            "no reply",
            ErrorCode.CLIENT_APP_RAISED_EXCEPTION,
            "TypeError: the ClientApp returned no reply to this message; return Message(content, reply_to=message)",
        ),
        ("os._exit", ErrorCode.CLIENT_APP_CRASHED, "the worker died while serving this message: exit code 3"),
        ("os._exit(0)", ErrorCode.CLIENT_APP_CRASHED, "the worker died while serving this message: exit code 0"),
        ("kill", ErrorCode.CLIENT_APP_CRASHED, "the worker died while serving this message: signal 9 (Killed)"),
    ],
)
def test_a_failure_is_one_error_reply_and_the_others_go_on(
    grid: InProcessGrid, how: str, code: int, reason: str
) -> None:
    nodes = grid.get_node_ids()[:6]
    messages = [failing(node, how) if node == nodes[2] else message_to(node) for node in nodes]
    replies = {reply.metadata.src_node_id: reply for reply in grid.send_and_receive(messages)}
    assert replies.keys() == set(nodes)
    assert [node for node in nodes if replies[node].has_error()] == [nodes[2]]
    assert (replies[nodes[2]].error.code, replies[nodes[2]].error.reason) == (code, reason)


def test_more_crashes_than_idle_deaths_allowed_do_not_end_the_grid(grid: InProcessGrid) -> None:
    nodes = grid.get_node_ids()[: MAX_IDLE_DEATHS + 2]
    replies = grid.send_and_receive([failing(node, "os._exit") for node in nodes])
    assert [reply.error.code for reply in replies] == [ErrorCode.CLIENT_APP_CRASHED] * len(nodes)
    (reply,) = grid.send_and_receive([message_to(nodes[0])])
    assert reply.has_content()


def test_a_client_that_hangs_is_ended_and_those_that_wait_behind_it_are_served(
    grid: InProcessGrid, tmp_path: Path
) -> None:
    nodes = grid.get_node_ids()[:6]
    files = [tmp_path / str(node) for node in nodes[:3]]  # more hung clients than workers: the others wait in line
    hung = [message_to(n, "query.sleep", sleep={"file": str(f)}) for n, f in zip(nodes, files, strict=False)]
    messages = [*hung, *(message_to(node) for node in nodes[3:])]
    for message in messages:
        message.metadata.ttl = 1.0
    family = descendants(os.getpid())
    replies = {reply.metadata.src_node_id: reply for reply in grid.send_and_receive(messages, timeout=60)}
    assert replies.keys() == set(nodes)
    for node in nodes[:3]:
        assert replies[node].error.code == ErrorCode.CLIENT_APP_CRASHED
        assert replies[node].error.reason == "no answer within 1 s; its process was ended"
    assert all(replies[node].has_content() for node in nodes[3:]), "waiting for a worker is not the client's fault"
    assert all(file.exists() for file in files)
    assert wait_until(lambda: len(descendants(os.getpid())) == len(family)), "as many processes as before"


def test_an_idle_worker_that_is_killed_is_replaced(grid: InProcessGrid, tmp_path: Path) -> None:
    first, second = grid.get_node_ids()[:2]
    (victim,) = worker_pids(grid.send_and_receive([message_to(first)]))
    os.kill(victim, signal.SIGKILL)
    assert wait_until(lambda: not Path(f"/proc/{victim}").exists())
    meeting = {"folder": str(tmp_path)}
    replies = grid.send_and_receive([message_to(n, "query.meet", meeting=meeting) for n in (first, second)])
    assert len(worker_pids(replies) - {victim}) == 2


@pytest.mark.parametrize(
    ("app", "complaint"),
    [
        ("no_such_module:app", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("grid_apps:no_such_app", "AttributeError: module 'grid_apps' has no attribute 'no_such_app'"),
        ("grid_app_broken:app", "LookupError: no data here"),
        ("grid_app_stillborn:not_an_app", "TypeError: expected a ClientApp, found str"),
    ],
)
def test_an_unimportable_client_app_is_one_clear_error(importable_apps: None, app: str, complaint: str) -> None:
    before, fds = descendants(os.getpid()), open_fds()
    with pytest.raises(ConfigError, match="cannot be loaded by a worker") as caught:
        make_grid(app)
    assert repr(app) in str(caught.value)
    assert complaint in str(caught.value)
    assert "Traceback" in caught.value.__notes__[0]
    assert descendants(os.getpid()) == before
    assert open_fds() == fds


def test_workers_that_die_at_birth_end_the_grid(importable_apps: None) -> None:
    with make_grid("grid_app_stillborn:app") as grid:
        ids: list[str] = []
        with pytest.raises(GridError, match=r"10 workers in a row died .*, the last by exit code 7"):
            while len(ids) < 1000:
                ids += grid.push_messages([message_to(grid.get_node_ids()[0])])
                time.sleep(0.02)
        replies = grid.pull_messages(ids)
        assert len(replies) == len(ids)
        assert {reply.error.code for reply in replies} <= {ErrorCode.CLIENT_APP_CRASHED}


def test_the_death_of_the_fork_server_answers_everything(importable_apps: None, tmp_path: Path) -> None:
    before = descendants(os.getpid())
    with make_grid(num_workers=1) as grid:
        node_id = grid.get_node_ids()[0]
        begun = tmp_path / "begun"
        ids = grid.push_messages([message_to(node_id, "query.sleep", sleep={"file": str(begun)}), message_to(node_id)])
        assert wait_until(begun.exists)
        os.kill(grid._dispatcher._fork_server._process.pid, signal.SIGKILL)
        replies: list[Message] = []
        while len(replies) < 2:
            replies += grid.pull_messages(ids)
        assert all("the process that forks the workers has ended" in str(reply.error.reason) for reply in replies)
        with pytest.raises(GridError, match="can serve no more messages"):
            grid.push_messages([message_to(node_id)])
        assert wait_until(lambda: descendants(os.getpid()) == before)


def test_exits_are_described() -> None:
    assert describe_exit(3) == "exit code 3"
    assert describe_exit(-signal.SIGSEGV) == "signal 11 (Segmentation fault)"


# --- client state -----------------------------------------------------------------------------------------------------


def calls_seen(grid: InProcessGrid, nodes: list[int], state_bytes: int = 10) -> tuple[list[str], list[int]]:
    """Message ids and the number of earlier calls that each node's state knows of, node by node."""
    messages = [message_to(node, "train", count={"state_bytes": state_bytes}) for node in nodes]
    replies = {reply.metadata.src_node_id: reply for reply in grid.send_and_receive(messages)}
    ids = [replies[node].metadata.reply_to_message_id for node in nodes]
    return ids, [int(str(replies[node].content.config_records["count"]["calls"])) for node in nodes]


@pytest.mark.parametrize("state_bytes", [10, 3 * INLINE_LIMIT_BYTES])
def test_state_lasts_when_it_is_committed_and_only_then(grid: InProcessGrid, state_bytes: int) -> None:
    nodes = grid.get_node_ids()[:3]
    ids, seen = calls_seen(grid, nodes, state_bytes)
    assert seen == [0, 0, 0]
    grid.commit_states([ids[0], ids[2]])
    ids, seen = calls_seen(grid, nodes, state_bytes)
    assert seen == [1, 0, 1]
    grid.commit_states([ids[1]])
    ids, seen = calls_seen(grid, nodes, state_bytes)
    assert seen == [1, 1, 1]
    assert grid.export_states().keys() == {0, 1, 2}


def test_a_state_can_be_emptied(grid: InProcessGrid) -> None:
    node_id = grid.get_node_ids()[0]
    ids, _ = calls_seen(grid, [node_id])
    grid.commit_states(ids)
    (reply,) = grid.send_and_receive([message_to(node_id, "train.forget")])
    grid.commit_states([reply.metadata.reply_to_message_id])
    assert grid.export_states() == {}


def test_only_pending_states_can_be_committed(grid: InProcessGrid) -> None:
    nodes = grid.get_node_ids()[:2]
    ids, _ = calls_seen(grid, nodes)
    with pytest.raises(GridError, match=r"no pending state for message 'unknown' \(1 such of 2\)"):
        grid.commit_states([ids[0], "unknown"])
    grid.commit_states(ids)
    with pytest.raises(GridError, match="no pending state"):
        grid.commit_states(ids)
    (reply,) = grid.send_and_receive([failing(nodes[0], "raise")])
    with pytest.raises(GridError, match="no pending state"):
        grid.commit_states([reply.metadata.reply_to_message_id])


def test_states_survive_export_and_import(grid: InProcessGrid) -> None:
    nodes = grid.get_node_ids()[:2]
    ids, _ = calls_seen(grid, nodes)
    grid.commit_states(ids)
    saved = grid.export_states()
    ids, _ = calls_seen(grid, nodes)
    grid.commit_states(ids)
    grid.import_states({0: saved[0], 1: b""})
    assert grid.export_states() == {0: saved[0]}
    assert calls_seen(grid, nodes)[1] == [1, 0]


@pytest.mark.parametrize(
    ("states", "complaint"),
    [({40: b""}, "expected partition ids below 40, found 40"), ({1: b"\xff damaged"}, "client state of partition 1")],
)
def test_unfit_states_are_refused(grid: InProcessGrid, states: dict[int, bytes], complaint: str) -> None:
    ids, _ = calls_seen(grid, grid.get_node_ids()[:1])
    grid.commit_states(ids)
    before = grid.export_states()
    with pytest.raises(CheckpointError, match=complaint):
        grid.import_states(states)
    assert grid.export_states() == before


# --- resources --------------------------------------------------------------------------------------------------------


def test_file_descriptors_do_not_grow(grid: InProcessGrid) -> None:
    shared = raw_array(bytes(MEGABYTE))
    nodes = grid.get_node_ids()

    def exchange(num_messages: int) -> None:
        for start in range(0, num_messages, 20):
            own = [raw_array(os.urandom(100_000)) for _ in range(20)]
            batch = [
                message_to(nodes[(start + i) % 40], p=ArrayRecord({"shared": shared, "own": array}))
                for i, array in enumerate(own)
            ]
            assert all(reply.has_content() for reply in grid.send_and_receive(batch))

    def worker_fds() -> list[int]:
        replies = grid.send_and_receive([message_to(node, "query.process") for node in nodes])
        return [int(str(reply.content.config_records["process"]["num_fds"])) for reply in replies]

    exchange(40)
    before, workers_before = len(open_fds()), max(worker_fds())
    exchange(200)
    assert len(open_fds()) == before
    assert max(worker_fds()) == workers_before


def test_payloads_do_not_pile_up_in_workers(grid: InProcessGrid) -> None:
    size_bytes = 8 * MEGABYTE
    rss_bytes: dict[int, list[int]] = {}
    for i in range(30):
        payload = ArrayRecord({"a": raw_array(bytes([i]) * size_bytes)})
        (reply,) = grid.send_and_receive([message_to(grid.get_node_ids()[0], "query.process", p=payload)])
        facts = reply.content.config_records["process"]
        rss_bytes.setdefault(int(str(facts["pid"])), []).append(int(str(facts["rss_bytes"])))
    assert max(max(seen) - min(seen) for seen in rss_bytes.values()) < 5 * size_bytes


def test_close_leaves_no_process_thread_or_file_descriptor(importable_apps: None, tmp_path: Path) -> None:
    before, fds = descendants(os.getpid()), open_fds()
    grid = make_grid()
    begun = tmp_path / "begun"
    payload = ArrayRecord({"a": raw_array(bytes(MEGABYTE))})
    grid.push_messages([message_to(FIRST_NODE_ID, "query.sleep", sleep={"file": str(begun)}, p=payload)])
    assert wait_until(begun.exists)
    assert wait_until(lambda: len(descendants(os.getpid()) - before) == 3)
    thread = grid._dispatcher._thread
    grid.close()
    grid.close()
    assert descendants(os.getpid()) == before
    assert open_fds() == fds
    assert not thread.is_alive()
    for use in (lambda: grid.push_messages([]), lambda: grid.pull_messages([])):
        with pytest.raises(GridError, match="closed"):
            use()


def start_busy_parent(tmp_path: Path) -> tuple[subprocess.Popen[str], set[int]]:
    """A parent process in a session of its own, both workers in mid-task, and everything below it."""
    parent = subprocess.Popen(
        [sys.executable, HERE / "grid_script.py", HERE, tmp_path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(HERE.parent.parent)},
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "busy\n"
    below = descendants(parent.pid)
    assert len(below) == 3
    return parent, below


def test_killing_the_parent_in_mid_task_leaves_no_process(tmp_path: Path) -> None:
    parent, below = start_busy_parent(tmp_path)
    parent.kill()
    parent.communicate(timeout=60)
    assert wait_until(lambda: not any(map(is_alive, below)))


def test_workers_end_with_the_parent_even_without_the_fork_server(tmp_path: Path) -> None:
    parent, below = start_busy_parent(tmp_path)
    (fork_server,) = [pid for pid in below if descendants(pid)]
    os.kill(parent.pid, signal.SIGSTOP)
    os.kill(fork_server, signal.SIGKILL)
    assert wait_until(lambda: not is_alive(fork_server))
    assert all(map(is_alive, below - {fork_server}))
    parent.kill()
    parent.communicate(timeout=60)
    assert wait_until(lambda: not any(map(is_alive, below)))


def test_ctrl_c_ends_everything_with_one_traceback(tmp_path: Path) -> None:
    parent, below = start_busy_parent(tmp_path)
    os.killpg(parent.pid, signal.SIGINT)
    _, errors = parent.communicate(timeout=60)
    assert not any(map(is_alive, below))
    assert errors.count("Traceback") == 1
    assert errors.rstrip().endswith("KeyboardInterrupt")


UNGUARDED = """
from flwr.app import Message, RecordDict
from server.grid import InProcessGrid
with InProcessGrid("grid_apps:app", num_nodes=1, run_config={}, num_workers=1) as grid:
    (reply,) = grid.send_and_receive([Message(RecordDict(), grid.get_node_ids()[0], "query")])
    print("node", reply.content.config_records["context"]["node_id"])
"""


@pytest.mark.parametrize("form", ["script", "-m", "stdin"])
def test_the_parent_may_be_any_program_without_a_guard(tmp_path: Path, form: str) -> None:
    (tmp_path / "unguarded.py").write_text(UNGUARDED)
    arguments = {"script": [tmp_path / "unguarded.py"], "-m": ["-m", "unguarded"], "stdin": ["-"]}[form]
    done = subprocess.run(
        [sys.executable, *arguments],
        input=UNGUARDED if form == "stdin" else None,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [HERE.parent.parent, HERE, tmp_path]))},
    )
    assert (done.stdout, done.stderr) == (f"node {FIRST_NODE_ID}\n", "")


# --- parcels ----------------------------------------------------------------------------------------------------------

sizes = st.sampled_from([0, 1, INLINE_LIMIT_BYTES, INLINE_LIMIT_BYTES + 1, 3 * INLINE_LIMIT_BYTES])
shapes = st.dictionaries(st.text(min_size=1, max_size=3), st.lists(sizes, max_size=3), max_size=3)


@settings(max_examples=30, deadline=None)
@given(shapes=shapes, has_files=st.booleans())
def test_any_message_survives_its_parcel(shapes: dict[str, list[int]], has_files: bool) -> None:
    assume_identity(run_id=1, node_id=1)
    records = {
        name: ArrayRecord({str(i): raw_array(os.urandom(size)) for i, size in enumerate(record_sizes)})
        for name, record_sizes in shapes.items()
    }
    message = message_to(FIRST_NODE_ID, **records)
    received = exchange_parcel(message, has_files)
    assert received.content == message.content
    assert {name: list(record) for name, record in received.content.array_records.items()} == {
        name: list(record) for name, record in records.items()
    }


def exchange_parcel(message: Message, has_files: bool) -> Message:
    """Send a message through a pipe of this process, with or without memory files."""
    ours, theirs = Pipe()
    files = MemoryFiles()
    parcel = encode_parcel(message, b"state")
    if has_files:
        files.hold(parcel.blobs())
    with ours, theirs:
        sender = threading.Thread(target=send_parcel, args=(ours, parcel, files))
        sender.start()
        received = receive_parcel(theirs, {})
        sender.join()
    files.clear()
    assert received.state == b"state"
    return decode_message(received)


def test_a_payload_that_comes_again_is_read_once() -> None:
    assume_identity(run_id=1, node_id=1)
    ours, theirs = Pipe()
    files, recent = MemoryFiles(), {}
    first, second = (
        encode_parcel(message_to(1, p=ArrayRecord({"a": raw_array(bytes([i]) * MEGABYTE)})), b"") for i in range(2)
    )
    received = []
    with ours, theirs:
        for parcel in (first, first, second):
            files.hold(parcel.blobs())
            send_parcel(ours, parcel, files)
            received.append(receive_parcel(theirs, recent).arrays["p", "a"])
    files.clear()
    assert received[0] is received[1]
    assert received[2] == second.arrays["p", "a"]
    assert list(recent.values()) == [received[2]]


def test_a_truncated_memory_file_is_refused() -> None:
    assume_identity(run_id=1, node_id=1)
    ours, theirs = Pipe()
    files = MemoryFiles()
    parcel = encode_parcel(message_to(1, p=ArrayRecord({"a": raw_array(bytes(MEGABYTE))})), b"")
    files.hold(parcel.blobs())
    handle = files.handle(parcel.arrays["p", "a"])
    assert handle is not None
    os.ftruncate(handle.fd, 1000)
    with ours, theirs:
        send_parcel(ours, parcel, files)
        with pytest.raises(WireError, match="expected 1048576 bytes, found 1000"):
            receive_parcel(theirs, {})
    files.clear()


def test_one_memory_file_serves_all_holders_of_one_object() -> None:
    files = MemoryFiles()
    blob, other = bytes(MEGABYTE), bytes(bytearray(MEGABYTE))
    before = len(open_fds())
    for _ in range(3):
        files.hold([blob, other, b"small"])
    assert len(open_fds()) == before
    assert files.handle(blob) == files.handle(blob)
    assert files.handle(blob) != files.handle(other)
    assert files.handle(b"small") is None
    assert len(open_fds()) == before + 2
    for _ in range(2):
        files.release([blob, other, b"small"])
    assert len(open_fds()) == before + 2
    files.release([blob, other, b"small"])
    assert len(open_fds()) == before
