"""The best subnet and plan that fit a device's budgets.

Without an accuracy predictor, "best" is the subnet of most `capacity`. The search takes the best feasible uniform
subnet (one value an axis) and climbs from it, one position and one step at a time, until every move up breaks a budget:
seconds of counting, no training, and the same result every time.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedofa.device.cost import CostModel, LocalWork, RoundCost
from fedofa.supernet.costs import BlockCost
from fedofa.types.device import DeviceProfile
from fedofa.types.errors import InfeasibilityError
from fedofa.types.plan import FineTunePlan
from fedofa.types.space import SearchSpace, SubnetConfig

Blocks = Callable[[SubnetConfig], Sequence[BlockCost]]
PlanOf = Callable[[Sequence[BlockCost]], FineTunePlan]

PlanWithin = Callable[[SubnetConfig, str, LocalWork, float], tuple[FineTunePlan, int]]
"""From a subnet, a kind of plan, a round's work and bytes to a plan of that kind that fits them, and what it takes.

Raises `InfeasibilityError` where none does.
"""

_ROUNDING = 1 + 1e-9
"""How far beyond a budget sums of the same numbers in another order may end."""
_HALVINGS = 6
"""How often the gap between what fits and what does not is halved, in the logarithm of the counted memory."""


@dataclass(frozen=True, slots=True)
class Budgets:
    """What a round may cost a device: bytes above the engine's floor; seconds for download, training and upload."""

    memory_bytes: float
    round_seconds: float

    def exceeded(self, cost: RoundCost) -> dict[str, float]:
        """Budget name -> by which factor the cost exceeds it; empty when it fits. Time is named by its longest part."""
        over = {}
        if cost.training_bytes > self.memory_bytes * _ROUNDING:
            over["memory"] = cost.training_bytes / self.memory_bytes
        if cost.round_seconds > self.round_seconds * _ROUNDING:
            over[f"round time ({cost.longest_part})"] = cost.round_seconds / self.round_seconds
        return over


@dataclass(frozen=True, slots=True)
class Fit:
    """A device's subnet and plan, their cost, and the budget that keeps the subnet from being larger.

    `binding` is "memory", "round time (compute)" and the like, or "none" where the largest subnet fits.
    """

    subnet: SubnetConfig
    plan: FineTunePlan
    cost: RoundCost
    binding: str


def _within(fit: Fit, budgets: Budgets) -> Fit | InfeasibilityError:
    """The fit where it is within the budgets, otherwise which it exceeds."""
    over = budgets.exceeded(fit.cost)
    words = ", ".join(f"{name} ({factor:.2f} times)" for name, factor in over.items())
    return InfeasibilityError(f"plan {fit.plan.name!r} exceeds the budget of {words}") if over else fit


def capacity(cost: RoundCost) -> float:
    """A stand-in for accuracy: log MACs plus log parameters, so that no axis of the space is ignored."""
    return math.log(max(cost.macs, 1)) + math.log(max(cost.num_parameters, 1))


@dataclass(frozen=True, slots=True)
class FitSearch:
    """Finds the best subnet of a space for devices.

    Args:
        space: the search space.
        blocks: gives the block costs of a subnet.
        plans: the plans a device may use, the preferred first: a later one serves only where no subnet fits the earlier
            ones. Each entry is a group of equally good plans (with and without recomputation).
        cost_model: prices a subnet under a plan.
        plan_within: makes the plan of a subnet for a device's memory. With it `plans` say which kinds there are and how
            subnets rank, and what a plan takes is its word instead of the cost model's.
    """

    space: SearchSpace
    blocks: Blocks
    plans: Sequence[Sequence[PlanOf]]
    cost_model: CostModel
    plan_within: PlanWithin | None = None

    def best_fit(self, profile: DeviceProfile, work: LocalWork, budgets: Budgets) -> Fit:
        """The best subnet and plan within the budgets.

        Raises:
            InfeasibilityError: naming the budgets that even the smallest subnet breaks, and by how much.
        """
        if self.plan_within is not None:
            return self._best_planned(self.plan_within, profile, work, budgets)
        closest: tuple[float, str] | None = None
        for group in self.plans:
            priced = [_Pricing(self, plan_of, profile, work, budgets) for plan_of in group]
            fits = [pricing.climb(start) for pricing in priced if (start := pricing.best_uniform()) is not None]
            if fits:
                best = max(fits, key=lambda fit: capacity(fit.cost))
                plain = next(pricing for pricing in priced if not budgets.exceeded(pricing.cost(best.subnet)))
                return plain.fit(best.subnet, best.binding)  # the first plan that fits it: recompute only at need
            closest = min(item for item in (closest, *(pricing.miss() for pricing in priced)) if item is not None)
        raise InfeasibilityError(
            f"no subnet of {self.space.family!r} fits a {profile.device_class!r} device: "
            f"{closest[1] if closest else 'no plan was given'}. Raise its memory_bytes or the round's seconds, or take "
            "a supernet with smaller subnets"
        )

    def fit_of(self, subnet: SubnetConfig, profile: DeviceProfile, work: LocalWork, budgets: Budgets) -> Fit | None:
        """The given subnet under the first plan that fits, or None."""
        for plan_of in itertools.chain.from_iterable(self.plans):
            fit = self.under(plan_of, subnet, profile, work, budgets, "chosen")
            if isinstance(fit, Fit):
                return fit
        return None

    def under(
        self,
        plan_of: PlanOf,
        subnet: SubnetConfig,
        profile: DeviceProfile,
        work: LocalWork,
        budgets: Budgets,
        binding: str,
    ) -> Fit | InfeasibilityError:
        """The given subnet under a plan, one made for the device's memory where plans are; or why it does not fit."""
        pricing = _Pricing(self, plan_of, profile, work, budgets)
        if self.plan_within is not None:
            return pricing.planned(self.plan_within, subnet, binding)
        return _within(pricing.fit(subnet, binding), budgets)

    def counted(self, plan_of: PlanOf, subnet: SubnetConfig, profile: DeviceProfile, work: LocalWork) -> RoundCost:
        """What the cost model counts for a subnet under a plan."""
        blocks = self.blocks(subnet)
        return self.cost_model.cost(blocks, plan_of(blocks), profile, work)

    def _best_planned(self, plan_within: PlanWithin, profile: DeviceProfile, work: LocalWork, budgets: Budgets) -> Fit:
        """`best_fit` where plans are made for the device's memory."""
        reason = "no plan was given"
        for plan_of, *_ in self.plans:
            found = _Pricing(self, plan_of, profile, work, budgets).best_planned(plan_within)
            if isinstance(found, Fit):
                return found
            reason = str(found)
        raise InfeasibilityError(
            f"no subnet of {self.space.family!r} fits a {profile.device_class!r} device; of the smallest: {reason}"
        )


@dataclass(frozen=True, slots=True)
class _Pricing:
    """One device and one plan: prices subnets and compares them."""

    search: FitSearch
    plan_of: PlanOf
    profile: DeviceProfile
    work: LocalWork
    budgets: Budgets

    def cost(self, subnet: SubnetConfig) -> RoundCost:
        return self.search.counted(self.plan_of, subnet, self.profile, self.work)

    def fit(self, subnet: SubnetConfig, binding: str) -> Fit:
        return Fit(subnet, self.plan_of(self.search.blocks(subnet)), self.cost(subnet), binding)

    def best_uniform(self) -> SubnetConfig | None:
        """The most capable feasible subnet with one value an axis."""
        priced = ((subnet, self.cost(subnet)) for subnet in uniform_subnets(self.search.space))
        feasible = [(capacity(cost), subnet) for subnet, cost in priced if not self.budgets.exceeded(cost)]
        return max(feasible, key=lambda item: (item[0], item[1].choices))[1] if feasible else None

    def climb(self, subnet: SubnetConfig) -> Fit:
        """Take the feasible neighbour of most capacity until none is better; then say what stops the others."""
        cost = self.cost(subnet)
        while True:
            better, blocked = [], Counter()
            for neighbour in self.search.space.neighbours(subnet, np.random.default_rng(0)):
                priced = self.cost(neighbour)
                if capacity(priced) > capacity(cost):
                    over = self.budgets.exceeded(priced)
                    blocked.update(over)
                    if not over:
                        better.append((capacity(priced), neighbour.choices, neighbour, priced))
            if not better:
                binding = blocked.most_common(1)[0][0] if blocked else "none"
                return self.fit(subnet, binding)
            _, _, subnet, cost = max(better, key=lambda item: item[:2])

    def planned(self, plan_within: PlanWithin, subnet: SubnetConfig, binding: str) -> Fit | InfeasibilityError:
        """The subnet with a plan that is made for the device's memory, or why it does not fit."""
        blocks = self.search.blocks(subnet)
        try:
            plan, taken = plan_within(subnet, self.plan_of(blocks).name, self.work, self.budgets.memory_bytes)
        except InfeasibilityError as error:
            return error
        cost = self.search.cost_model.cost(blocks, plan, self.profile, self.work)
        return _within(Fit(subnet, plan, replace(cost, training_bytes=taken), binding), self.budgets)

    def best_planned(self, plan_within: PlanWithin) -> Fit | InfeasibilityError:
        """The best subnet that a plan can be made for, or why there is none.

        Subnets are ranked as without such plans. The best for which time alone counts is tried first; then the best
        within ever closer bounds of counted memory, since what that counts rises and falls with what plans take.
        """
        free = self._within(math.inf)
        start = free.best_uniform()
        if start is None:
            return InfeasibilityError(free.miss()[1])
        largest = free.climb(start)
        found = self.planned(plan_within, largest.subnet, largest.binding)
        if isinstance(found, Fit):
            return found
        smallest = self.search.space.smallest()
        best = self.planned(plan_within, smallest, "memory")
        if not isinstance(best, Fit):
            return best
        low, high = free.cost(smallest).training_bytes, largest.cost.training_bytes
        for _ in range(_HALVINGS):
            bounded = self._within(math.sqrt(low * high))
            start = bounded.best_uniform()
            found = None if start is None else self.planned(plan_within, bounded.climb(start).subnet, "memory")
            if isinstance(found, Fit):
                low, best = bounded.budgets.memory_bytes, max(best, found, key=lambda fit: capacity(fit.cost))
            else:
                high = bounded.budgets.memory_bytes
        return best

    def _within(self, memory_bytes: float) -> _Pricing:
        return replace(self, budgets=replace(self.budgets, memory_bytes=memory_bytes))

    def miss(self) -> tuple[float, str]:
        """How far the smallest subnet is from fitting: the worst factor, and in words."""
        smallest = self.search.space.smallest()
        cost = self.cost(smallest)
        over = self.budgets.exceeded(cost)
        needs = {
            "memory": f"{cost.training_bytes:,} bytes of memory, has {self.budgets.memory_bytes:,.0f}",
            "round time": f"{cost.round_seconds:.1f} s a round, may take {self.budgets.round_seconds:.1f} s",
        }
        words = "; ".join(
            f"{name} is exceeded {factor:.2f} times (needs {needs.get(name.split(' (')[0], '')})"
            for name, factor in over.items()
        )
        return max(
            over.values()
        ), f"even the smallest, under plan {self.plan_of(self.search.blocks(smallest)).name!r}: {words}"


def uniform_subnets(space: SearchSpace) -> Iterator[SubnetConfig]:
    """Every subnet with one value an axis, without repeats."""
    seen = set()
    for values in itertools.product(*(axis.values for axis in space.axes)):
        subnet = space.subnet(**dict(zip((axis.name for axis in space.axes), values, strict=True)))
        if subnet not in seen:
            seen.add(subnet)
            yield subnet
