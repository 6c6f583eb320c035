"""The stream of messages: bounded, lazy, one attributed reply for each."""

import itertools

import pytest
from flwr.app import ConfigRecord, Error, Message, MessageType, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from google.protobuf.message import DecodeError

from fedofa.types.errors import ConfigError
from server.carrier import assume_identity
from server.stream import await_nodes, stream_replies


class ScriptedGrid:
    """Answers in batches, newest first; nodes in `silent` never, nodes in `forged` in another's name."""

    def __init__(self, *, batch=2, silent=(), forged=(), failing=(), unreachable=()):
        assume_identity(1, 0)
        self.batch, self.silent, self.forged, self.failing = batch, set(silent), set(forged), set(failing)
        self.unreachable = set(unreachable)
        self.open, self.most_open, self.counter = {}, 0, itertools.count()

    def push_messages(self, messages):
        ids = []
        for message in messages:
            if message.metadata.dst_node_id in self.unreachable:
                ids.append("" if message.metadata.dst_node_id % 2 else None)  # Flower's grids do either
                continue
            message_id = f"m{next(self.counter)}"
            message.metadata.__dict__["_message_id"] = message_id
            self.open[message_id] = message
            ids.append(message_id)
        self.most_open = max(self.most_open, len(self.open))
        return ids

    def pull_messages(self, message_ids):
        ready = [i for i in reversed(message_ids) if self.open[i].metadata.dst_node_id not in self.silent]
        return [self._reply(self.open.pop(message_id)) for message_id in ready[: self.batch]]

    def _reply(self, message):
        node = message.metadata.dst_node_id
        if node in self.failing:
            error = Message(Error(2, "broken"), reply_to=message)
            error.metadata.__dict__["_src_node_id"] = 1
            return error
        reply = Message(RecordDict({"x": ConfigRecord({"node": node})}), reply_to=message)
        if node in self.forged:
            data = {
                key: getattr(reply.metadata, key)
                for key in (
                    "run_id",
                    "message_id",
                    "dst_node_id",
                    "reply_to_message_id",
                    "group_id",
                    "created_at",
                    "ttl",
                    "message_type",
                )
            }
            return make_message(metadata=Metadata(src_node_id=999, **data), content=reply.content)
        return reply


def questions(count, taken):
    for node in range(10, 10 + count):
        taken.append(node)
        yield Message(RecordDict(), node, MessageType.QUERY)


@pytest.mark.parametrize("max_in_flight", [1, 3, 50])
def test_every_message_gets_one_reply_and_few_are_out(max_in_flight):
    grid, taken, most_ahead = ScriptedGrid(), [], 0
    replies = []
    for reply in stream_replies(grid, questions(20, taken), max_in_flight=max_in_flight, reply_seconds=60):
        replies.append(reply)
        most_ahead = max(most_ahead, len(taken) - len(replies) + 1)
    assert sorted(reply.metadata.src_node_id for reply in replies) == list(range(10, 30))
    assert all(reply.content["x"]["node"] == reply.metadata.src_node_id for reply in replies)
    assert grid.most_open <= max_in_flight
    assert most_ahead <= max_in_flight + 1, "messages are made only when there is room"


def test_failures_are_attributed_to_the_node_that_was_asked():
    grid = ScriptedGrid(batch=1, silent=[11], forged=[12], failing=[13])
    replies = {
        reply.metadata.src_node_id: reply
        for reply in stream_replies(grid, questions(5, []), max_in_flight=5, reply_seconds=0.3)
    }
    assert set(replies) == {10, 11, 12, 13, 14}
    assert replies[10].has_content()
    assert "no answer within 0.3 s" in replies[11].error.reason
    assert "node 999 answered" in replies[12].error.reason
    assert replies[13].error.reason == "broken"


def test_a_message_that_cannot_be_sent_is_a_failure_of_its_node():
    grid = ScriptedGrid(unreachable=[10, 11, 13])
    replies = list(stream_replies(grid, questions(4, []), max_in_flight=2, reply_seconds=60))
    assert {reply.metadata.src_node_id for reply in replies} == {10, 11, 12, 13}
    failed = {reply.metadata.src_node_id: reply.error.reason for reply in replies if reply.has_error()}
    assert set(failed) == {10, 11, 13}
    assert all("could not be sent" in reason for reason in failed.values())


class GarblingGrid(ScriptedGrid):
    """Some nodes' answers cannot be decoded, others' are to another message; asked together they would all be lost."""

    def pull_messages(self, message_ids):
        nodes = {self.open[message_id].metadata.dst_node_id for message_id in message_ids}
        if 11 in nodes:
            raise DecodeError("not a protobuf\nmessage")
        replies = super().pull_messages(message_ids)
        for reply in replies:
            if reply.metadata.src_node_id == 12:
                reply.metadata.__dict__["_reply_to_message_id"] = "m0"
        return replies


def test_an_answer_that_is_none_costs_only_its_client():
    replies = {
        reply.metadata.src_node_id: reply
        for reply in stream_replies(GarblingGrid(), questions(5, []), max_in_flight=5, reply_seconds=60)
    }
    assert set(replies) == {10, 11, 12, 13, 14}
    assert replies[11].error.reason == "its answer cannot be read: DecodeError: not a protobuf message"
    assert replies[12].error.reason == "its answer is to another message"
    assert all(replies[node].has_content() for node in (10, 13, 14))


def test_a_link_that_fails_is_no_clients_fault():
    class DeadGrid(ScriptedGrid):
        def pull_messages(self, message_ids):
            raise ConnectionError("the link is down")

    with pytest.raises(ConnectionError, match="the link is down"):
        list(stream_replies(DeadGrid(), questions(2, []), max_in_flight=2, reply_seconds=60))


class GatheringGrid:
    """A grid with one more node at every look."""

    def __init__(self, most: int) -> None:
        self.nodes, self.most, self.looks = [], most, 0

    def get_node_ids(self):
        self.looks += 1
        if len(self.nodes) < self.most:
            self.nodes.append(100 + len(self.nodes))
        return list(self.nodes)


def test_a_run_waits_for_the_nodes_that_are_to_come_and_no_longer():
    grid = GatheringGrid(most=5)
    assert await_nodes(grid, expected=3, join_seconds=60) == [100, 101, 102]
    assert grid.looks == 3


def test_a_run_goes_on_with_the_nodes_that_are_there():
    assert await_nodes(GatheringGrid(most=2), expected=3, join_seconds=1) == [100, 101]
    with pytest.raises(ConfigError, match=r"no client joined within 0 s, 3 were expected"):
        await_nodes(GatheringGrid(most=0), expected=3, join_seconds=0)


def test_no_messages_no_replies():
    assert list(stream_replies(ScriptedGrid(), iter(()), max_in_flight=3, reply_seconds=1)) == []
