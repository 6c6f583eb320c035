"""A bounded stream of messages and replies: few clients out at a time, each reply handed on and forgotten."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedofa.types.errors import ConfigError

_MAX_REASON = 400
"""Characters that are kept of a failure's reason: some runtimes send whole tracebacks."""
_IDLE_SECONDS = 0.1
"""Between two looks at a grid that answers at once and has nothing; on a SuperLink each look is a request over HTTP."""


def await_nodes(grid: Grid, expected: int, join_seconds: float) -> list[int]:
    """The ids of the grid's nodes as soon as `expected` of them are there, or after `join_seconds` those that are.

    Raises:
        ConfigError: when there is none.
    """
    deadline = time.monotonic() + join_seconds
    while len(nodes := list(grid.get_node_ids())) < expected and time.monotonic() < deadline:
        time.sleep(_IDLE_SECONDS)
    if not nodes:
        raise ConfigError(
            f"no client joined within {join_seconds:g} s, {expected} were expected (fleet.num_clients); "
            "look whether their nodes run and reach the server, or wait longer with fleet.join_seconds"
        )
    return nodes


def stream_replies(
    grid: Grid, messages: Iterable[Message], *, max_in_flight: int, reply_seconds: float
) -> Iterator[Message]:
    """Send the messages and yield one reply for each, in order of arrival.

    Messages are taken from the iterable only when there is room for them, so that lazily encoded payloads exist once.
    Whatever happens to a client, there is a reply whose `src_node_id` is the node that was asked: a reply in another
    node's name and a silence of `reply_seconds` both become error replies.

    Args:
        max_in_flight: messages that are out at a time.
        reply_seconds: how long to wait for a reply; it is the message's TTL. A grid that enforces TTLs (`enforces_ttl`)
            knows better than this function when a client began, and ends those that take longer.
    """
    patience = math.inf if getattr(grid, "enforces_ttl", False) else reply_seconds
    source = iter(messages)
    out: dict[str, tuple[Message, float]] = {}
    exhausted = False
    while out or not exhausted:
        while not exhausted and len(out) < max_in_flight:
            message = next(source, None)
            if message is None:
                exhausted = True
            else:
                message.metadata.ttl = reply_seconds
                message_id = next(iter(grid.push_messages([message])), None)
                if message_id is None:  # how Flower's own grids say it
                    yield _failure(message, ErrorCode.NODE_UNAVAILABLE, "the message could not be sent to its node")
                    continue
                out[message_id] = (_without_content(message), time.monotonic() + patience)
        if not out:
            return
        replies = deque(grid.pull_messages(list(out)))
        if not replies:
            time.sleep(_IDLE_SECONDS)
        while replies:
            asked, deadline = out.pop(replies[0].metadata.reply_to_message_id)
            if replies[0].has_error() and time.monotonic() > deadline:  # the runtime found out first
                replies[0] = _silence(asked, reply_seconds)
            yield _attributed(replies.popleft(), asked)  # no reference stays here: the reply may go once it is used
        for message_id in [key for key, (_, deadline) in out.items() if time.monotonic() > deadline]:
            asked, _ = out.pop(message_id)
            yield _silence(asked, reply_seconds)


def _attributed(reply: Message, asked: Message) -> Message:
    node_id = asked.metadata.dst_node_id
    if reply.has_error():
        reason = " ".join((reply.error.reason or "no reason given").split())
        return _failure(asked, reply.error.code, reason[:_MAX_REASON])
    if reply.metadata.src_node_id != node_id:
        reason = f"node {reply.metadata.src_node_id} answered a message for node {node_id}"
        return _failure(asked, ErrorCode.UNKNOWN, reason)
    return reply


def _silence(asked: Message, reply_seconds: float) -> Message:
    return _failure(asked, ErrorCode.NODE_UNAVAILABLE, f"no answer within {reply_seconds:g} s")


def _failure(asked: Message, code: int, reason: str) -> Message:
    return Message(Error(code, reason), reply_to=asked)


def _without_content(message: Message) -> Message:
    """What an error reply needs of a message; the payload is not kept."""
    from flwr.app.message import remove_content_from_message

    return remove_content_from_message(message)
