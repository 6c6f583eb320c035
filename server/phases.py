"""Federated shrinking: which of a schedule's subnets each client of a cohort trains, and which teacher it holds.

A round is a step of the schedule. The phase says which subnets are drawn, and the devices who trains them: sorted by
what they can train in the phase, the cohort's clients are dealt the drawn subnets from the largest down, as evenly as
it goes. A client that cannot hold its subnet gets the best one that the phase allows and that is at no position larger;
one that can hold none of those sits out the round.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np

from fedofa.search.fit import FitSearch, PlanOf, capacity, uniform_subnets
from fedofa.shrinking.channels import check_channels, sorted_channels, with_channels
from fedofa.shrinking.sampling import PhaseSampler
from fedofa.shrinking.schedule import ShrinkPhase, ShrinkSchedule
from fedofa.supernet.base import Supernet
from fedofa.types.errors import ConfigError
from fedofa.types.space import SearchSpace, SubnetConfig
from fedofa.types.state import SharedState
from server.fleet import Assignment, ClientInfo, FleetPlan, draw_cohort, plan_fleet
from server.planning import Planner

_SUBNETS_STREAM = 3
"""Tells the random numbers of the drawn subnets from others that are drawn from the same seed."""
TEACHER = "teacher"
"""The kind of moment under which the state keeps the trained largest network's tensors."""

LossOf = Callable[[SharedState, SubnetConfig], float]
"""A subnet's loss on images that the server holds."""


@dataclass(frozen=True, slots=True)
class Cohort:
    """Who trains what in a round of a schedule.

    Args:
        members: in the order of client ids.
        sitting_out: client id -> why it cannot train what is at no position larger than the subnet dealt to it.
        untaught: ids of clients that should have a teacher and cannot hold one; they learn from the labels alone.
    """

    members: Sequence[Assignment]
    sitting_out: Mapping[str, str]
    untaught: Sequence[str]


@dataclass
class FederatedShrinking:
    """Deals a schedule's subnets to a fleet.

    Args:
        supernet: for the costs.
        schedule: which subnets train when, and from whom they learn.
        plans: ways to train a parametrised subnet, in order of preference.
        planner: the fleet's recipe and budgets.
        loss_of: compares candidates, where a phase has several.
        seed: of the run.

    Raises:
        SpaceError, InfeasibilityError: when a phase leaves the space.
        ConfigError: when a phase orders channels and the supernet has none.
    """

    supernet: Supernet
    schedule: ShrinkSchedule
    plans: Sequence[Sequence[PlanOf]]
    planner: Planner
    loss_of: LossOf
    seed: int
    fleets: list[FleetPlan] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        check_channels(self.supernet, self.schedule)
        self.samplers = [PhaseSampler(self.supernet.space, phase, self._macs) for phase in self.schedule.phases]

    def plan(self, clients: Sequence[ClientInfo]) -> None:
        """Find out who can train anything in each phase before anything trains.

        Raises:
            ConfigError: when there is a phase in which nobody can.
        """
        self.fleets = [self._able(clients, sampler) for sampler in self.samplers]

    def _able(self, clients: Sequence[ClientInfo], sampler: PhaseSampler) -> FleetPlan:
        fleet = self._fits(clients, sampler, sampler.largest())
        if not fleet.assignments:
            why = next(iter(fleet.sitting_out.values()), "nobody is there")
            raise ConfigError(f"shrinking phase {sampler.phase.name!r}: no client can train any subnet: {why}")
        return fleet

    def phase_of(self, server_round: int) -> ShrinkPhase:
        """The phase of a round, which counts from 1."""
        return self.schedule.phases[self.schedule.phase_at(server_round - 1)[0]]

    def rate(self, server_round: int) -> float:
        """The learning rate of a round as a multiple of the recipe's."""
        index, within = self.schedule.phase_at(server_round - 1)
        return self.schedule.phases[index].rate(within)

    def entered(self, server_round: int, state: SharedState) -> SharedState:
        """The state that a round begins with: in a phase's first, channels ordered and the trained teacher kept.

        A repeated round finds the same.
        """
        phase, (index, within) = self.phase_of(server_round), self.schedule.phase_at(server_round - 1)
        if phase.order_channels and within == 0:
            supernet = with_channels(self.supernet, f"shrinking phase {phase.name!r}")
            state = replace(state, ordering=sorted_channels(supernet, self.schedule.phases[:index], state))
            supernet.set_ordering(state.ordering)
        if phase.teacher != "trained" or TEACHER in state.moments:
            return state
        return replace(state, moments={**state.moments, TEACHER: dict(state.tensors)})

    def teacher_state(self, server_round: int, state: SharedState) -> SharedState:
        """What teachers of a round are cut from: the trained teacher's tensors, or the current ones."""
        if self.phase_of(server_round).teacher != "trained":
            return state
        return replace(state, tensors=state.moments[TEACHER], moments={})

    def cohort(
        self,
        server_round: int,
        state: SharedState,
        failed: Collection[str],
        clients_per_round: int,
        rng: np.random.Generator,
    ) -> Cohort:
        """Draw clients and subnets, and bring them together.

        Args:
            failed: clients that a repeated round does not ask again, where there are others.
            rng: draws the clients; the subnets of a round are the same in every attempt at it.
        """
        index, _ = self.schedule.phase_at(server_round - 1)
        sampler = self.samplers[index]
        drawn = draw_cohort(self.fleets[index].without(failed), clients_per_round, None, rng)
        able = sorted(drawn, key=lambda item: (-capacity(item.fit.cost), item.client.client_id))
        subnets = self.subnets(server_round, state)
        shares = deal(len(able), len(subnets))
        members, sitting_out, untaught = [], {}, []
        for number, subnet in enumerate(subnets):
            group = [item.client for item, share in zip(able, shares, strict=True) if share == number]
            dealt = self._fits(group, sampler, subnet)
            sitting_out |= dealt.sitting_out
            members += [self._taught(sampler, item) for item in dealt.assignments.values()]
        members.sort(key=lambda item: item.client.client_id)
        if sampler.phase.teacher != "none":
            untaught = [item.client.client_id for item in members if not item.teacher and not _leads(sampler, item)]
        return Cohort(members, sitting_out, untaught)

    def subnets(self, server_round: int, state: SharedState) -> list[SubnetConfig]:
        """The subnets drawn for a round, those of most MACs first."""
        index, within = self.schedule.phase_at(server_round - 1)
        rng = np.random.default_rng([self.seed, _SUBNETS_STREAM, server_round])
        score_of = cache(lambda subnet: -self.loss_of(state, subnet))
        drawn = self.samplers[index].draw(rng, score_of, step=within)
        return sorted(drawn, key=lambda subnet: (-self._macs(subnet), subnet.choices))

    def _fits(self, clients: Sequence[ClientInfo], sampler: PhaseSampler, subnet: SubnetConfig) -> FleetPlan:
        """The best that each client can train of what the phase allows and is at no position larger than the subnet."""
        space = sampler.below(subnet)
        search = self._search(space, sampler)
        plan = plan_fleet(clients, search, self.planner.work, self.planner.round_seconds)
        outer = {
            name: replace(item, fit=replace(item.fit, subnet=sampler.outer(item.fit.subnet)))
            for name, item in plan.assignments.items()
        }
        return FleetPlan(outer, plan.sitting_out)

    def _search(self, space: SearchSpace, sampler: PhaseSampler) -> FitSearch:
        def blocks(inner: SubnetConfig):
            return self.supernet.costs(sampler.outer(inner), True)

        return FitSearch(space, blocks, self.plans, self.planner.search.cost_model)

    def _taught(self, sampler: PhaseSampler, item: Assignment) -> Assignment:
        """The assignment with the most capable teacher that the client can hold beside its subnet, if any."""
        if sampler.phase.teacher == "none" or _leads(sampler, item):
            return item
        blocks = self.supernet.costs(item.fit.subnet, True)
        for teacher in self._teachers(sampler, item.fit.cost.macs):
            cost = self.planner.cost(blocks, item.fit.plan, item.client, self.supernet.block_costs(teacher))
            if cost is not None:
                return replace(item, fit=replace(item.fit, cost=cost), teacher=teacher)
        return item

    def _teachers(self, sampler: PhaseSampler, macs: int) -> Iterator[SubnetConfig]:
        """The subnets that may teach one of so many MACs, the most capable first.

        A trained teacher is the space's largest, since no smaller one was trained; in place it is any of one value an
        axis.
        """
        if sampler.phase.teacher == "trained":
            yield self.supernet.space.largest()
            return
        for teacher in self._uniform(sampler):
            if self._macs(teacher) > macs:
                yield teacher

    def _uniform(self, sampler: PhaseSampler) -> list[SubnetConfig]:
        subnets = {sampler.outer(inner) for inner in uniform_subnets(sampler.below(sampler.largest()))}
        return sorted(subnets, key=lambda subnet: (-self._macs(subnet), subnet.choices))

    def _macs(self, subnet: SubnetConfig) -> int:
        return sum(block.macs for block in self.supernet.block_costs(subnet))


def _leads(sampler: PhaseSampler, item: Assignment) -> bool:
    """Whether the client trains what teaches the others: with an in-place teacher the largest learns from labels."""
    return sampler.phase.teacher == "in_place" and item.fit.subnet == sampler.largest()


def deal(num_clients: int, num_subnets: int) -> list[int]:
    """The number of each client's subnet: shares as equal as they go, first and last among them where there is room."""
    if num_clients >= num_subnets:
        return [client * num_subnets // num_clients for client in range(num_clients)]
    if num_clients == 1:
        return [0]
    return [round(client * (num_subnets - 1) / (num_clients - 1)) for client in range(num_clients)]
