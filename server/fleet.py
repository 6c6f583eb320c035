"""Who takes part and with what: every client's subnet and plan from its device, and the cohort of a round."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np

from fedofa.device.cost import LocalWork
from fedofa.search.fit import Budgets, Fit, FitSearch, capacity
from fedofa.supernet.base import Supernet
from fedofa.types.device import DeviceProfile
from fedofa.types.errors import ConfigError, InfeasibilityError
from fedofa.types.space import SubnetConfig
from fedofa.types.state import SharedState


@dataclass(frozen=True, slots=True)
class ClientInfo:
    """A client as it introduced itself, and the Flower node that it sits behind in this run."""

    node_id: int
    client_id: str
    profile: DeviceProfile
    num_train: int
    num_test: int
    device: str = ""  # checksum of the file that says what was measured on it; "" where there is none


@dataclass(frozen=True, slots=True)
class Assignment:
    """What one client trains, and the frozen subnet that teaches it, where there is one."""

    client: ClientInfo
    fit: Fit
    teacher: SubnetConfig | None = None


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """The fleet's assignments, by client id, and who sits out and why."""

    assignments: Mapping[str, Assignment]
    sitting_out: Mapping[str, str]

    def classes(self) -> dict[str, tuple[Fit, int]]:
        """Device class -> the fit that most of its clients have, and how many clients the class has."""
        fits: dict[str, list[Fit]] = defaultdict(list)
        for assignment in self.assignments.values():
            fits[assignment.client.profile.device_class].append(assignment.fit)
        common = {}
        for name in sorted(fits):
            (subnet, _), *_ = Counter(fit.subnet for fit in fits[name]).most_common(1)
            common[name] = (next(fit for fit in fits[name] if fit.subnet == subnet), len(fits[name]))
        return common

    def digest(self) -> str:
        """16 hex digits over the clients that take part: ids, devices and data sizes; not over nodes."""
        clients = [self.assignments[name].client for name in sorted(self.assignments)]
        rows = [
            [
                item.client_id,
                item.profile.to_json(),
                item.num_train,
                item.num_test,
                *([item.device] * bool(item.device)),
            ]
            for item in clients
        ]
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]

    def without(self, clients: Collection[str]) -> FleetPlan:
        """The plan of the other clients; of all where there are no others."""
        others = {name: item for name, item in self.assignments.items() if name not in clients}
        return FleetPlan(others or self.assignments, self.sitting_out)

    def weakest(self) -> Fit:
        """The fit of least capacity in the fleet."""
        return min((item.fit for item in self.assignments.values()), key=lambda fit: capacity(fit.cost))


def plan_fleet(
    clients: Sequence[ClientInfo], search: FitSearch, work_of: Callable[[int], LocalWork], round_seconds: float
) -> FleetPlan:
    """Give every client the best subnet and plan that its device can train.

    Clients with equal profiles share one search, made for the largest data set among them; where that does not fit,
    those with equally many examples share one.

    Args:
        work_of: local work from the number of training examples.
        round_seconds: a device's budget for one round.
    """
    groups: dict[DeviceProfile, list[ClientInfo]] = defaultdict(list)
    for client in clients:
        groups[client.profile].append(client)
    assignments, sitting_out = {}, {}
    for profile, members in groups.items():
        budgets = Budgets(profile.memory_bytes, round_seconds)
        outcome_of = cache(partial(_fit_or_reason, search, work_of, profile, budgets))
        shared = outcome_of(max(client.num_train for client in members))
        for client in members:
            outcome = shared if isinstance(shared, Fit) else outcome_of(client.num_train)
            if isinstance(outcome, Fit):
                assignments[client.client_id] = Assignment(client, outcome)
            else:
                sitting_out[client.client_id] = str(outcome)
    return FleetPlan(assignments, sitting_out)


def _fit_or_reason(
    search: FitSearch,
    work_of: Callable[[int], LocalWork],
    profile: DeviceProfile,
    budgets: Budgets,
    num_train: int,
) -> Fit | InfeasibilityError:
    try:
        return search.best_fit(profile, work_of(num_train), budgets)
    except InfeasibilityError as error:
        return error


def plan_uniform(plan: FleetPlan, fit: Fit, fit_of: Callable[[ClientInfo], Fit | None]) -> FleetPlan:
    """The same fleet with one subnet for everybody: ordinary federated averaging.

    Args:
        fit: the subnet and its plan on the weakest device.
        fit_of: gives the fit of that subnet for a client, whose device may not need to recompute.
    """
    everybody = {name: replace(item, fit=fit_of(item.client) or fit) for name, item in plan.assignments.items()}
    return FleetPlan(everybody, plan.sitting_out)


def draw_cohort(
    plan: FleetPlan,
    clients_per_round: int,
    smallest: Callable[[ClientInfo], Fit | None] | None,
    rng: np.random.Generator,
) -> list[Assignment]:
    """The clients of one round, drawn from those that are available, the strongest and the smallest subnet among them.

    Sandwich rule: the cohort's strongest client trains the largest subnet that any of its devices can; its weakest
    trains the smallest subnet of the space (where it is not alone).

    Args:
        smallest: gives the fit of the space's smallest subnet for a client, None where it does not fit; without it
            the sandwich rule is off.
        rng: draws availability, then the cohort.
    """
    everybody = [plan.assignments[name] for name in sorted(plan.assignments)]
    awake = rng.random(len(everybody))
    available = [item for item, draw in zip(everybody, awake, strict=True) if draw < item.client.profile.availability]
    chosen = rng.permutation(len(available))[:clients_per_round]
    cohort = [available[index] for index in sorted(chosen)]
    if smallest is not None and len(cohort) > 1:
        weakest = min(range(len(cohort)), key=lambda index: capacity(cohort[index].fit.cost))
        fit = smallest(cohort[weakest].client)
        if fit is not None:
            cohort[weakest] = replace(cohort[weakest], fit=fit)
    return cohort


def untrainable(supernet: Supernet, state: SharedState, fits: Iterable[Fit]) -> dict[str, float]:
    """Shared tensor -> share of its coordinates that none of the fits trains; tensors trained whole are left out.

    Kernel matrices and batch-norm statistics are not trained by design and not listed.
    """
    reached: dict[str, np.ndarray] = {}
    seen: set[tuple[SubnetConfig, str]] = set()
    for fit in fits:
        plan, key = fit.plan, (fit.subnet, fit.plan.digest())
        if key in seen:
            continue
        seen.add(key)
        slices = supernet.slice_map(fit.subnet, plan.parametrised)
        for name in plan.changes:
            part = slices[name].leading(plan.part_shape(name, slices[name].shape))
            mask = part.reach(state.tensors)
            reached[name] = reached[name] | mask if name in reached else mask
    everything = supernet.slice_map(supernet.space.largest()).trainable
    missing = {name: 1.0 - float(reached[name].mean()) if name in reached else 1.0 for name in everything}
    return {name: share for name, share in missing.items() if share > 0}


def distinct_clients(
    clients: Sequence[ClientInfo], refused: Mapping[str, str]
) -> tuple[list[ClientInfo], dict[str, str]]:
    """The clients by id without those whose id more than one node states, and who takes no part and why.

    Raises:
        ConfigError: when nobody is left.
    """
    counts = Counter(client.client_id for client in clients)
    kept = sorted((client for client in clients if counts[client.client_id] == 1), key=lambda client: client.client_id)
    out = dict(refused)
    for name, count in sorted(counts.items()):
        if count > 1:
            out[name] = f"{count} nodes state this id; give every node an id of its own"
    if not kept:
        why = next(iter(out.values()), "no node is there")
        raise ConfigError(f"no client introduced itself properly; for example: {why}")
    return kept, out
