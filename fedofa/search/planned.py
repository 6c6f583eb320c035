"""Subnets and plans for a fleet: what a search finds, under the plan that the device will follow.

`fleet.FleetSearch` takes what a plan costs for a sum over a subnet's blocks. Plans that are made for a device's memory
(`FitSearch.plan_within`) are no such sum, and take less or more than is counted. With them a device's best subnet for
which time alone counts is tried first; then the best within ever closer bounds on the memory that is counted, since
that rises and falls with what plans take.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedofa.search.fit import Budgets, Fit, FitSearch
from fedofa.search.fleet import Choice, Demand, FleetSearch
from fedofa.types.errors import InfeasibilityError
from fedofa.types.space import SubnetConfig

_HALVINGS = 6
"""How often the gap between what fits and what does not is halved, in the logarithm of the counted memory."""
_ANY_MEMORY = 1e18


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What one search found for one device.

    Args:
        fit: or why there is none.
        accuracy: as predicted; minus infinity where the search itself refused.
        counted_bytes: memory of the subnet's training as the search counts it.
    """

    fit: Fit | InfeasibilityError
    accuracy: float = -math.inf
    counted_bytes: float = 0.0

    @property
    def fits(self) -> bool:
        """Whether the subnet's own plan is within the budgets."""
        return isinstance(self.fit, Fit)


@dataclass(frozen=True)
class PlannedFleetSearch:
    """Assigns subnets and plans to fleets.

    Args:
        search: finds subnets.
        fits: prices one of them; its groups of plans are what the search's ways count.
    """

    search: FleetSearch
    fits: FitSearch

    def assign(self, demands: Sequence[Demand]) -> list[Fit | InfeasibilityError]:
        """The best subnet and plan for every device, or why it has none.

        Groups of plans come in order of preference: a later one serves only devices that nothing fits in the earlier.
        """
        outcomes: dict[int, Fit | InfeasibilityError] = {}
        left = list(range(len(demands)))
        for group in range(len(self.fits.plans)):
            found = self._in_group(group, [demands[device] for device in left]) if left else []
            for device, fit in zip(left, found, strict=True):
                if isinstance(fit, Fit) or device not in outcomes:
                    outcomes[device] = fit
            left = [device for device in left if not isinstance(outcomes[device], Fit)]
        return [outcomes[device] for device in range(len(demands))]

    def _in_group(self, group: int, demands: Sequence[Demand]) -> list[Fit | InfeasibilityError]:
        """The best fits under one group of plans."""
        made = self.fits.plan_within is not None
        found = self._probe(group, demands, [_ANY_MEMORY if made else item.profile.memory_bytes for item in demands])
        over = [number for number, item in enumerate(found) if not item.fits and math.isfinite(item.accuracy)]
        closer = self._closer(group, [demands[number] for number in over], [found[number] for number in over])
        fits = [item.fit for item in found]
        for number, fit in zip(over, closer, strict=True):
            fits[number] = fit
        return fits

    def _closer(
        self, group: int, demands: Sequence[Demand], first: Sequence[_Outcome]
    ) -> list[Fit | InfeasibilityError]:
        """The best fits within closer bounds than those that the first outcomes were found in, all over a budget."""
        if not demands:
            return []
        smallest = [self._smallest(group, item) for item in demands]
        low, high = [item.counted_bytes for item in smallest], [item.counted_bytes for item in first]
        found = self._probe(group, demands, low)
        best = [item if item.fits else least for item, least in zip(found, smallest, strict=True)]
        able = [number for number, item in enumerate(best) if item.fits]
        for _ in range(_HALVINGS if able else 0):
            middle = [math.sqrt(low[number] * high[number]) for number in able]
            found = self._probe(group, [demands[number] for number in able], middle)
            for number, bound, item in zip(able, middle, found, strict=True):
                if not item.fits:
                    high[number] = bound
                    continue
                low[number] = bound
                best[number] = max(best[number], item, key=lambda one: one.accuracy)
        return [
            item.fit if isinstance(item.fit, Fit) else self._refusal(demand, item.fit)
            for demand, item in zip(demands, best, strict=True)
        ]

    def _probe(self, group: int, demands: Sequence[Demand], bounds: Sequence[float]) -> list[_Outcome]:
        """What the search finds for each device within a bound on counted memory, under its own plan."""
        ways = self.search.ways[group]
        search = replace(self.search, ways=[ways if self.fits.plan_within is None else ways[:1]])
        within = [_with_memory(item, bound) for item, bound in zip(demands, bounds, strict=True)]
        return [
            self._chosen(group, demand, choice) if isinstance(choice, Choice) else _Outcome(choice)
            for demand, choice in zip(demands, search.assign(within), strict=True)
        ]

    def _chosen(self, group: int, demand: Demand, choice: Choice) -> _Outcome:
        """A choice under its own plan."""
        subnet = self.search.index.encoding.subnet(choice.row)
        return self._outcome(group, demand, choice.way[1], subnet, choice.accuracy, choice.binding)

    def _outcome(
        self, group: int, demand: Demand, way: int, subnet: SubnetConfig, accuracy: float, binding: str
    ) -> _Outcome:
        """A subnet under its own plan."""
        plan_of = self.fits.plans[group][way]
        counted = self.fits.counted(plan_of, subnet, demand.profile, demand.work)
        binding = f"round time ({counted.longest_part})" if binding == "round time" else binding
        budgets = Budgets(demand.profile.memory_bytes, demand.round_seconds)
        fit = self.fits.under(plan_of, subnet, demand.profile, demand.work, budgets, binding)
        return _Outcome(fit, accuracy, counted.training_bytes)

    def _smallest(self, group: int, demand: Demand) -> _Outcome:
        """The smallest subnet, under the plan of the group that takes the least."""
        subnet = self.fits.space.smallest()
        plans = self.fits.plans[group] if self.fits.plan_within is None else self.fits.plans[group][:1]
        taken = [self.fits.counted(plan, subnet, demand.profile, demand.work).training_bytes for plan in plans]
        way = taken.index(min(taken))
        batch = self.search.index.batch([subnet])
        outcome = self._outcome(group, demand, way, subnet, float(self.search.predictor.predict(batch)[0]), "memory")
        missed = self.search.missed(_with_memory(demand, _ANY_MEMORY), group, way, batch)
        return replace(outcome, fit=InfeasibilityError(missed)) if missed and outcome.fits else outcome

    def _refusal(self, demand: Demand, reason: InfeasibilityError) -> InfeasibilityError:
        device, family = demand.profile.device_class, self.fits.space.family
        return InfeasibilityError(f"no subnet of {family!r} fits a {device!r} device; of the smallest: {reason}")


def _with_memory(demand: Demand, memory_bytes: float) -> Demand:
    return replace(demand, profile=replace(demand.profile, memory_bytes=memory_bytes))
