"""Fine-tuning plans: round trip, digest and refusals."""

import json
from dataclasses import replace

import pytest

from fedofa.types.errors import ConfigError
from fedofa.types.plan import LEVERS, FineTunePlan

PLAN = FineTunePlan("bias", ("stem.norm.bias", "classifier.weight"), (("stages.1.0", "stages.1.1"),), "frozen")


def test_round_trip():
    for plan in (PLAN, replace(PLAN, parametrised=True)):
        assert FineTunePlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_the_digest_is_the_same_on_every_machine_and_release():
    assert PLAN.digest() == "7b76965d35fe7a5b"


@pytest.mark.parametrize(
    "change",
    [
        {"name": "full"},
        {"trainable": PLAN.trainable[::-1]},
        {"recompute": ()},
        {"recompute": (("stages.1.0",), ("stages.1.1",))},
        {"statistics": "batch"},
        {"parametrised": True},
        {"lean": True},
        {"micro_batch": 2},
        {"fractions": ((PLAN.trainable[0], 0.5),)},
        {"low_rank": ("another.weight",), "rank": 2},
        {"lean": True, "kept": "int8"},
        {"lean": True, "kept_fraction": 0.5},
        {"fused_step": True},
        {"feature_cache": True},
    ],
)
def test_the_digest_covers_everything(change):
    assert replace(PLAN, **change).digest() != PLAN.digest()


@pytest.mark.parametrize("missing", ["name", "trainable", "recompute", "statistics", "lean", "kept"])
def test_what_is_missing_is_named(missing):
    value = PLAN.to_json()
    del value[missing]
    with pytest.raises(ConfigError, match=f"not a fine-tuning plan: .*{missing}"):
        FineTunePlan.from_json(value)


@pytest.mark.parametrize("value", [None, 5, "abc", ["abc"], {**PLAN.to_json(), "trainable": 3}])
def test_from_json_refuses_what_is_not_a_plan(value):
    with pytest.raises(ConfigError, match="not a fine-tuning plan"):
        FineTunePlan.from_json(value)


SETTINGS = {
    "micro_batch": {"micro_batch": 1},
    "recompute": {"recompute": (("stages.1.0",),)},
    "lean": {"lean": True},
    "compressed": {"kept": "int8"},
    "pruned": {"kept_fraction": 0.5},
    "fused_step": {"fused_step": True},
    "feature_cache": {"feature_cache": True},
}


@pytest.mark.parametrize("lever", LEVERS)
def test_a_plan_says_which_levers_it_pulls(lever):
    """Which go together is tested where they train: tests/finetune/test_lever_table.py."""
    pulled = {lever} | ({"lean"} if lever in ("compressed", "pruned") else set())
    settings = {name: value for item in pulled for name, value in SETTINGS[item].items()}
    plan = FineTunePlan("p", ("w",), **settings)
    assert plan.levers == pulled
    assert FineTunePlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kept": "int2", "lean": True}, "kept: expected one of .* found 'int2'"),
        ({"kept_fraction": 0.0, "lean": True}, r"kept_fraction: expected a number in \(0, 1\], found 0.0"),
        ({"micro_batch": -1}, "micro_batch: expected at least 0, found -1"),
    ],
)
def test_levers_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        FineTunePlan("p", ("w",), **settings)
