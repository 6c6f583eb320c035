"""Scores on the clients: each client's own subnet on its own test examples, summed up by device class."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

from flwr.app import Message, MessageType

from clients.records import message_metrics, packed_content
from server.fleet import Assignment


def scoring_messages(
    server_round: int, items: Iterable[Assignment], payload_of: Callable[[Assignment], bytes]
) -> Iterator[Message]:
    """One message a client, those with the same subnet and engine one after the other: they share a payload."""
    key, payload = None, b""
    for item in sorted(items, key=lambda item: (item.fit.subnet.choices, item.client.profile.engine)):
        if key != (item.fit.subnet, item.client.profile.engine):
            key, payload = (item.fit.subnet, item.client.profile.engine), payload_of(item)
        yield Message(packed_content(payload), item.client.node_id, MessageType.EVALUATE, group_id=str(server_round))


def accuracy_by_class(replies: Iterable[Message], asked: Mapping[int, Assignment]) -> dict[str, float]:
    """Device class -> accuracy, weighted by examples, of the clients that gave one.

    Args:
        replies: whose senders were asked.
        asked: by node.
    """
    sums: dict[str, list[int]] = {}
    for reply in replies:
        client = asked[reply.metadata.src_node_id].client
        accuracy = math.nan if reply.has_error() else message_metrics(reply).get("accuracy", math.nan)
        if 0 <= accuracy <= 1:
            total = sums.setdefault(client.profile.device_class, [0, 0])
            total[0] += round(accuracy * client.num_test)
            total[1] += client.num_test
    return {name: right / count for name, (right, count) in sorted(sums.items())}
