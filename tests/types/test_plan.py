"""Fine-tuning plans: round trip, digest and refusals."""

import json
from dataclasses import replace

import pytest

from fedofa.types.errors import ConfigError
from fedofa.types.plan import FineTunePlan

PLAN = FineTunePlan("bias", ("stem.norm.bias", "classifier.weight"), ("stages.1.0",), "frozen")


def test_round_trip():
    for plan in (PLAN, replace(PLAN, parametrised=True)):
        assert FineTunePlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_the_digest_is_the_same_on_every_machine_and_release():
    assert PLAN.digest() == "c9d40648d465f21c"


@pytest.mark.parametrize(
    "change",
    [
        {"name": "full"},
        {"trainable": PLAN.trainable[::-1]},
        {"recompute": ()},
        {"statistics": "batch"},
        {"parametrised": True},
    ],
)
def test_the_digest_covers_everything(change):
    assert replace(PLAN, **change).digest() != PLAN.digest()


@pytest.mark.parametrize("missing", ["name", "trainable", "recompute", "statistics"])
def test_what_is_missing_is_named(missing):
    value = PLAN.to_json()
    del value[missing]
    with pytest.raises(ConfigError, match=f"not a fine-tuning plan: .*{missing}"):
        FineTunePlan.from_json(value)


@pytest.mark.parametrize("value", [None, 5, "abc", ["abc"], {**PLAN.to_json(), "trainable": 3}])
def test_from_json_refuses_what_is_not_a_plan(value):
    with pytest.raises(ConfigError, match="not a fine-tuning plan"):
        FineTunePlan.from_json(value)
