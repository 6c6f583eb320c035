"""Pairs of a subnet and its accuracy from a federation: random subnets, scored by a cohort on its own test examples.

Every subnet of a round goes to the same clients, so that a round's accuracies differ by the subnets and not by who
scored them. Their mean is weighted by examples, and no client weighs more than twice the median: one that lies among n
moves a subnet's accuracy by at most about 2/n. (A median over clients would be safer still; but most hold a handful of
examples, of which a median makes a few coarse steps.)
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Message, MessageType

from clients.records import message_metrics, packed_content
from fedofa.device.cost import forward_bytes
from fedofa.types.errors import DeltaError
from fedofa.types.space import SubnetConfig
from server.checkpoint import replace_file
from server.fleet import ClientInfo
from server.planning import Planner
from server.rounds import RoundRecord
from server.scoring import Scorer

FILE = "pairs.jsonl"
_HEAVIEST = 2.0
"""Times the median's weight that a client weighs at the most."""

Exchange = Callable[[Iterable[Message]], Iterator[Message]]


@dataclass(frozen=True, slots=True)
class Pair:
    """A subnet and the accuracy that clients saw.

    Args:
        round: after which it was scored.
        subnet: which was scored.
        accuracy: in [0, 1].
        num_examples, num_clients: behind it.
    """

    round: int
    subnet: SubnetConfig
    accuracy: float
    num_examples: int
    num_clients: int

    def to_json(self) -> dict[str, Any]:
        """Its line in `pairs.jsonl`."""
        return {
            "round": self.round,
            "subnet": self.subnet.to_json(),
            "accuracy": self.accuracy,
            "num_examples": self.num_examples,
            "num_clients": self.num_clients,
        }


class PairLog:
    """`pairs.jsonl` of one run, replaced as a whole after each round that adds to it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, pairs: Sequence[Pair]) -> None:
        """Add a round's pairs."""
        self._write([*self._lines(), *(json.dumps(pair.to_json()) for pair in pairs)])

    def cut(self, last_round: int) -> None:
        """Drop the pairs of later rounds, which a run that goes on from there scores anew."""
        lines = self._lines()
        kept = [line for line in lines if json.loads(line)["round"] <= last_round]
        if len(kept) < len(lines):
            self._write(kept)

    def _lines(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path.exists() else []

    def _write(self, lines: Sequence[str]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, "".join(f"{line}\n" for line in lines).encode())


@dataclass(frozen=True, slots=True)
class PairGathering:
    """Asks clients how accurate subnets are.

    Args:
        scorer: knows the supernet.
        planner: knows what a client's device can hold.
        payload_of: packs a subnet, its batch-norm statistics calibrated.
    """

    scorer: Scorer
    planner: Planner
    payload_of: Callable[[SubnetConfig], bytes]

    def gather(
        self, exchange: Exchange, subnets: Iterable[SubnetConfig], clients: Sequence[ClientInfo], record: RoundRecord
    ) -> list[Pair]:
        """The pairs of the subnets that somebody scored.

        Args:
            exchange: sends messages and yields the replies.
            clients: are asked; for each subnet those that hold test examples and whose memory holds it.
            record: its bytes and pair failures are added to.
        """
        pairs = []
        for subnet in dict.fromkeys(subnets):
            asked = {client.node_id: client for client in clients if client.num_test and self._fits(subnet, client)}
            accuracies = self._ask(exchange, subnet, asked, record) if asked else {}
            if accuracies:
                counts = {client.client_id: client.num_test for client in asked.values()}
                weights = {name: counts[name] for name in accuracies}
                pairs.append(
                    Pair(record.round, subnet, robust_mean(accuracies, weights), sum(weights.values()), len(weights))
                )
        return pairs

    def _ask(
        self, exchange: Exchange, subnet: SubnetConfig, asked: Mapping[int, ClientInfo], record: RoundRecord
    ) -> dict[str, float]:
        """Client id -> accuracy; whoever's answer cannot be right is left out and named in the record."""
        payload = self.payload_of(subnet)
        record.bytes_down += len(payload) * len(asked)
        group = str(record.round)
        messages = (Message(packed_content(payload), node, MessageType.EVALUATE, group_id=group) for node in asked)
        accuracies = {}
        for reply in exchange(messages):
            client = asked[reply.metadata.src_node_id]
            try:
                accuracies[client.client_id] = stated_accuracy(reply, client)
            except DeltaError as error:
                record.pair_failures[client.client_id] = str(error)
        return accuracies

    def _fits(self, subnet: SubnetConfig, client: ClientInfo) -> bool:
        blocks = self.scorer.supernet.block_costs(subnet)
        return forward_bytes(blocks, self.planner.work(client.num_test)) <= client.profile.memory_bytes


def stated_accuracy(reply: Message, client: ClientInfo) -> float:
    """The accuracy that a client states.

    Raises:
        DeltaError: when it is no accuracy, or of another number of examples than the client holds.
    """
    if reply.has_error():
        raise DeltaError(f"client {client.client_id!r} failed: {reply.error.reason}")
    metrics = message_metrics(reply)
    accuracy, count = metrics.get("accuracy"), metrics.get("num_examples")
    if accuracy is None or not 0 <= accuracy <= 1:
        raise DeltaError(f"client {client.client_id!r}: expected an accuracy in [0, 1], found {accuracy!r}")
    if count != client.num_test:
        raise DeltaError(
            f"client {client.client_id!r}: expected the accuracy on its {client.num_test} test examples, found "
            f"{count!r} examples"
        )
    return accuracy


def robust_mean(values: Mapping[str, float], weights: Mapping[str, int]) -> float:
    """The weighted mean of clients' values, no weight being more than twice the median one.

    Added in the order of client ids, so that it does not depend on who answered first.
    """
    most = _HEAVIEST * statistics.median(weights.values())
    limited = {name: min(weights[name], most) for name in sorted(values)}
    return sum(values[name] * weight for name, weight in limited.items()) / sum(limited.values())
