"""Assignments and cohorts: devices decide, the sandwich holds, nobody is lost without a word."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedofa.device.cost import AnalyticCostModel, LocalWork
from fedofa.finetune.plans import build_plan
from fedofa.search.fit import Budgets, FitSearch, capacity
from fedofa.supernet.mobilenet_v3 import MobileNetV3Spec, MobileNetV3Supernet, StageSpec
from fedofa.types.device import DeviceProfile
from fedofa.types.errors import ConfigError
from server.fleet import ClientInfo, distinct_clients, draw_cohort, plan_fleet, plan_uniform, untrainable

SPEC = MobileNetV3Spec(
    in_channels=1,
    num_classes=4,
    stem_width=8,
    first_width=8,
    stages=(StageSpec(16, 2, "relu", True),),
    final_width=16,
    feature_width=16,
    expands=(1, 2),
    depths=(1, 2),
    resolutions=(12, 16),
    norm="group",
)
SUPERNET = MobileNetV3Supernet(SPEC)
SEARCH = FitSearch(
    SUPERNET.space, SUPERNET.block_costs, [[lambda blocks: build_plan("full", blocks)]], AnalyticCostModel()
)
MEMORY = {"tiny": 1.0, "small": 2.2e5, "middle": 3.6e5, "big": 1e9}


def client(number: int, kind: str, *, availability: float = 1.0, num_train: int = 20) -> ClientInfo:
    profile = DeviceProfile(kind, MEMORY[kind], 1e9, 1e6, 1e6, availability)
    return ClientInfo(100 + number, f"client-{number:04d}", profile, num_train, 3)


def work(num_examples: int) -> LocalWork:
    return LocalWork(num_examples, num_examples, 8)


def smallest_fit(item: ClientInfo):
    return SEARCH.fit_of(
        SUPERNET.space.smallest(), item.profile, work(item.num_train), Budgets(item.profile.memory_bytes, 60)
    )


def fleet(kinds: str, **options):
    names = {"t": "tiny", "s": "small", "m": "middle", "b": "big"}
    return plan_fleet([client(i, names[k], **options) for i, k in enumerate(kinds)], SEARCH, work, 60.0)


def test_clients_get_what_their_device_can_train_and_the_rest_sits_out_by_name():
    plan = fleet("tsmb")
    assert list(plan.sitting_out) == ["client-0000"]
    assert "memory is exceeded" in plan.sitting_out["client-0000"]
    capacities = [capacity(plan.assignments[f"client-{i:04d}"].fit.cost) for i in (1, 2, 3)]
    assert capacities == sorted(capacities)
    assert capacities[0] < capacities[2]
    assert plan.assignments["client-0003"].fit.subnet == SUPERNET.space.largest()
    for item in plan.assignments.values():
        assert item.fit.cost.training_bytes <= item.client.profile.memory_bytes
    assert plan.weakest() == plan.assignments["client-0001"].fit


def test_a_group_whose_largest_data_set_does_not_fit_is_searched_client_by_client():
    slow = DeviceProfile("slow", 1e9, 1e6, 1e6, 1e6)
    clients = [ClientInfo(1, "a", slow, 10, 1), ClientInfo(2, "b", slow, 10_000_000, 1)]
    plan = plan_fleet(clients, SEARCH, work, 60.0)
    assert set(plan.assignments) == {"a"}
    assert "round time (compute)" in plan.sitting_out["b"]


@settings(max_examples=40, deadline=None)
@given(st.text("smb", min_size=2, max_size=12), st.integers(1, 12), st.integers(0, 1000))
def test_every_cohort_has_the_smallest_and_the_largest_that_its_devices_can_train(kinds, size, seed):
    plan = fleet(kinds)
    cohort = draw_cohort(plan, size, smallest_fit, np.random.default_rng(seed))
    assert len(cohort) == min(size, len(kinds))
    assert len({item.client.client_id for item in cohort}) == len(cohort)
    own = [plan.assignments[item.client.client_id].fit for item in cohort]
    strongest = max(own, key=lambda fit: capacity(fit.cost))
    trained = [item.fit.subnet for item in cohort]
    assert strongest.subnet in trained
    if len(cohort) > 1:
        assert SUPERNET.space.smallest() in trained
    again = draw_cohort(plan, size, smallest_fit, np.random.default_rng(seed))
    assert again == cohort


def test_availability_decides_who_can_be_drawn():
    plan = fleet("b" * 60, availability=0.3)
    sizes = [len(draw_cohort(plan, 60, None, np.random.default_rng(seed))) for seed in range(50)]
    assert 12 < np.mean(sizes) < 24
    assert min(sizes) < max(sizes)


def test_uniform_plans_give_everybody_the_weakest_subnet():
    plan = fleet("sbb")
    uniform = plan_uniform(plan, plan.weakest(), lambda client: None)
    assert {item.fit.subnet for item in uniform.assignments.values()} == {plan.weakest().subnet}


def test_what_nobody_trains_is_listed():
    supernet = MobileNetV3Supernet(SPEC, torch.Generator().manual_seed(0))
    state = supernet.state()
    fits = [item.fit for item in fleet("b").assignments.values()]
    assert untrainable(supernet, state, fits) == {}
    small = supernet.space.subnet(kernel=3, depth=1)
    narrow = [
        SEARCH.fit_of(
            small,
            client(0, "big").profile,
            work(10),
            Budgets(1e9, 60),
        )
    ]
    missing = untrainable(supernet, state, narrow)
    assert missing["stages.1.1.expand.conv.weight"] == 1.0
    assert missing["stages.1.0.depthwise.conv.weight"] == pytest.approx(1 - 9 / 49)
    assert "stem.conv.weight" not in missing


def test_two_nodes_with_one_id_take_no_part_and_the_others_do():
    kept, out = distinct_clients([client(3, "big"), client(1, "big"), client(2, "big"), client(1, "small")], {"x": "y"})
    assert [item.client_id for item in kept] == ["client-0002", "client-0003"]
    assert out == {"x": "y", "client-0001": "2 nodes state this id; give every node an id of its own"}
    with pytest.raises(ConfigError, match="broken radio"):
        distinct_clients([], {"node 5": "broken radio"})
