"""Verification: every way in which a delta can differ from what was asked for is refused by name."""

from dataclasses import replace

import numpy as np
import pytest
from cohorts import build_supernet

from fedofa.aggregation.fold import FoldSums
from fedofa.finetune.plans import build_plan
from fedofa.supernet.sums import MAX_TERM
from fedofa.types.delta import LowRank, SubnetDelta
from fedofa.types.errors import DeltaError
from fedofa.types.plan import FineTunePlan
from fedofa.update.verification import Expectation, verify_delta

SUPERNET = build_supernet()
SUBNET = SUPERNET.space.subnet(kernel=3, expand=2)
PLAN = build_plan("last_blocks(1)", SUPERNET.block_costs(SUBNET))
SLICES = SUPERNET.slice_map(SUBNET)
EXPECTED = Expectation("client-7", 5, 4, SUBNET, PLAN, 100, SLICES)
NAME = "classifier.weight"


def delta(**changes) -> SubnetDelta:
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal(SLICES[name].shape).astype(np.float32) for name in PLAN.trainable}
    return replace(SubnetDelta("client-7", 5, SUBNET, PLAN.digest(), 4, 100, 12, weights), **changes)


def with_values(name: str, values: np.ndarray) -> SubnetDelta:
    return delta(weights={**delta().weights, name: values})


def with_one(value: float) -> SubnetDelta:
    values = delta().weights[NAME].copy()
    values[1, 2] = value
    return with_values(NAME, values)


def refused(found: SubnetDelta, *parts: str, expected: Expectation = EXPECTED) -> None:
    with pytest.raises(
        DeltaError, match=r"delta of client 'client-7' for round 5 refused: .*; it is not folded"
    ) as why:
        verify_delta(found, expected)
    for part in parts:
        assert part in str(why.value)


def test_what_was_asked_for_is_accepted():
    verify_delta(delta(), EXPECTED)
    verify_delta(delta(num_steps=1), EXPECTED)
    zeros = {name: np.zeros(SLICES[name].shape, np.float32) for name in reversed(PLAN.trainable)}
    verify_delta(delta(weights=zeros), EXPECTED)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"client_id": "client-8"}, ["client id: expected 'client-7', found 'client-8'"]),
        ({"round": 6}, ["round: expected 5, found 6"]),
        ({"base_version": 3}, ["base version: expected 4, found 3"]),
        (
            {"subnet": SUPERNET.space.largest()},
            ["subnet: expected", SUBNET.digest(), SUPERNET.space.largest().digest()],
        ),
        ({"plan_digest": "0" * 16}, ["plan: expected", PLAN.digest(), "0" * 16]),
        ({"num_examples": 1000}, ["number of examples: expected 100, found 1000"]),
        ({"num_steps": 0}, ["number of steps: expected at least 1, found 0"]),
        ({"num_steps": -1}, ["number of steps: expected at least 1, found -1"]),
        ({"weights": {}}, [f"missing {len(PLAN.trainable)}", "unknown 0"]),
    ],
)
def test_another_field_is_refused_with_both_values(changes, parts):
    refused(delta(**changes), *parts)


def test_a_missing_parameter_is_named():
    weights = dict(delta().weights)
    del weights[NAME]
    refused(delta(weights=weights), f"missing 1 ['{NAME}']", "unknown 0 []")


@pytest.mark.parametrize("name", ["no.such.weight", "stem.conv.weight", "stages.1.0.depthwise.matrix_7to5"])
def test_a_parameter_that_the_plan_does_not_train_is_named(name):
    values = np.zeros(SUPERNET.state().tensors.get(name, np.zeros(1)).shape, np.float32)
    refused(with_values(name, values), "missing 0 []", f"unknown 1 ['{name}']")


@pytest.mark.parametrize("name", PLAN.trainable)
def test_another_shape_is_refused_for_every_parameter(name):
    shape = SLICES[name].shape
    for wrong in ((*shape, 1), shape[1:], (shape[0] + 1, *shape[1:]), (1,) * len(shape)):
        refused(with_values(name, np.zeros(wrong, np.float32)), f"'{name}': expected shape {shape}, found {wrong}")


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32, bool])
def test_another_dtype_is_refused(dtype):
    refused(with_values(NAME, np.zeros(SLICES[NAME].shape, dtype)), f"'{NAME}': expected float32, found")


@pytest.mark.parametrize("name", PLAN.trainable)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_wherever_it_is(name, value):
    values = delta().weights[name].copy()
    values.flat[-1] = value
    refused(with_values(name, values), f"parameter '{name}': 1 of {values.size} values are not finite")


def test_nan_does_not_hide_behind_infinity():
    values = delta().weights[NAME].copy()
    values.flat[:3] = np.nan, np.inf, -np.inf
    refused(with_values(NAME, values), f"3 of {values.size} values are not finite")


def test_a_change_out_of_the_folds_range_is_refused():
    limit = np.float32(MAX_TERM / 100)
    verify_delta(with_one(np.nextafter(limit, np.float32(0))), EXPECTED)
    for value in (limit * 1.001, -limit * 1.001):
        refused(with_one(value), f"'{NAME}'", "by 100 examples", "out of the fold's range")


def test_what_is_accepted_can_be_folded():
    """The limit is the fold's own: the largest accepted change does not overflow its sums."""
    found = with_one(np.nextafter(np.float32(MAX_TERM / 100), np.float32(0)))
    verify_delta(found, EXPECTED)
    SLICES.accumulate({}, found.weights, found.num_examples)


def test_another_plan_of_the_same_subnet_is_refused_by_its_digest():
    other = replace(PLAN, statistics="frozen")
    refused(delta(plan_digest=other.digest()), "plan: expected", PLAN.digest())
    verify_delta(delta(plan_digest=other.digest()), replace(EXPECTED, plan=other))


@pytest.mark.parametrize("num_examples", [0, -99])
def test_a_weight_that_is_not_positive_is_refused(num_examples):
    refused(delta(num_examples=num_examples), "examples", expected=replace(EXPECTED, num_examples=num_examples))


def test_the_weight_is_the_one_stated_at_the_introduction_whatever_the_delta_claims():
    for claimed in (0, -99, 101):
        refused(delta(num_examples=claimed), f"number of examples: expected 100, found {claimed}")


RANKED = build_plan("lora(2)", SUPERNET.block_costs(SUBNET))
PARTLY = FineTunePlan("part", (NAME, "final.conv.weight"), fractions=((NAME, 0.25), ("final.conv.weight", 0.5)))


def ranked(**changes) -> SubnetDelta:
    rng = np.random.default_rng(0)
    pairs = {}
    for name in RANKED.low_rank:
        left, right = RANKED.factor_shapes(SLICES[name].shape)
        pairs[name] = LowRank(*(rng.standard_normal(shape).astype(np.float32) for shape in (left, right)))
    found = SubnetDelta("client-7", 5, SUBNET, RANKED.digest(), 4, 100, 12, {}, low_rank=pairs)
    return replace(found, **changes)


def with_pair(left: np.ndarray, right: np.ndarray) -> SubnetDelta:
    return ranked(low_rank={**ranked().low_rank, NAME: LowRank(left, right)})


def test_factors_that_were_asked_for_are_accepted_and_can_be_folded():
    verify_delta(ranked(), replace(EXPECTED, plan=RANKED))
    sums = FoldSums(SUPERNET.slice_map)
    sums.add(ranked())
    assert sums.num_deltas == 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_factors_of_another_rank_or_shape_are_refused(side):
    expected = replace(EXPECTED, plan=RANKED)
    pair = ranked().low_rank[NAME]
    left, right = pair.left, pair.right
    for shape in ((left.shape[0], 3), (3, right.shape[1]), (left.shape[0],), (left.shape[0], 2, 1)):
        wrong = np.zeros(shape, np.float32)
        found = with_pair(wrong, right) if side == "left" else with_pair(left, wrong)
        refused(found, f"'{NAME}, {side} factor': expected shape", f"found {shape}", expected=expected)
    higher = with_pair(np.zeros((left.shape[0], 3), np.float32), np.zeros((3, right.shape[1]), np.float32))
    refused(higher, f"expected shape {left.shape}", expected=expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_factor_that_is_not_finite_is_refused(side, value):
    pair = ranked().low_rank[NAME]
    values = {"left": pair.left.copy(), "right": pair.right.copy()}
    values[side].flat[-1] = value
    refused(with_pair(**values), f"'{NAME}, {side} factor': 1 of", expected=replace(EXPECTED, plan=RANKED))


def test_factors_whose_product_is_out_of_the_folds_range_are_refused():
    pair = ranked().low_rank[NAME]
    large = np.float32(200)
    assert large * 100 < MAX_TERM
    found = with_pair(np.full_like(pair.left, large), np.full_like(pair.right, large))
    refused(found, f"'{NAME}': a change of 8e+04 by 100 examples", expected=replace(EXPECTED, plan=RANKED))


def test_factors_and_dense_changes_do_not_stand_for_each_other():
    expected = replace(EXPECTED, plan=RANKED)
    refused(delta(plan_digest=RANKED.digest()), "parameters: expected the plan's 0", expected=expected)
    refused(ranked(low_rank={}), f"weights of low rank: expected the plan's {len(RANKED.low_rank)}", expected=expected)
    refused(delta(low_rank=ranked().low_rank), "weights of low rank: expected the plan's 0")
    float64 = {name: LowRank(pair.left.astype(float), pair.right) for name, pair in ranked().low_rank.items()}
    refused(ranked(low_rank=float64), "left factor': expected float32, found float64", expected=expected)


def test_a_part_must_be_exactly_the_plans():
    shapes = {name: PARTLY.part_shape(name, SLICES[name].shape) for name in PARTLY.trainable}
    assert shapes == {NAME: (5, 8), "final.conv.weight": (24, 8, 1, 1)}
    expected = replace(EXPECTED, plan=PARTLY)
    weights = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    fine = delta(weights=weights, plan_digest=PARTLY.digest())
    verify_delta(fine, expected)
    for wrong in ((5, 9), (5, 7), (4, 8), SLICES[NAME].shape):
        found = replace(fine, weights={**weights, NAME: np.ones(wrong, np.float32)})
        refused(found, f"'{NAME}': expected shape (5, 8), found {wrong}", expected=expected)
