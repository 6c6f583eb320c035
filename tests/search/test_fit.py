"""The search for a device's subnet against enumeration of a whole small space."""

import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from cohorts import SPEC
from hypothesis import given, settings
from hypothesis import strategies as st

from fedofa.device.cost import AnalyticCostModel, LocalWork
from fedofa.finetune.plans import build_plan
from fedofa.search.fit import Budgets, FitSearch, capacity, uniform_subnets
from fedofa.supernet.families import two_conv_cnn
from fedofa.supernet.fixed import FixedSupernet
from fedofa.supernet.mobilenet_v3 import MobileNetV3Spec, MobileNetV3Supernet
from fedofa.types.device import DeviceProfile
from fedofa.types.errors import InfeasibilityError

SUPERNET = MobileNetV3Supernet(MobileNetV3Spec.from_json({**SPEC.to_json(), "kernels": [3, 5], "expands": [1, 2, 3]}))
SPACE = SUPERNET.space
MODEL = AnalyticCostModel()
FULL = [partial(build_plan, "full"), partial(build_plan, "full", recompute=True)]
HEAD = [partial(build_plan, "head")]
PROFILE = DeviceProfile("board", 1.0, 1.0, 1.0, 1.0)
WORK = LocalWork(num_examples=40, num_samples=40, batch_size=8)
PLENTY = Budgets(1e15, 1e15)
KINDS = ("download", "compute", "upload")


def build_search(*plans) -> FitSearch:
    return FitSearch(SPACE, SUPERNET.block_costs, plans, MODEL)


def price(subnet, plan_of=FULL[0], profile=PROFILE):
    blocks = SUPERNET.block_costs(subnet)
    return MODEL.cost(blocks, plan_of(blocks), profile, WORK)


@pytest.fixture(scope="module")
def table():
    """Every subnet of the space, priced under "full" on a device of one byte and one MAC a second."""
    rows = []
    depths = itertools.product((1, 2), repeat=2)
    for depth in depths:
        active = [stage * 2 + block for stage in (0, 1) for block in range(depth[stage])]
        options = itertools.product(itertools.product((3, 5), (1, 2, 3)), repeat=len(active))
        for chosen, resolution in itertools.product(options, (16, 20)):
            kernel, expand = [3] * 4, [1] * 4
            for position, (k, e) in zip(active, chosen, strict=True):
                kernel[position], expand[position] = k, e
            rows.append(SPACE.subnet(depth=list(depth), kernel=kernel, expand=expand, resolution=resolution))
    costs = [price(subnet) for subnet in rows]
    columns = {
        "memory": np.array([cost.training_bytes for cost in costs]),
        "capacity": np.array([capacity(cost) for cost in costs]),
        **{kind: np.array([getattr(cost, f"{kind}_seconds") for cost in costs]) for kind in KINDS},
    }
    assert len(rows) == len(set(rows)) == 2 * SPACE.count()
    return rows, columns


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_best_fit_is_feasible_a_local_optimum_and_near_the_true_one(table, data):
    """Within 5 % of the best capacity, which is a logarithm; budgets are a random subnet's, loosened a little."""
    rows, columns = table
    anchor = data.draw(st.integers(0, len(rows) - 1))
    slack = data.draw(st.floats(1.0, 1.5))
    speeds = {kind: data.draw(st.sampled_from([0.01, 1.0, 100.0])) for kind in KINDS}
    profile = DeviceProfile("board", 1.0, speeds["compute"], speeds["upload"], speeds["download"])
    seconds = sum(columns[kind] / speeds[kind] for kind in KINDS)
    memory = float(columns["memory"][anchor]) * slack if data.draw(st.booleans()) else 1e15
    budgets = Budgets(memory, float(seconds[anchor]) * slack)
    feasible = (columns["memory"] <= budgets.memory_bytes) & (seconds <= budgets.round_seconds)
    search = build_search(FULL[:1])
    fit = search.best_fit(profile, WORK, budgets)
    assert feasible[rows.index(fit.subnet)]
    assert fit.cost == price(fit.subnet, profile=profile)
    assert fit.plan == build_plan("full", SUPERNET.block_costs(fit.subnet))
    assert capacity(fit.cost) >= 0.95 * columns["capacity"][feasible].max()
    for neighbour in SPACE.neighbours(fit.subnet, np.random.default_rng(1)):
        cost = price(neighbour, profile=profile)
        assert capacity(cost) <= capacity(fit.cost) or budgets.exceeded(cost)
    assert search.best_fit(profile, WORK, budgets) == fit


@pytest.mark.parametrize(
    ("fast", "slow", "binding"),
    [
        ({}, {"uplink_bytes_per_second": 1.0}, "round time (uplink)"),
        ({}, {"downlink_bytes_per_second": 1.0}, "round time (downlink)"),
        ({}, {"macs_per_second": 1.0}, "round time (compute)"),
    ],
)
def test_the_part_of_the_round_that_binds_is_named(fast, slow, binding):
    profile = replace(DeviceProfile("board", 1.0, 1e12, 1e12, 1e12), **slow)
    seconds = [price(subnet, profile=profile).round_seconds for subnet in (SPACE.smallest(), SPACE.largest())]
    fit = build_search(FULL[:1]).best_fit(profile, WORK, Budgets(1e15, sum(seconds) / 2))
    assert fit.binding == binding
    assert SPACE.smallest() != fit.subnet != SPACE.largest()


def test_memory_binds_just_below_the_largest_subnets_need():
    need = price(SPACE.largest()).training_bytes
    search = build_search(FULL[:1])
    fit = search.best_fit(PROFILE, WORK, Budgets(need - 1, 1e15))
    assert fit.binding == "memory"
    assert fit.subnet != SPACE.largest()
    fit = search.best_fit(PROFILE, WORK, Budgets(need, 1e15))
    assert (fit.subnet, fit.binding) == (SPACE.largest(), "none")


def test_nothing_binds_where_there_is_plenty():
    fit = build_search(FULL, HEAD).best_fit(PROFILE, WORK, PLENTY)
    assert (fit.subnet, fit.binding) == (SPACE.largest(), "none")
    assert fit.plan == build_plan("full", SUPERNET.block_costs(SPACE.largest()))


def test_recomputation_serves_only_where_it_buys_a_larger_subnet():
    plain, again = (price(SPACE.largest(), plan_of).training_bytes for plan_of in FULL)
    assert again < plain
    fit = build_search(FULL).best_fit(PROFILE, WORK, Budgets((plain + again) / 2, 1e15))
    assert fit.subnet == SPACE.largest()
    assert fit.plan.recompute
    assert not build_search(FULL).best_fit(PROFILE, WORK, Budgets(plain, 1e15)).plan.recompute


def test_a_later_plan_serves_only_where_no_subnet_fits_an_earlier_one():
    least = min(price(SPACE.smallest(), plan_of).training_bytes for plan_of in FULL)
    search = build_search(FULL, HEAD)
    assert search.best_fit(PROFILE, WORK, Budgets(least, 1e15)).plan.name == "full"
    fit = search.best_fit(PROFILE, WORK, Budgets(least - 1, 1e15))
    assert fit.plan.name == "head"
    assert fit.cost.training_bytes <= least - 1


@pytest.mark.parametrize("factor", [2.0, 12.5])
def test_where_nothing_fits_the_budget_and_the_factor_are_named(factor):
    need = min(price(SPACE.smallest(), plan_of).training_bytes for plan_of in (*FULL, *HEAD))
    with pytest.raises(InfeasibilityError) as caught:
        build_search(FULL, HEAD).best_fit(PROFILE, WORK, Budgets(need / factor, 1e15))
    for part in ("'mobilenet_v3'", "'board'", "'head'", f"memory is exceeded {factor:.2f} times", f"{need:,} bytes"):
        assert part in str(caught.value)


def test_where_time_and_memory_are_short_both_are_named():
    cost = price(SPACE.smallest())
    with pytest.raises(InfeasibilityError) as caught:
        build_search(FULL[:1]).best_fit(PROFILE, WORK, Budgets(cost.training_bytes / 3, cost.round_seconds / 4))
    assert "memory is exceeded 3.00 times" in str(caught.value)
    assert "round time (compute) is exceeded 4.00 times" in str(caught.value)


def test_without_plans_nothing_fits():
    with pytest.raises(InfeasibilityError, match="no plan was given"):
        build_search().best_fit(PROFILE, WORK, PLENTY)


def test_fit_of_takes_the_first_plan_that_fits_a_given_subnet():
    search = build_search(FULL, HEAD)
    subnet = SPACE.subnet(kernel=3)
    plain, again, head = (price(subnet, plan_of).training_bytes for plan_of in (*FULL, *HEAD))
    found = [search.fit_of(subnet, PROFILE, WORK, Budgets(memory, 1e15)) for memory in (plain, again, head, head - 1)]
    assert [fit and (fit.subnet, fit.plan.name, bool(fit.plan.recompute), fit.binding) for fit in found] == [
        (subnet, "full", False, "chosen"),
        (subnet, "full", True, "chosen"),
        (subnet, "head", False, "chosen"),
        None,
    ]


def test_uniform_subnets_have_one_value_an_axis():
    uniform = list(uniform_subnets(SPACE))
    assert len(uniform) == len(set(uniform)) == 2 * 2 * 3 * 2
    for subnet in uniform:
        for axis in SPACE.axes:
            assert len(set(SPACE.values(subnet, axis.name)) - {None}) == 1


def test_a_fixed_network_fits_whole_or_not_at_all():
    with torch.device("meta"):
        supernet = FixedSupernet(two_conv_cnn(1, 5, 8), (1, 8, 8))
    search = FitSearch(supernet.space, supernet.block_costs, (FULL,), MODEL)
    fit = search.best_fit(PROFILE, WORK, PLENTY)
    assert (fit.subnet, fit.binding) == (supernet.space.largest(), "none")
    with pytest.raises(InfeasibilityError, match="memory is exceeded"):
        search.best_fit(PROFILE, WORK, Budgets(fit.cost.training_bytes - 1, 1e15))


def counted_plans(factor, constant):
    """Plans of a kind that take so many times what is counted, and a constant."""

    def plan_within(subnet, kind, work, memory_bytes):
        blocks = SUPERNET.block_costs(subnet)
        plan = build_plan(kind, blocks, lean=True)
        taken = int(factor * MODEL.cost(blocks, plan, PROFILE, work).training_bytes + constant)
        if taken > memory_bytes:
            raise InfeasibilityError(f"{kind} takes {taken:,} bytes")
        return plan, taken

    return plan_within


@pytest.mark.parametrize("share", [0.1, 0.4, 0.9])
def test_plans_made_for_the_memory_are_searched_like_counted_ones(share):
    low, high = (price(subnet).training_bytes for subnet in (SPACE.smallest(), SPACE.largest()))
    memory = low + share * (high - low)
    planned = replace(build_search(FULL, HEAD), plan_within=counted_plans(3.0, 5e6))
    found = planned.best_fit(PROFILE, WORK, Budgets(3 * memory + 5e6, 1e15))
    assert found.plan.lean
    assert found.binding == "memory"
    assert found.cost.training_bytes <= 3 * memory + 5e6
    counted = build_search([FULL[0]]).best_fit(PROFILE, WORK, Budgets(0.97 * memory, 1e15))
    assert capacity(found.cost) >= capacity(counted.cost)
    assert planned.fit_of(found.subnet, PROFILE, WORK, Budgets(found.cost.training_bytes, 1e15)).plan == found.plan


def test_plans_made_for_the_memory_fall_back_to_less_that_trains_and_then_refuse():
    planned = replace(build_search(FULL, HEAD), plan_within=counted_plans(1.0, 0))
    full = price(SPACE.smallest()).training_bytes
    found = planned.best_fit(PROFILE, WORK, Budgets(full - 1, 1e15))
    assert found.plan.name == "head"
    assert planned.best_fit(PROFILE, WORK, PLENTY).subnet == SPACE.largest()
    with pytest.raises(InfeasibilityError, match="head takes"):
        planned.best_fit(PROFILE, WORK, Budgets(1, 1e15))
    assert planned.fit_of(SPACE.smallest(), PROFILE, WORK, Budgets(1, 1e15)) is None
