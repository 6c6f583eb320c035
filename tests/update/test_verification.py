"""Verification: every way in which a delta can differ from what was asked for is refused by name."""

from dataclasses import replace

import numpy as np
import pytest
from cohorts import build_supernet

from fedofa.finetune.plans import build_plan
from fedofa.supernet.sums import MAX_TERM
from fedofa.types.delta import SubnetDelta
from fedofa.types.errors import DeltaError
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
