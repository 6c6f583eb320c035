"""Subnets with the plans that devices follow: as the search counts them, or made for each device's memory."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from cohorts import SPECS

from fedofa.device.cost import AnalyticCostModel, LocalWork
from fedofa.device.models import Macs
from fedofa.device.operators import OperatorIndex
from fedofa.device.training import PlannedPlaces, RoundCosts
from fedofa.finetune.plans import build_plan
from fedofa.search.accuracy import ZeroCostProxy
from fedofa.search.archive import build_archive
from fedofa.search.fit import Budgets, Fit, FitSearch, capacity
from fedofa.search.fleet import Demand, FleetSearch, Way
from fedofa.search.limits import Limit, Limits
from fedofa.search.planned import PlannedFleetSearch
from fedofa.supernet.families import build_elastic
from fedofa.types.device import DeviceProfile
from fedofa.types.errors import InfeasibilityError

SUPERNET = build_elastic(SPECS["mobilenet_v3"])
INDEX = OperatorIndex.of(SUPERNET)
PROXY = ZeroCostProxy(INDEX)
ARCHIVE = build_archive(INDEX, PROXY, num_devices=40)
FULL = [partial(build_plan, "full"), partial(build_plan, "full", recompute=True)]
HEAD = [partial(build_plan, "head")]
WORK = LocalWork(num_examples=30, num_samples=60, batch_size=8)
MADE_SHARE, MADE_FIXED = 0.4, 50_000


def made(subnet, kind, work, memory_bytes, share=MADE_SHARE):
    """A stand-in for `finetune.budget`: of what is counted a share, and something fixed."""
    plan = build_plan(kind, SUPERNET.block_costs(subnet), lean=True)
    cost = AnalyticCostModel().cost(SUPERNET.block_costs(subnet), plan, board(), work)
    taken = int(cost.training_bytes * share) + MADE_FIXED
    if taken > memory_bytes:
        raise InfeasibilityError(f"takes {taken} bytes, has {memory_bytes:.0f}")
    return plan, taken


def board(memory_bytes=1e12, macs_per_second=1e9, uplink=1e6):
    return DeviceProfile("board", memory_bytes, macs_per_second, uplink, 2e6)


def searches(*groups, plan_within=None, limits=()):
    """The fleet's search, and the one for a single device."""
    fits = FitSearch(SUPERNET.space, SUPERNET.block_costs, groups, AnalyticCostModel(), plan_within)
    ways = [[Way(RoundCosts(PlannedPlaces(INDEX, plan)), Limits(limits)) for plan in group] for group in groups]
    return PlannedFleetSearch(FleetSearch(ARCHIVE, PROXY, ways), fits), fits


def boards(number, seed=0):
    """Devices with some to plenty of memory and time, and some with too little."""
    rng = np.random.default_rng(seed)
    memory, seconds = np.geomspace(60_000, 3e6, number), rng.permutation(np.geomspace(0.02, 3.0, number))
    return [Demand(board(float(m), uplink=2e5), WORK, float(s)) for m, s in zip(memory, seconds, strict=True)]


def budgets(demand):
    return Budgets(demand.profile.memory_bytes, demand.round_seconds)


def test_with_counted_plans_the_search_is_taken_at_its_word():
    together, _ = searches(FULL, HEAD)
    demands = boards(20)
    found = together.assign(demands)
    for demand, fit, choice in zip(demands, found, together.search.assign(demands), strict=True):
        if isinstance(choice, InfeasibilityError):
            assert str(fit) == str(choice)
            continue
        group, way = choice.way
        assert fit.subnet == INDEX.encoding.subnet(choice.row)
        assert fit.plan == (FULL, HEAD)[group][way](SUPERNET.block_costs(fit.subnet))
        assert not budgets(demand).exceeded(fit.cost)
        assert fit.binding.split(" (")[0] == choice.binding
    kinds = {type(fit) for fit in found}
    assert kinds == {Fit, InfeasibilityError}


@pytest.mark.parametrize("share", [0.4, 1.5])
def test_with_made_plans_every_device_gets_about_as_much_as_by_a_search_of_its_own(share):
    within = partial(made, share=share)
    together, alone = searches(FULL, plan_within=within)
    demands = boards(20)
    ahead = []
    for demand, fit in zip(demands, together.assign(demands), strict=True):
        try:
            own = alone.best_fit(demand.profile, demand.work, budgets(demand))
        except InfeasibilityError:
            own = None
        assert isinstance(fit, Fit) == (own is not None)
        if isinstance(fit, Fit) and own is not None:
            assert fit.plan.lean
            assert fit.cost.training_bytes == within(fit.subnet, "full", WORK, 1e12)[1]
            assert not budgets(demand).exceeded(fit.cost)
            ahead.append(capacity(fit.cost) - capacity(own.cost))
    assert len(ahead) > 5
    assert min(ahead) > -0.02
    assert np.mean(ahead) >= 0


def test_made_plans_keep_to_the_limits_that_all_devices_share():
    macs = Macs(INDEX)
    ends = macs.predict(INDEX.batch([SUPERNET.space.smallest(), SUPERNET.space.largest()]))
    most = float(np.sqrt(ends[0] * ends[1]))
    together, _ = searches(FULL, plan_within=made, limits=(Limit(macs, most),))
    fits = [fit for fit in together.assign(boards(12)) if isinstance(fit, Fit)]
    assert fits
    assert all(fit.cost.macs <= most for fit in fits)


def test_where_no_plan_can_be_made_the_next_kind_serves_and_else_the_smallest_subnets_reason_is_given():
    def head_only(subnet, kind, work, memory_bytes):
        if kind != "head":
            raise InfeasibilityError("that would in 123 bytes")
        return made(subnet, kind, work, memory_bytes)

    demand = replace(boards(1)[0], profile=board(), round_seconds=1e9)
    both, _ = searches(FULL, HEAD, plan_within=head_only)
    (fit,) = both.assign([demand])
    assert isinstance(fit, Fit)
    assert fit.plan.name == "head"
    one, _ = searches(FULL, plan_within=head_only)
    (error,) = one.assign([demand])
    assert isinstance(error, InfeasibilityError)
    assert "of the smallest: that would in 123 bytes" in str(error)
