"""Federated calibration: clients sum up what a subnet's batch norms see of their images, the server adds the sums."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from flwr.app import Message
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from clients.records import packed_buffer, packed_content
from fedofa.device.cost import forward_bytes
from fedofa.evaluation.calibration import CALIBRATION_BATCH, merge_sums
from fedofa.types.errors import DeltaError, QuorumError, WireError
from fedofa.types.space import SubnetConfig
from fedofa.types.state import SharedState
from fedofa.types.statistics import StatisticSums
from fedofa.update.exchange import decode_statistics
from fedofa.update.verification import StatisticsExpectation, verify_statistics
from server.compiled import COMPILED
from server.fleet import ClientInfo
from server.planning import Planner
from server.rounds import RoundRecord
from server.scoring import Scorer

CALIBRATE = "query.calibrate"
"""Type of the message that asks a client for statistics."""

Exchange = Callable[[Iterable[Message]], Iterator[Message]]
PayloadOf = Callable[[int, SharedState, SubnetConfig], bytes]
"""From round, state and subnet to the packed task that carries the subnet."""


@dataclass(frozen=True, slots=True)
class FleetCalibration:
    """Asks clients for the statistics of subnets.

    Args:
        scorer: knows the supernet and how images enter it.
        planner: knows what a client's device can hold.
        payload_of: packs a subnet.
    """

    scorer: Scorer
    planner: Planner
    payload_of: PayloadOf

    def sums(
        self,
        exchange: Exchange,
        server_round: int,
        state: SharedState,
        subnets: Iterable[SubnetConfig],
        clients: Iterable[ClientInfo],
        record: RoundRecord,
    ) -> dict[SubnetConfig, StatisticSums]:
        """The merged statistics of each subnet.

        They are added in the order of client ids, so that the result does not depend on who answered first.

        Args:
            exchange: sends messages and yields the replies.
            clients: are asked; for each subnet those whose engine and memory can.
            record: its bytes and calibration failures are added to.

        Raises:
            QuorumError: when nobody gave usable statistics of a subnet.
        """
        merged = {}
        able = sorted(clients, key=lambda client: client.client_id)
        for subnet in dict.fromkeys(subnets):
            asked = {client.node_id: client for client in able if self._can_observe(subnet, client)}
            parts = self._ask(exchange, server_round, state, subnet, asked, record)
            if not parts:
                why = next(iter(record.calibration_failures.values()), "no available client can hold it")
                raise QuorumError(
                    f"round {server_round}: none of {len(able)} clients gave usable statistics of subnet "
                    f"{subnet.digest()}: {why}; set evaluation.calibration=server to use the server's images"
                )
            merged[subnet] = merge_sums(parts[name] for name in sorted(parts))
        return merged

    def _ask(
        self,
        exchange: Exchange,
        server_round: int,
        state: SharedState,
        subnet: SubnetConfig,
        asked: Mapping[int, ClientInfo],
        record: RoundRecord,
    ) -> dict[str, StatisticSums]:
        """Client id -> its verified statistics; whoever's are refused is left out and named in the record."""
        payload = self.payload_of(server_round, state, subnet)
        norms = norm_sizes(self.scorer, subnet)
        record.bytes_down += len(payload) * len(asked)
        messages = (Message(packed_content(payload), node, CALIBRATE, group_id=str(server_round)) for node in asked)
        parts = {}
        for reply in exchange(messages):
            client = asked[reply.metadata.src_node_id]
            wanted = StatisticsExpectation(
                client.client_id, server_round, state.version, subnet, client.num_train, norms
            )
            try:
                parts[client.client_id] = self._verified(reply, wanted, record)
            except (WireError, DeltaError) as error:
                record.calibration_failures[client.client_id] = str(error)
        return parts

    @staticmethod
    def _verified(reply: Message, wanted: StatisticsExpectation, record: RoundRecord) -> StatisticSums:
        if reply.has_error():
            raise DeltaError(f"client {wanted.client_id!r} failed: {reply.error.reason}")
        buffer = packed_buffer(reply)
        record.bytes_up += len(buffer)
        statistics = decode_statistics(buffer)
        verify_statistics(statistics, wanted)
        return statistics.sums

    def _can_observe(self, subnet: SubnetConfig, client: ClientInfo) -> bool:
        """Whether a client can observe batch norms on batches, and its memory holds the subnet's forward pass."""
        if client.profile.engine == COMPILED:
            return False
        blocks = self.scorer.supernet.block_costs(subnet)
        work = replace(self.planner.work(client.num_train), batch_size=CALIBRATION_BATCH)
        return forward_bytes(blocks, work) <= client.profile.memory_bytes


@torch.no_grad()
def norm_sizes(scorer: Scorer, subnet: SubnetConfig) -> dict[str, tuple[int, int]]:
    """Name of each batch norm of a subnet -> its channels, and the positions of an example there."""
    skeleton = scorer.supernet.skeleton(subnet).eval()
    sizes: dict[str, tuple[int, int]] = {}

    def observe(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda module, inputs: sizes.update({name: (inputs[0].shape[1], inputs[0][0, 0].numel())})

    for name, module in skeleton.named_modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(observe(name))
    skeleton(torch.empty(scorer.input_shape(subnet), device="meta"))
    return sizes
