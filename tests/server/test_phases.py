"""Federated shrinking: a schedule's subnets meet a fleet's devices, and the teachers that they can hold."""

from collections import Counter

import numpy as np
import pytest
import torch

from fedofa.device.cost import AnalyticCostModel
from fedofa.finetune.plans import build_plan
from fedofa.finetune.recipe import LocalTraining
from fedofa.search.fit import Budgets, FitSearch
from fedofa.shrinking.schedule import ShrinkPhase, ShrinkSchedule
from fedofa.supernet.mobilenet_v3 import MobileNetV3Spec, MobileNetV3Supernet, StageSpec
from fedofa.types.device import DeviceProfile
from fedofa.types.errors import ConfigError, SpaceError
from server.fleet import ClientInfo
from server.phases import TEACHER, FederatedShrinking, deal
from server.planning import Planner

SPEC = MobileNetV3Spec(
    in_channels=1,
    num_classes=4,
    stem_width=8,
    first_width=8,
    stages=(StageSpec(16, 2, "relu", True), StageSpec(16, 1, "relu", False)),
    final_width=16,
    feature_width=16,
    expands=(1, 2, 3),
    depths=(1, 2),
    resolutions=(12, 16),
    norm="group",
)
SUPERNET = MobileNetV3Supernet(SPEC, torch.Generator().manual_seed(0))
SPACE, STATE = SUPERNET.space, SUPERNET.state()
MODEL = AnalyticCostModel()
PLANS = [[lambda blocks: build_plan("full", blocks, parametrised=True)]]
SEARCH = FitSearch(SPACE, SUPERNET.block_costs, [[lambda blocks: build_plan("full", blocks)]], MODEL)
ROUND_SECONDS = 1e6
PLANNER = Planner(SEARCH, LocalTraining(batch_size=8), ROUND_SECONDS, "float32")
LARGEST, SMALLEST = SPACE.largest(), SPACE.smallest()
ELASTIC = {axis.name: axis.values for axis in SPACE.axes}


def training_bytes(subnet, teacher=None) -> int:
    blocks = SUPERNET.costs(subnet, True)
    teacher_blocks = SUPERNET.block_costs(teacher) if teacher is not None else ()
    profile = DeviceProfile("any", 1e12, 1e9, 1e9, 1e9)
    return MODEL.cost(blocks, PLANS[0][0](blocks), profile, PLANNER.work(20), teacher_blocks).training_bytes


MEMORY = {
    "tiny": training_bytes(SMALLEST) + 100.0,  # the smallest subnet and no teacher
    "small": training_bytes(SMALLEST, LARGEST) - 1.0,  # the smallest, and a teacher that is not the largest
    "big": 1e9,
}


def client(number: int, kind: str) -> ClientInfo:
    return ClientInfo(100 + number, f"client-{number:04d}", DeviceProfile(kind, MEMORY[kind], 1e9, 1e6, 1e6), 20, 3)


def shrinking(kinds: str, schedule: ShrinkSchedule, loss_of=lambda state, subnet: 0.0) -> FederatedShrinking:
    names = {"t": "tiny", "s": "small", "b": "big"}
    made = FederatedShrinking(SUPERNET, schedule, PLANS, PLANNER, loss_of, seed=3)
    made.plan([client(number, names[kind]) for number, kind in enumerate(kinds)])
    return made


def cohort_of(made: FederatedShrinking, server_round: int = 1, failed=(), size: int = 20):
    return made.cohort(server_round, STATE, set(failed), size, np.random.default_rng(server_round))


def within(subnet, bound) -> bool:
    return all(
        index <= most
        for axis in SPACE.axes
        for index, most in zip(subnet[axis.name], bound[axis.name], strict=True)
        if index >= 0
    )


def test_shares_are_even_and_the_ends_take_part_where_there_is_room():
    assert Counter(deal(10, 4)) == {0: 3, 1: 2, 2: 3, 3: 2}
    assert deal(4, 4) == [0, 1, 2, 3]
    assert deal(2, 4) == [0, 3]
    assert deal(3, 4) == [0, 2, 3]
    assert deal(1, 4) == [0]
    assert deal(0, 4) == []


@pytest.mark.parametrize("server_round", range(1, 9))
def test_the_sandwich_meets_the_devices(server_round):
    made = shrinking("ttsssbbbbb", ShrinkSchedule.sandwich(SPACE, 8))
    drawn = made.subnets(server_round, STATE)
    assert drawn[0] == LARGEST
    assert drawn[-1] == SMALLEST
    found = cohort_of(made, server_round)
    assert not found.sitting_out
    ids = [item.client.client_id for item in found.members]
    assert ids == sorted(ids)
    assert len(ids) == 10
    able = {"b": 0, "s": 1, "t": 2}
    order = sorted(found.members, key=lambda item: (able[item.client.profile.device_class[0]], item.client.client_id))
    for item, share in zip(order, deal(10, len(drawn)), strict=True):
        assert within(item.fit.subnet, drawn[share]), "what was dealt, or something nowhere larger"
        if item.client.profile.device_class == "big":
            assert item.fit.subnet == drawn[share]
        budgets = Budgets(item.client.profile.memory_bytes, ROUND_SECONDS)
        assert not budgets.exceeded(item.fit.cost)
        assert item.fit.plan.parametrised
        assert training_bytes(item.fit.subnet, item.teacher) == item.fit.cost.training_bytes
        names = [part.name for part in SUPERNET.slice_map(item.fit.subnet, True)]
        assert list(item.fit.plan.trainable) == names, "matrices too"


def test_each_client_holds_the_largest_teacher_that_its_memory_allows_beside_its_subnet():
    made = shrinking("tsbb", ShrinkSchedule.sandwich(SPACE, 4, num_random=0))
    found = {item.client.profile.device_class: item for item in cohort_of(made).members}
    assert found["big"].fit.subnet == LARGEST
    assert found["big"].teacher is None, "what teaches learns from the labels"
    assert (found["tiny"].fit.subnet, found["tiny"].teacher) == (SMALLEST, None)
    assert cohort_of(made).untaught == ["client-0000"]
    small = found["small"]
    assert small.teacher is not None
    macs = lambda subnet: sum(block.macs for block in SUPERNET.block_costs(subnet))  # noqa: E731
    assert macs(small.fit.subnet) < macs(small.teacher) < macs(LARGEST)
    limit = small.client.profile.memory_bytes
    assert training_bytes(small.fit.subnet, small.teacher) <= limit < training_bytes(small.fit.subnet, LARGEST)
    larger = cohort_of(shrinking("bbb", ShrinkSchedule.sandwich(SPACE, 4, num_random=0)))
    assert Counter(item.teacher for item in larger.members) == {None: 2, LARGEST: 1}


def test_progressive_phases_take_who_can_hold_them_and_the_frozen_largest_teaches():
    schedule = ShrinkSchedule.progressive(SPACE, 12)
    made = shrinking("ttssbb", schedule)
    assert schedule.phases[0].name == "largest"
    assert set(made.fleets[0].assignments) == {"client-0004", "client-0005"}
    assert "memory is exceeded" in made.fleets[0].sitting_out["client-0000"]
    assert len(made.fleets[-1].assignments) == 6
    first = cohort_of(made)
    assert {SPACE.values(item.fit.subnet, "depth") for item in first.members} == {(2, 2)}
    assert not first.untaught
    assert made.entered(1, STATE) is STATE
    start = schedule.phases[0].steps + 1
    kept = made.entered(start, STATE)
    assert set(kept.moments[TEACHER]) == set(STATE.tensors)
    assert kept.digest() == STATE.digest()
    later = STATE.__class__(9, {name: 2 * value for name, value in STATE.tensors.items()}, {}, kept.moments)
    assert made.entered(12, later) is later, "the teacher stays the one of the first such phase"
    teacher = made.teacher_state(12, later)
    assert all(np.array_equal(teacher.tensors[name], STATE.tensors[name]) for name in STATE.tensors)
    assert teacher.version == 9
    last = cohort_of(made, 12)
    taught = {item.client.client_id for item in last.members if item.teacher == LARGEST}
    assert taught == {"client-0004", "client-0005"}
    assert set(last.untaught) == {f"client-{number:04d}" for number in range(4)}, "no smaller one was trained"


def test_channels_are_ordered_in_the_first_round_of_a_phase_that_says_so_and_a_repeat_finds_the_same():
    schedule = ShrinkSchedule.progressive(SPACE, 12)
    starts = [sum(phase.steps for phase in schedule.phases[:index]) for index in range(len(schedule.phases))]
    first = next(start for start, phase in zip(starts, schedule.phases, strict=True) if phase.order_channels)
    made = shrinking("bb", schedule)
    given = dict(made.supernet.ordering)
    try:
        made.supernet.set_ordering({})
        assert not made.entered(first, STATE).ordering
        state = made.entered(first + 1, STATE)
        assert state.ordering
        assert state.ordering.keys() == made.supernet.ordering.keys()
        table = made.supernet.parameter_table(LARGEST)
        read = next(item for item in table if item.name.endswith("project.conv.weight") and item.groups[1])
        weight = STATE.tensors[read.name]
        importance = np.abs(weight).sum(axis=(0, 2, 3)).reshape(-1, 8).sum(axis=1)  # group norm: whole groups move
        runs = state.ordering[str(read.groups[1])].reshape(-1, 8)[:, 0] // 8
        assert (np.diff(importance[runs]) <= 0).all()
        again = made.entered(first + 1, state)
        assert again.digest() == state.digest()
    finally:
        made.supernet.set_ordering(given)


def test_the_schedule_gives_the_rates_and_the_names_of_the_rounds():
    schedule = ShrinkSchedule.progressive(SPACE, 40)
    made = shrinking("b", schedule)
    rates = [made.rate(number) for number in range(1, 41)]
    assert rates == [schedule.phases[i].rate(w) for i, w in (schedule.phase_at(step) for step in range(40))]
    assert made.phase_of(1).name == "largest"
    with pytest.raises(ConfigError, match="beyond the schedule"):
        made.rate(41)


def test_in_turns_a_round_has_one_subnet_and_everybody_trains_it_or_what_lies_within():
    made = shrinking("tsbb", ShrinkSchedule.turns(SPACE, 8, num_random=2))
    rounds = [made.subnets(number, STATE) for number in range(1, 9)]
    assert [drawn for number, drawn in enumerate(rounds) if number % 4 == 0] == [[LARGEST]] * 2
    assert [drawn for number, drawn in enumerate(rounds) if number % 4 == 3] == [[SMALLEST]] * 2
    for number, (subnet,) in enumerate(rounds, 1):
        found = cohort_of(made, number)
        assert len(found.members) == 4
        assert all(within(item.fit.subnet, subnet) and item.teacher is None for item in found.members)
        assert {item.fit.subnet for item in found.members if item.client.profile.device_class == "big"} == {subnet}
        assert not found.untaught


def test_in_taught_turns_all_but_the_largest_get_a_teacher():
    made = shrinking("bbbb", ShrinkSchedule.turns(SPACE, 8, num_random=2, teacher_share=0.5))
    taught = [[item.teacher is not None for item in cohort_of(made, number).members] for number in range(1, 9)]
    assert taught[0] == taught[4] == [False] * 4
    assert taught[3] == taught[7] == [True] * 4


def test_a_trained_teacher_is_the_spaces_largest_in_a_phase_without_it():
    largest = ShrinkPhase("largest", 2, {})
    short = ShrinkPhase("short", 2, {"depth": (1,), "kernel": (3, 5)}, teacher="trained")
    made = shrinking("bb", ShrinkSchedule((largest, short)))
    assert {item.teacher for item in cohort_of(made, 3).members} == {LARGEST}


def test_a_repeated_round_asks_others_for_the_same_subnets():
    made = shrinking("bbbbbb", ShrinkSchedule.sandwich(SPACE, 8))
    first = cohort_of(made, 2, size=3)
    names = {item.client.client_id for item in first.members}
    second = cohort_of(made, 2, failed=names, size=3)
    assert not names & {item.client.client_id for item in second.members}
    assert {item.fit.subnet for item in first.members} == {item.fit.subnet for item in second.members}


def test_attentive_sampling_compares_candidates_on_the_servers_images():
    asked = []

    def loss_of(state, subnet) -> float:
        asked.append(subnet)
        return -float(np.sum(subnet["kernel"]))

    best, worst = (
        shrinking("b", ShrinkSchedule.attentive(SPACE, 9, candidates=5, prefer=prefer), loss_of)
        for prefer in ("best", "worst")
    )
    kernels = [
        sum(np.sum(subnet["kernel"]) for number in range(1, 10) for subnet in made.subnets(number, STATE))
        for made in (best, worst)
    ]
    assert asked
    assert kernels[0] > kernels[1]


def test_nobody_for_a_phase_and_values_that_are_not_there_are_refused():
    with pytest.raises(ConfigError, match=r"shrinking phase 'largest': no client can train any subnet: .*memory"):
        shrinking("ttss", ShrinkSchedule.progressive(SPACE, 12))
    phase = ShrinkPhase("wide", 3, {**ELASTIC, "kernel": (9,)})
    with pytest.raises(SpaceError, match=r"shrinking phase 'wide', axis 'kernel': expected values out of \[3, 5, 7\]"):
        shrinking("b", ShrinkSchedule((phase,)))


def test_who_can_train_in_the_phase_but_nothing_below_its_subnet_sits_out_by_name():
    made = shrinking("tb", ShrinkSchedule.sandwich(SPACE, 4, num_random=0))
    made.planner = Planner(SEARCH, LocalTraining(batch_size=8), 1e-9, "float32")  # a round is shorter now
    found = cohort_of(made)
    assert not found.members
    assert set(found.sitting_out) == {"client-0000", "client-0001"}
    assert all("round time" in why for why in found.sitting_out.values())
