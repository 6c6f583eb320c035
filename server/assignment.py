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
from conf.schema import AssignmentConf, SimulateConf
from fedofa.device.cost import LocalWork
from fedofa.device.energy import Chip, Energy
from fedofa.device.latency import Latency
from fedofa.device.memory import InferenceMemory, WorkingSet
from fedofa.device.models import BytesDown, Macs, Parameters, SubnetCostModel
from fedofa.device.operators import OperatorIndex
from fedofa.device.training import BytesUp, PlannedPlaces, RoundCosts
from fedofa.search.accuracy import AccuracyPredictor, ZeroCostProxy, load_predictor
from fedofa.search.archive import build_archive
from fedofa.search.fit import Fit, FitSearch, PlanOf
from fedofa.search.fleet import Demand, FleetSearch, Way
from fedofa.search.limits import Limit, Limits
from fedofa.search.planned import PlannedFleetSearch
from fedofa.supernet.base import Supernet
from fedofa.supernet.fixed import FAMILY
from fedofa.types.errors import ConfigError, InfeasibilityError
from server.fleet import Assignment, ClientInfo, FleetPlan

BY = ("auto", "search", "rule")
SHARED_LIMITS = (
    "inference_memory_mb", "sram_kb", "energy_mj", "bytes_up", "bytes_down", "macs", "parameters",
)  # fmt: skip
"""Limits on subnets that are the same for every device."""

_HEEDED = {**dict.fromkeys((*SHARED_LIMITS, "latency_ms", "predictor")), "link_probe_bytes": 0}
"""Settings that have no effect by rule, and what they are where they are not given."""

_Key = tuple[object, str, int]
"""Profile, device file and number of training examples: what a choice depends on."""


@dataclass
class FleetAssigner:
    """Assigns subnets to clients.

    Args:
        search: of the fleet.
        latency_ms: the most that a forward pass may take on any device; None: as long as it takes.
        latencies: what was measured, by the checksum of the device's file.
    """

    search: PlannedFleetSearch
    latency_ms: float | None
    latencies: dict[str, Latency] = field(default_factory=dict)
    _known: dict[_Key, Fit | InfeasibilityError] = field(init=False, default_factory=dict)

    @property
    def index(self) -> OperatorIndex:
        """Of the supernet, whose operators a latency table must have."""
        return self.search.search.index

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
            if not isinstance(outcome, Fit)
        }
        final = {**shared, **own}
        chosen = self._outcomes(final.values(), work_of, round_seconds)
        assignments, sitting_out = {}, {}
        for (client, _), outcome in zip(final.values(), chosen, strict=True):
            if isinstance(outcome, Fit):
                assignments[client.client_id] = Assignment(client, outcome)
            else:
                sitting_out[client.client_id] = str(outcome)
        return FleetPlan(assignments, sitting_out)

    def _outcomes(
        self,
        wanted: Iterable[tuple[ClientInfo, int]],
        work_of: Callable[[int], LocalWork],
        round_seconds: float,
    ) -> list[Fit | InfeasibilityError]:
        """The fits of clients as if they had so many examples; all that are not known yet in one search."""
        keys = {(client.profile, client.device, count): client for client, count in wanted}
        new = [key for key in keys if key not in self._known]
        demands = [
            Demand(keys[key].profile, work_of(key[2]), round_seconds, self.latency_ms, self.latencies.get(key[1]))
            for key in new
        ]
        self._known |= dict(zip(new, self.search.assign(demands), strict=True)) if new else {}
        return [self._known[client.profile, client.device, count] for client, count in wanted]


def assigned_by(conf: SimulateConf) -> str:
    """What assigns the subnets of a run: "search", or "rule", that of `search.fit`.

    Raises:
        ConfigError: when a search is asked for that the run cannot have, or a setting that only a search heeds.
    """
    by = conf.assignment.by
    if by not in BY:
        raise ConfigError(f"assignment.by: expected one of {list(BY)}, found {by!r}")
    obstacle = _obstacle(conf)
    if by == "search" and obstacle:
        raise ConfigError(f"assignment.by=search: {obstacle}. Give assignment.by=auto, or change that")
    if by == "search" or (by == "auto" and not obstacle):
        return "search"
    without_effect = [name for name, unset in _HEEDED.items() if getattr(conf.assignment, name) != unset]
    if without_effect:
        why = obstacle if by == "auto" else "found assignment.by=rule"
        raise ConfigError(f"assignment.{without_effect[0]}: only assigning by search heeds it; {why}")
    return "rule"


def _obstacle(conf: SimulateConf) -> str:
    """Why the run's subnets cannot be assigned by search; "" where they can."""
    if conf.shrinking.schedule != "none":
        return f"a shrinking schedule deals the subnets itself, found shrinking.schedule={conf.shrinking.schedule}"
    if conf.supernet["family"] == FAMILY:
        return f"supernet.family={FAMILY} has one network, there is nothing to choose from"
    return ""


def build_assigner(
    conf: AssignmentConf, supernet: Supernet, fits: FitSearch, *, micro_batch: int, wire_bytes: int
) -> FleetAssigner:
    """What assigns subnets by search.

    Args:
        fits: prices single subnets, under the run's plans.

    Raises:
        ConfigError: naming the setting that is out of range.
        CheckpointError: when the predictor cannot be read, or is of another space.
    """
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
    ways = [[_way(conf, index, plan_of, micro_batch, wire_bytes) for plan_of in group] for group in fits.plans]
    search = FleetSearch(build_archive(index, predictor, conf.archive_devices), predictor, ways)
    return FleetAssigner(PlannedFleetSearch(search, fits), conf.latency_ms)


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
