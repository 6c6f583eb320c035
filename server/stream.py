"""A bounded stream of messages and replies: few clients out at a time, each reply handed on and forgotten."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

_IDLE_SECONDS = 0.05


def stream_replies(
    grid: Grid, messages: Iterable[Message], *, max_in_flight: int, reply_seconds: float
) -> Iterator[Message]:
    """Send the messages and yield one reply for each, in order of arrival.

    Messages are taken from the iterable only when there is room for them, so that lazily encoded payloads exist once.
    Whatever happens to a client, there is a reply whose `src_node_id` is the node that was asked: a reply in another
    node's name and a silence of `reply_seconds` both become error replies.

    Args:
        max_in_flight: messages that are out at a time.
        reply_seconds: how long to wait for a reply.
    """
    source = iter(messages)
    out: dict[str, tuple[Message, float]] = {}
    exhausted = False
    while out or not exhausted:
        while not exhausted and len(out) < max_in_flight:
            message = next(source, None)
            if message is None:
                exhausted = True
            else:
                (message_id,) = grid.push_messages([message])
                out[message_id] = (_without_content(message), time.monotonic() + reply_seconds)
        if not out:
            return
        replies = deque(grid.pull_messages(list(out)))
        if not replies:
            time.sleep(_IDLE_SECONDS)
        while replies:
            asked, _ = out.pop(replies[0].metadata.reply_to_message_id)
            yield _attributed(replies.popleft(), asked)  # no reference stays here: the reply may go once it is used
        for message_id in [key for key, (_, deadline) in out.items() if time.monotonic() > deadline]:
            asked, _ = out.pop(message_id)
            yield _failure(asked, ErrorCode.NODE_UNAVAILABLE, f"no answer within {reply_seconds:g} s")


def _attributed(reply: Message, asked: Message) -> Message:
    node_id = asked.metadata.dst_node_id
    if reply.has_error():
        return _failure(asked, reply.error.code, reply.error.reason or "no reason given")
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
