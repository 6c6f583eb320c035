"""Many knapsack problems at once: choices fit, come close to the best of all, and bounds hold."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedofa.search.knapsack import Knapsacks, Solution, highest

OPTIONS, GROUPS, LIMITS, PROBLEMS = 3, 5, 2, 6
EVERY = np.array(list(itertools.product(range(OPTIONS), repeat=GROUPS)), np.int16)
LEAST = 0.85
"""Of the best choice's gain, after one round of filling, on average."""
ROUNDS = ((50.0, 8), (4.0, 4))


def problems(seed, additive=1.0):
    """Whose first options are free and gain nothing; dearer options gain more, and roughly half of all fits."""
    rng = np.random.default_rng(seed)
    costs = rng.uniform(0.1, 1.0, (LIMITS, OPTIONS, GROUPS, PROBLEMS)).cumsum(axis=1)
    gains = costs.mean(axis=0) * rng.uniform(0.5, 2.0, costs.shape[1:])
    costs[:, 0], gains[0] = 0, 0
    share = np.full((LIMITS, PROBLEMS), additive)
    room = share * 0.4 * costs[:, -1].sum(axis=1) + (1 - share) * 0.8 * costs[:, -1].max(axis=1)
    items = Knapsacks(*(part.astype(np.float32) for part in (gains, costs, room, share)))
    return items.adding_up(items.additive)


def start():
    return np.zeros((GROUPS, PROBLEMS), np.int64)


def relaxed(items):
    return items.relaxed(start(), items.typical_price(start()), ROUNDS)


def every_gain_and_fit(items, problem):
    """Of all choices of one problem, gains and whether they fit."""
    groups = np.arange(GROUPS)
    costs = items.costs[:, EVERY, groups, problem]
    total, greatest, share = costs.sum(axis=2), costs.max(axis=2), items.additive[:, problem, None]
    fits = (share * total + (1 - share) * greatest <= items.room[:, problem, None] - 1e-5).all(axis=0)
    return items.gains[EVERY, groups, problem].sum(axis=1), fits


@given(st.integers(0, 500), st.sampled_from([0.0, 0.5, 1.0]))
def test_what_is_found_fits_and_is_seldom_far_from_the_best_choice_that_fits(seed, additive):
    items = problems(seed, additive)
    best = relaxed(items)
    assert (items.left(best.chosen) >= 0).all()
    filled, changed = items.filled(best, among=OPTIONS * GROUPS, number=1)
    ratios = []
    for problem, (gain, chosen) in enumerate(zip(best.gain, best.chosen.T, strict=True)):
        gains, fits = every_gain_and_fit(items, problem)
        assert gain == pytest.approx(items.gains[chosen, np.arange(GROUPS), problem].sum(), rel=1e-5)
        assert gain <= gains[fits].max() * (1 + 1e-4)
        after = items.gains[changed[:, filled == problem].T, np.arange(GROUPS), problem].sum(axis=1)
        ratios.append(max(gain, after.max(initial=0)) / gains[fits].max())
    assert np.mean(ratios) > LEAST


@given(st.integers(0, 500))
def test_filling_only_betters_and_stays_within_the_limits(seed):
    items = problems(seed)
    best = relaxed(items)
    problem, chosen = items.filled(best, among=10, number=4)
    for number, options in zip(problem, chosen.T, strict=True):
        _, fits = every_gain_and_fit(items, number)
        assert (options != best.chosen[:, number]).sum() in (1, 2)
        assert items.gains[options, np.arange(GROUPS), number].sum() > best.gain[number]
        assert fits[(options == EVERY).all(axis=1)].all() or items.left(best.chosen)[:, number].min() < 1e-4
    assert np.bincount(problem, minlength=PROBLEMS).max() <= 4


def test_filling_finds_the_best_change_of_one_or_two_groups():
    items = problems(3)
    chosen = start().astype(np.int16)
    nothing = Solution(chosen, np.zeros(PROBLEMS, np.float32), np.zeros(PROBLEMS), np.ones((LIMITS, PROBLEMS)))
    problem, found = items.filled(nothing, among=OPTIONS * GROUPS, number=1)
    assert problem.tolist() == list(range(PROBLEMS))
    for number, options in enumerate(found.T):
        gains, fits = every_gain_and_fit(items, number)
        near = fits & ((EVERY != 0).sum(axis=1) <= 2)
        assert items.gains[options, np.arange(GROUPS), number].sum() == pytest.approx(gains[near].max(), rel=1e-5)


@given(st.integers(0, 500), st.floats(0.0, 3.0))
def test_worth_at_any_price_bounds_what_fits(seed, level):
    items = problems(seed)
    price, weights = np.full(PROBLEMS, level, np.float32), np.full((LIMITS, PROBLEMS), 1 / LIMITS, np.float32)
    bound = highest(items.gains, items.weighted(weights), price) + price * (items.room * weights).sum(axis=0)
    for problem in range(PROBLEMS):
        gains, fits = every_gain_and_fit(items, problem)
        assert gains[fits].max() <= bound[problem] * (1 + 1e-4) + 1e-4


@pytest.mark.parametrize("additive", [0.0, 0.3, 1.0])
def test_how_far_costs_add_up_is_told_from_one_choice(additive):
    items = problems(1, additive)
    chosen = np.full((GROUPS, PROBLEMS), 1)
    found = problems(1, 1.0).calibrated(chosen, problems(1, 1.0).room - items.room + items.left(chosen))
    assert found.additive == pytest.approx(items.additive, abs=1e-4)


def test_options_that_a_group_has_not_are_never_chosen():
    items = problems(2)
    items.gains[2, 1] = -np.inf
    best = relaxed(items)
    _, changed = items.filled(best, among=OPTIONS * GROUPS, number=5)
    assert (best.chosen[1] < 2).all()
    assert (changed[1] < 2).all()
    assert np.isfinite(best.gain).all()


def test_problems_without_groups_or_none_at_all_have_no_choice_to_make():
    for groups, number in ((0, PROBLEMS), (GROUPS, 0)):
        gains, costs = np.zeros((OPTIONS, groups, number)), np.zeros((LIMITS, OPTIONS, groups, number))
        items = Knapsacks(gains, costs, np.ones((LIMITS, number)), np.ones((LIMITS, number)))
        chosen = np.zeros((groups, number), np.int64)
        best = items.relaxed(chosen, items.typical_price(chosen), ROUNDS)
        problem, changed = items.filled(best, among=10, number=4)
        assert best.gain.tolist() == [0.0] * number
        assert len(problem) == 0 and changed.shape == (groups, 0)
