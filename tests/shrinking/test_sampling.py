"""Drawing subnets: what a phase allows, the sandwich, MACs targets, best and worst of k."""

import numpy as np
import pytest
from cohorts import build_supernet
from hypothesis import given, settings
from hypothesis import strategies as st

from fedofa.shrinking.sampling import PhaseSampler
from fedofa.shrinking.schedule import ShrinkPhase, ShrinkSchedule
from fedofa.types.errors import ConfigError, InfeasibilityError, SpaceError
from fedofa.types.spaces import PUBLISHED_SPACES

SUPERNET = build_supernet()
SPACE = SUPERNET.space
ALL = {axis.name: axis.values for axis in SPACE.axes}


def macs_of(subnet) -> int:
    return sum(block.macs for block in SUPERNET.block_costs(subnet))


def sampler(**settings) -> PhaseSampler:
    return PhaseSampler(SPACE, ShrinkPhase(**{"name": "a", "steps": 1, "elastic": ALL, **settings}), macs_of)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["mobilenet_v3", "proxyless", "resnet"]))
def test_every_phase_draws_what_it_allows_and_nothing_else(seed, family):
    space = PUBLISHED_SPACES[family]
    rng = np.random.default_rng(seed)
    for phase in ShrinkSchedule.progressive(space, 100).phases:
        phases_sampler = PhaseSampler(space, phase, lambda subnet: 1)
        drawn = phases_sampler.draw(rng)
        assert 1 <= len(drawn) <= phase.num_random
        for subnet in (*drawn, phases_sampler.smallest(), phases_sampler.largest()):
            space.check(subnet)
            for axis in space.axes:
                allowed = phase.elastic.get(axis.name, axis.values[-1:])
                assert {value for value in space.values(subnet, axis.name) if value is not None} <= set(allowed)
        assert phases_sampler.largest() == space.largest()


def test_all_that_is_allowed_is_drawn():
    phases_sampler = sampler(elastic={"kernel": (5, 7), "depth": (1, 2)})
    drawn = {subnet for seed in range(300) for subnet in phases_sampler.draw(np.random.default_rng(seed))}
    assert len(drawn) == (2 + 4) ** 2  # a stage of depth 1 has two kernels to choose from, of depth 2 four
    kernels = {value for subnet in drawn for value in SPACE.values(subnet, "kernel")}
    assert kernels == {5, 7, None}


def test_the_sandwich_is_largest_random_smallest_without_repetition():
    drawn = sampler(sandwich=True, num_random=3, teacher="in_place").draw(np.random.default_rng(0))
    assert drawn[0] == SPACE.largest()
    assert drawn[-1] == SPACE.smallest()
    assert len(drawn) == len(set(drawn)) == 5
    fixed = sampler(sandwich=True, num_random=3, elastic={})
    assert fixed.draw(np.random.default_rng(0)) == (SPACE.largest(),)


def test_in_turns_one_subnet_learns_a_step_and_every_one_has_its_turn():
    in_turns, rng = sampler(sandwich=True, num_random=2, turns=True), np.random.default_rng(0)
    steps = [in_turns.draw(rng, step=step) for step in range(8)]
    assert [len(drawn) for drawn in steps] == [1] * 8
    (subnets,) = zip(*steps, strict=True)
    assert subnets[0] == subnets[4] == SPACE.largest()
    assert subnets[3] == subnets[7] == SPACE.smallest()
    assert len(set(subnets)) == 2 + 4, "drawn anew for every turn"
    assert sampler(num_random=1, turns=True).draw(np.random.default_rng(5), step=9) == sampler().draw(
        np.random.default_rng(5)
    )


@pytest.mark.parametrize("prefer", ["best", "worst"])
def test_candidates_of_one_size_are_compared_and_the_best_or_worst_trains(prefer):
    asked = []

    def score_of(subnet) -> float:
        asked.append(subnet)
        return float(np.sum(subnet["kernel"]))

    phases_sampler = sampler(candidates=6, prefer=prefer)
    for seed in range(20):
        asked.clear()
        (chosen,) = phases_sampler.draw(np.random.default_rng(seed), score_of)
        assert len(asked) == 6
        pick = max if prefer == "best" else min
        assert np.sum(chosen["kernel"]) == pick(np.sum(subnet["kernel"]) for subnet in asked)
        macs = [macs_of(subnet) for subnet in asked]
        assert max(macs) / min(macs) < 1.3, "the candidates cost about the same"


def test_targets_are_met_over_the_whole_range():
    low, high = macs_of(SPACE.smallest()), macs_of(SPACE.largest())
    for target in np.linspace(low, high, 7):
        phases_sampler = sampler(macs_targets=(float(target),), macs_tolerance=0.05)
        found = [macs_of(phases_sampler.draw(np.random.default_rng(seed))[0]) for seed in range(20)]
        assert np.median(np.abs(np.array(found) - target)) <= 0.05 * target
        assert np.abs(np.array(found) - target).max() <= 0.2 * target
    for target, end in ((low, SPACE.smallest()), (high, SPACE.largest())):
        phases_sampler = sampler(macs_targets=(float(target),), macs_tolerance=0.001)
        assert any(phases_sampler.draw(np.random.default_rng(seed)) == (end,) for seed in range(20))


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_an_impossible_target_names_the_smallest_subnet(factor):
    low, high = macs_of(SPACE.smallest()), macs_of(SPACE.largest())
    target = low * factor if factor < 1 else high * factor
    with pytest.raises(InfeasibilityError) as caught:
        sampler(macs_targets=(target,))
    message = str(caught.value)
    assert SPACE.smallest().digest() in message
    assert f"{low:,}" in message
    assert f"{high:,}" in message


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(SpaceError, match="axis 'kernel'"):
        sampler(elastic={"kernel": (4,)})
    with pytest.raises(ConfigError, match="2 candidates need a score"):
        sampler(candidates=2).draw(np.random.default_rng(0))
