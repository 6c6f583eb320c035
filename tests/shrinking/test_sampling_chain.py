"""Drawing subnets of a chain, whose positions have unlike values: what a phase allows there, largest and smallest."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedofa.shrinking.sampling import PhaseSampler
from fedofa.shrinking.schedule import ShrinkPhase, ShrinkSchedule
from fedofa.supernet.chain import BlockSize, ChainSpec, ChainSupernet

SPEC = ChainSpec(
    (
        BlockSize(16, 7, 4, 2),
        BlockSize(16, 7, 4),
        BlockSize(16, 3, 4),
        BlockSize(24, 5, 4, 2),
        BlockSize(32, 7, 4, 2),
        BlockSize(32, 7, 4),
        BlockSize(32, 7, 4),
        BlockSize(32, 7, 4),
    ),
    in_channels=1,
    num_classes=5,
    stem_width=8,
    feature_width=16,
    kernels=(3, 5, 7),
    fractions=(0.5, 1.0),
    resolutions=(16, 20),
)
SUPERNET = ChainSupernet(SPEC)
SPACE = SUPERNET.space
OWN_KERNELS = (7, 7, 5, 7, 7, 7, 7)
OWN_DEPTHS = (3, 4)


def sampler(elastic) -> PhaseSampler:
    macs_of = lambda subnet: sum(block.macs for block in SUPERNET.block_costs(subnet))  # noqa: E731
    return PhaseSampler(SPACE, ShrinkPhase("a", 1, elastic, num_random=4), macs_of)


def drawn(phases_sampler, number=200):
    return {subnet for seed in range(number) for subnet in phases_sampler.draw(np.random.default_rng(seed))}


def test_the_space_has_unlike_positions():
    assert SPACE.values(SPACE.largest(), "kernel") == OWN_KERNELS
    assert SPACE.values(SPACE.largest(), "depth") == OWN_DEPTHS


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_every_phase_of_progressive_shrinking_draws_subnets_of_the_space(seed):
    schedule = ShrinkSchedule.progressive(SPACE, 100)
    rng = np.random.default_rng(seed)
    for phase in schedule.phases:
        phases_sampler = PhaseSampler(SPACE, phase, lambda subnet: 1)
        for subnet in phases_sampler.draw(rng):
            SPACE.check(subnet)
        assert phases_sampler.largest() == SPACE.largest()
        SPACE.check(phases_sampler.smallest())
    assert phases_sampler.smallest() == SPACE.smallest()
    assert PhaseSampler(SPACE, schedule.phases[0], lambda subnet: 1).smallest() == SPACE.subnet(resolution=16)


def test_an_axis_that_is_not_elastic_stays_at_each_positions_own_largest():
    for subnet in drawn(sampler({"depth": (2, 3, 4)})):
        kernels = SPACE.values(subnet, "kernel")
        assert all(found in (None, own) for found, own in zip(kernels, OWN_KERNELS, strict=True))


def test_a_position_below_all_allowed_values_keeps_its_own_largest():
    phases_sampler = sampler({"kernel": (7,), "depth": (4,)})
    assert drawn(phases_sampler) == {SPACE.largest()}
    assert phases_sampler.smallest() == phases_sampler.largest() == SPACE.largest()
    allowed = drawn(sampler({"kernel": (3, 7), "depth": (4,)}))
    kernels = {tuple(SPACE.values(subnet, "kernel")) for subnet in allowed}
    assert {row[2] for row in kernels} == {3}, "5 is not allowed, and the position has no 7"
    assert {row[0] for row in kernels} == {3, 7}
    assert {tuple(SPACE.values(subnet, "depth")) for subnet in allowed} == {OWN_DEPTHS}


def test_with_everything_elastic_every_value_of_every_position_is_drawn():
    phases_sampler = sampler({axis.name: axis.values for axis in SPACE.axes})
    subnets = drawn(phases_sampler, 400)
    for axis in SPACE.axes:
        for position in range(len(axis.controls)):
            found = {SPACE.values(subnet, axis.name)[position] for subnet in subnets} - {None}
            assert found == set(axis.choices(position)), (axis.name, position)
    assert phases_sampler.largest() == SPACE.largest()
    assert phases_sampler.smallest() == SPACE.smallest()


@pytest.mark.parametrize("elastic", [{axis.name: axis.values for axis in SPACE.axes}, {"kernel": (3, 7)}])
def test_what_is_below_a_drawn_subnet_is_allowed_and_nowhere_larger(elastic):
    phases_sampler = sampler(elastic)
    for top in drawn(phases_sampler, 20):
        inner = phases_sampler.below(top)
        assert phases_sampler.outer(inner.largest()) == top
        rng = np.random.default_rng(0)
        for subnet in {phases_sampler.outer(inner.sample(rng)) for _ in range(20)}:
            SPACE.check(subnet)
            for axis in SPACE.axes:
                allowed = elastic.get(axis.name, axis.values[-1:])
                for position, (value, most) in enumerate(
                    zip(SPACE.values(subnet, axis.name), SPACE.values(top, axis.name), strict=True)
                ):
                    assert value is None or (most is not None and value <= most)
                    assert value is None or value in allowed or value == axis.choices(position)[-1]
        assert list(inner.neighbours(inner.smallest(), rng)), "a search can move in it"
