"""Assigning by search: every client's subnet from its profile and latency table, through one archive of good subnets.

Clients with equal devices and data share one choice, which is kept for as long as the search is: it knows one supernet
and one predictor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from clients.device import MAX_PROBE_BYTES
from conf.schema import AssignmentConf
from fedofa.device.cost import AnalyticCostModel, LocalWork
from fedofa.device.energy import Chip, Energy
from fedofa.device.latency import Latency
from fedofa.device.memory import InferenceMemory, WorkingSet
from fedofa.device.models import BytesDown, Macs, Parameters, SubnetCostModel
from fedofa.device.operators import OperatorIndex
from fedofa.device.training import BytesUp, PlannedPlaces, RoundCosts
from fedofa.search.accuracy import AccuracyPredictor, ZeroCostProxy, load_predictor
from fedofa.search.archive import build_archive
from fedofa.search.fit import Fit, PlanOf
from fedofa.search.fleet import Choice, Demand, FleetSearch, Way
from fedofa.search.limits import Limit, Limits
from fedofa.supernet.base import Supernet
from fedofa.types.errors import ConfigError, InfeasibilityError
from server.fleet import Assignment, ClientInfo, FleetPlan

BY = ("rule", "search")
SHARED_LIMITS = (
    "inference_memory_mb", "sram_kb", "energy_mj", "bytes_up", "bytes_down", "macs", "parameters",
)  # fmt: skip
"""Limits on subnets that are the same for every device."""

_Key = tuple[object, str, int]
"""Profile, device file and number of training examples: what a choice depends on."""


@dataclass
class FleetAssigner:
    """Assigns subnets to clients.

    Args:
        search: of the fleet.
        supernet: for the costs.
        plans: as the search's ways have them.
        latency_ms: the most that a forward pass may take on any device; None: as long as it takes.
        latencies: what was measured, by the checksum of the device's file.
    """

    search: FleetSearch
    supernet: Supernet
    plans: Sequence[Sequence[PlanOf]]
    latency_ms: float | None
    latencies: dict[str, Latency] = field(default_factory=dict)
    _known: dict[_Key, Choice | InfeasibilityError] = field(init=False, default_factory=dict)

    def plan(
        self, clients: Sequence[ClientInfo], work_of: Callable[[int], LocalWork], round_seconds: float
    ) -> FleetPlan:
        """Every client's subnet and plan, and who sits out and why.

        Clients with equal devices share one choice, made for the largest data set among them, so that they share a
        payload; where that does not fit, those with equally many examples share one.
        """
        most: dict[tuple[object, str], int] = {}
        for client in clients:
            key = client.profile, client.device
            most[key] = max(most.get(key, 0), client.num_train)
        shared = {client.client_id: (client, most[client.profile, client.device]) for client in clients}
        outcomes = self._outcomes(shared.values(), work_of, round_seconds)
        own = {
            name: (client, client.num_train)
            for (name, (client, _)), outcome in zip(shared.items(), outcomes, strict=True)
            if not isinstance(outcome, Choice)
        }
        final = {**shared, **own}
        chosen = self._outcomes(final.values(), work_of, round_seconds)
        fits: dict[_Key, Fit] = {}
        assignments, sitting_out = {}, {}
        for (client, count), outcome in zip(final.values(), chosen, strict=True):
            key = client.profile, client.device, count
            if isinstance(outcome, InfeasibilityError):
                sitting_out[client.client_id] = str(outcome)
                continue
            if key not in fits:
                fits[key] = self._fit(outcome, client, work_of(count))
            assignments[client.client_id] = Assignment(client, fits[key])
        return FleetPlan(assignments, sitting_out)

    def _outcomes(
        self,
        wanted: Iterable[tuple[ClientInfo, int]],
        work_of: Callable[[int], LocalWork],
        round_seconds: float,
    ) -> list[Choice | InfeasibilityError]:
        """The choices for clients as if they had so many examples; all that are not known yet in one search."""
        keys = {(client.profile, client.device, count): client for client, count in wanted}
        new = [key for key in keys if key not in self._known]
        demands = [
            Demand(keys[key].profile, work_of(key[2]), round_seconds, self.latency_ms, self.latencies.get(key[1]))
            for key in new
        ]
        self._known |= dict(zip(new, self.search.assign(demands), strict=True)) if new else {}
        return [self._known[client.profile, client.device, count] for client, count in wanted]

    def _fit(self, choice: Choice, client: ClientInfo, work: LocalWork) -> Fit:
        group, way = choice.way
        subnet = self.search.index.encoding.subnet(choice.row)
        blocks = self.supernet.block_costs(subnet)
        plan = self.plans[group][way](blocks)
        cost = AnalyticCostModel().cost(blocks, plan, client.profile, work)
        binding = f"round time ({cost.longest_part})" if choice.binding == "round time" else choice.binding
        return Fit(subnet, plan, cost, binding)


def build_assigner(
    conf: AssignmentConf, supernet: Supernet, plans: Sequence[Sequence[PlanOf]], *, micro_batch: int, wire_bytes: int
) -> FleetAssigner | None:
    """What assigns subnets by search; None where the rule of `search.fit` does.

    Raises:
        ConfigError: naming the setting that is out of range, or needs the search.
        CheckpointError: when the predictor cannot be read, or is of another space.
    """
    stated = {name: getattr(conf, name) for name in (*SHARED_LIMITS, "latency_ms")}
    if conf.by not in BY:
        raise ConfigError(f"assignment.by: expected one of {list(BY)}, found {conf.by!r}")
    if conf.by == "rule":
        needing = [name for name, value in {**stated, "predictor": conf.predictor}.items() if value is not None]
        if needing or conf.link_probe_bytes:
            names = [*needing, *(["link_probe_bytes"] if conf.link_probe_bytes else [])]
            raise ConfigError(f"assignment.{names[0]} has no effect by rule; give assignment.by=search as well")
        return None
    if not 0 <= conf.link_probe_bytes <= MAX_PROBE_BYTES:
        raise ConfigError(
            f"assignment.link_probe_bytes: expected 0 to {MAX_PROBE_BYTES:,}, found {conf.link_probe_bytes!r}"
        )
    if conf.latency_ms is not None and not 0 < conf.latency_ms < float("inf"):
        raise ConfigError(f"assignment.latency_ms: expected a positive finite number, found {conf.latency_ms!r}")
    index = OperatorIndex.of(supernet)
    predictor: AccuracyPredictor = ZeroCostProxy(index)
    if conf.predictor:
        predictor = load_predictor(Path(conf.predictor), index.encoding.space)
    ways = [[_way(conf, index, plan_of, micro_batch, wire_bytes) for plan_of in group] for group in plans]
    search = FleetSearch(build_archive(index, predictor, conf.archive_devices), predictor, ways)
    return FleetAssigner(search, supernet, plans, conf.latency_ms)


def _way(conf: AssignmentConf, index: OperatorIndex, plan_of: PlanOf, micro_batch: int, wire_bytes: int) -> Way:
    plans = PlannedPlaces(index, plan_of)
    chip = Chip(**asdict(conf.chip))
    builders: Mapping[str, Callable[[], SubnetCostModel]] = {
        "inference_memory_mb": partial(InferenceMemory, index),
        "sram_kb": partial(WorkingSet, index, chip.activation_bits),
        "energy_mj": partial(Energy, index, chip),
        "bytes_up": partial(BytesUp, plans, wire_bytes),
        "bytes_down": partial(BytesDown, index, wire_bytes),
        "macs": partial(Macs, index),
        "parameters": partial(Parameters, index),
    }
    stated = {name: getattr(conf, name) for name in SHARED_LIMITS if getattr(conf, name) is not None}
    limits = tuple(Limit(builders[name](), most) for name, most in stated.items())
    return Way(RoundCosts(plans), Limits(limits), micro_batch)
