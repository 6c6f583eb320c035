"""Clients introduce themselves: what they state is checked, and whoever states something unfit takes no part."""

from __future__ import annotations

import re
from collections.abc import Iterable

from flwr.app import Message

from clients.records import message_facts
from fedofa.types.device import NAME, DeviceProfile
from fedofa.types.errors import ConfigError, DeltaError, WireError
from server.fleet import ClientInfo, distinct_clients

MAX_EXAMPLES = 10**7
"""Examples that a client may state; those for training are its weight in the fold."""
_CHECKSUM = re.compile(r"([0-9a-f]{32})?")
_RESERVED = ("largest", "smallest", "uniform")
"""Names of watched subnets, which no device class may take."""


def enrolled(answers: Iterable[Message]) -> tuple[list[ClientInfo], dict[str, str]]:
    """The clients by id, and of the nodes that take no part why.

    Raises:
        ConfigError: when nobody is left.
    """
    clients, refused = [], {}
    for answer in answers:
        try:
            clients.append(client_info(answer))
        except DeltaError as error:
            refused[f"node {answer.metadata.src_node_id}"] = str(error)
    return distinct_clients(clients, refused)


def client_info(answer: Message) -> ClientInfo:
    """A client's introduction.

    Raises:
        DeltaError: saying why it is not taken.
    """
    if answer.has_error():
        raise DeltaError(f"did not introduce itself: {answer.error.reason}")
    try:
        facts = message_facts(answer)
        profile = DeviceProfile.from_json(facts["profile"])
        client_id, sizes = facts["client_id"], (facts["num_train"], facts["num_test"])
        device = facts.get("device", "")
    except (WireError, ConfigError, KeyError, TypeError) as error:
        raise DeltaError(f"its introduction is not understood: {error}") from error
    for name in (client_id, profile.device_class):
        if not isinstance(name, str) or not NAME.fullmatch(name) or name in _RESERVED:
            raise DeltaError(f"{name!r:.80} is not a name for a client or a device class")
    for size, least in zip(sizes, (1, 0), strict=True):
        if not isinstance(size, int) or isinstance(size, bool) or not least <= size <= MAX_EXAMPLES:
            raise DeltaError(f"states {size!r:.80} examples; expected {least} to {MAX_EXAMPLES:,}")
    if not isinstance(device, str) or not _CHECKSUM.fullmatch(device):
        raise DeltaError(f"{device!r:.80} is not a checksum of a device profile")
    return ClientInfo(answer.metadata.src_node_id, client_id, profile, *sizes, device)
