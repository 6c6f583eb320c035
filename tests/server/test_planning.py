"""Plans that are made for devices' memory: shared among clients, enough for each of them."""

from dataclasses import replace

import pytest
from cohorts import build_supernet
from hypothesis import given, settings
from hypothesis import strategies as st

from fedofa.device.cost import LocalWork
from fedofa.finetune import budget
from fedofa.finetune.budget import BudgetError
from fedofa.finetune.inputs import ImageForm
from fedofa.finetune.memory import training_memory
from fedofa.finetune.trainer import LocalTraining
from server import planning
from server.planning import BudgetedPlans

SUPERNET = build_supernet(norm="group")
SMALLEST = SUPERNET.space.smallest()
TRAINING = LocalTraining(batch_size=4)
FORM = ImageForm((1, 24, 24))


def work(num_examples: int) -> LocalWork:
    return LocalWork(num_examples, num_examples, TRAINING.batch_size)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 40))
def test_a_shared_plan_is_enough_for_every_client_that_shares_it(num_examples):
    plans = BudgetedPlans(SUPERNET, TRAINING, FORM, "frozen")
    plan, taken = plans(SMALLEST, "head", work(num_examples), 1e9)
    side = SUPERNET.resolution(SMALLEST)
    own = training_memory(SUPERNET.structure(SMALLEST), plan, TRAINING, num_examples, replace(FORM, resolution=side))
    assert own.total_bytes <= taken


def test_plans_are_made_once_and_so_are_refusals(monkeypatch):
    calls = []

    def counted(*args, **options):
        calls.append(args)
        return budget.plan_for_budget(*args, **options)

    monkeypatch.setattr(planning, "plan_for_budget", counted)
    plans = BudgetedPlans(SUPERNET, TRAINING, FORM, "frozen")
    assert plans(SMALLEST, "head", work(12), 1e9) == plans(SMALLEST, "head", work(16), 1e9)
    for _ in range(2):
        with pytest.raises(BudgetError, match="in 10 bytes"):
            plans(SMALLEST, "head", work(12), 10.0)
    assert len(calls) == 2
