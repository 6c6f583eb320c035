"""A bounded stream of messages and replies: few clients out at a time, each reply handed on and forgotten."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from google.protobuf.message import DecodeError

from fedofa.types.errors import ConfigError
from server.serving import one_line

_MAX_REASON = 400
"""Characters that are kept of a failure's reason: some runtimes send whole tracebacks."""
_IDLE_SECONDS = 0.25
"""Between two looks at a grid that answers at once; on a SuperLink each look is a request over HTTP a client."""
_TTL_SLACK_SECONDS = 10.0
"""How much later than this module other grids give a message up."""
_UNREADABLE = (DecodeError, ValueError, KeyError, TypeError, AttributeError, IndexError)
"""What decoding an answer that is none may raise; the link's own errors are others."""


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
    Whatever happens to a client, there is a reply whose `src_node_id` is the node that was asked: a message that
    cannot be sent, an answer that cannot be read or bears another's name, and a silence of `reply_seconds` all become
    error replies.

    Args:
        max_in_flight: messages that are out at a time.
        reply_seconds: how long to wait for a reply. A grid that enforces TTLs (`enforces_ttl`) knows better than this
            function when a client began, and ends those that take longer; elsewhere the TTL leaves this function the
            first word.
    """
    in_process = getattr(grid, "enforces_ttl", False)
    patience, ttl = (math.inf, reply_seconds) if in_process else (reply_seconds, reply_seconds + _TTL_SLACK_SECONDS)
    pull = _pull_together if in_process else _pull_apart
    source = iter(messages)
    out: dict[str, tuple[Message, float]] = {}
    exhausted = False
    while out or not exhausted:
        while not exhausted and len(out) < max_in_flight:
            message = next(source, None)
            if message is None:
                exhausted = True
                continue
            message.metadata.ttl = ttl
            message_id = next(iter(grid.push_messages([message])), None)
            if message_id:
                out[message_id] = (_without_content(message), time.monotonic() + patience)
            else:  # None, an empty string or nothing at all: how Flower's own grids say it
                yield _failure(message, ErrorCode.NODE_UNAVAILABLE, "the message could not be sent to its node")
        if not out:
            return
        replies = pull(grid, {message_id: asked for message_id, (asked, _) in out.items()})
        if not replies:
            time.sleep(_IDLE_SECONDS)
        while replies:
            asked, _ = out.pop(replies[0][0])
            yield _attributed(replies.popleft()[1], asked)  # no reference stays here: the reply may go once it is used
        for message_id in [key for key, (_, deadline) in out.items() if time.monotonic() > deadline]:
            asked, _ = out.pop(message_id)
            yield _failure(asked, ErrorCode.NODE_UNAVAILABLE, f"no answer within {reply_seconds:g} s")


def _pull_together(grid: Grid, asked: Mapping[str, Message]) -> deque[tuple[str, Message]]:
    """The replies that are there, by the id of the message that they answer."""
    return deque((reply.metadata.reply_to_message_id, reply) for reply in grid.pull_messages(list(asked)))


def _pull_apart(grid: Grid, asked: Mapping[str, Message]) -> deque[tuple[str, Message]]:
    """The same from a grid that decodes what clients sent: one by one, so that none takes another's answer with it."""
    found: deque[tuple[str, Message]] = deque()
    for message_id, message in asked.items():
        try:
            replies = list(grid.pull_messages([message_id]))
        except _UNREADABLE as error:
            replies = [_failure(message, ErrorCode.UNKNOWN, f"its answer cannot be read: {one_line(error)}")]
        for reply in replies[:1]:
            if reply.metadata.reply_to_message_id != message_id:
                reply = _failure(message, ErrorCode.UNKNOWN, "its answer is to another message")  # noqa: PLW2901
            found.append((message_id, reply))
    return found


def _attributed(reply: Message, asked: Message) -> Message:
    node_id = asked.metadata.dst_node_id
    if reply.has_error():
        reason = " ".join((reply.error.reason or "no reason given").split())
        return _failure(asked, reply.error.code, reason[:_MAX_REASON])
    if reply.metadata.src_node_id != node_id:
        reason = f"node {reply.metadata.src_node_id} answered a message for node {node_id}"
        return _failure(asked, ErrorCode.UNKNOWN, reason)
    return reply


def _failure(asked: Message, code: int, reason: str) -> Message:
    return Message(Error(code, reason), reply_to=asked)


def _without_content(message: Message) -> Message:
    """What an error reply needs of a message; the payload is not kept."""
    from flwr.app.message import remove_content_from_message

    return remove_content_from_message(message)
