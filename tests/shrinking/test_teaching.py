"""A client's teacher: logits once, the losses' weights, and a subnet that becomes like it."""

import numpy as np
import pytest
import torch
from cohorts import build_supernet
from torch.nn import functional

from fedofa.finetune.plans import build_plan
from fedofa.finetune.recipe import LocalTraining
from fedofa.finetune.trainer import fine_tune
from fedofa.shrinking.losses import soft_cross_entropy
from fedofa.shrinking.schedule import TeacherLoss
from fedofa.shrinking.teaching import taught_objective, teacher_logits
from fedofa.supernet.base import fill_skeleton

SUPERNET = build_supernet()
STUDENT, TEACHER = SUPERNET.space.subnet(kernel=3, resolution=16), SUPERNET.space.subnet(resolution=16)
INPUTS = torch.randn(24, 1, 16, 16, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(24) % 5


def test_logits_are_those_of_the_teacher_in_evaluation_mode_whatever_the_batches():
    teacher = SUPERNET.build(TEACHER)
    expected = teacher.eval()(INPUTS)
    for batch_size in (5, 24, 100):
        found = teacher_logits(teacher.train(), INPUTS, batch_size)
        assert not found.requires_grad
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("label_weight", "teacher_weight"), [(0.0, 1.0), (1.0, 0.5)])
def test_the_objective_is_the_weighted_sum_over_the_batch(label_weight, teacher_weight):
    logits, own = torch.randn(24, 5), torch.randn(4, 5)
    batch = torch.tensor([3, 0, 20, 9])
    objective = taught_objective(logits, LABELS, TeacherLoss(temperature=2.0), label_weight, teacher_weight, 0.1)
    expected = teacher_weight * soft_cross_entropy(own, logits[batch], 2.0)
    expected += label_weight * functional.cross_entropy(own, LABELS[batch], label_smoothing=0.1)
    torch.testing.assert_close(objective(own, batch), expected)


def test_a_taught_parametrised_subnet_becomes_like_its_teacher_and_its_matrices_train():
    received = {
        name: np.ascontiguousarray(value)
        for name, value in SUPERNET.slice_map(STUDENT, True).extract(SUPERNET.state().tensors).items()
    }
    module = fill_skeleton(
        SUPERNET.structure(STUDENT, True), {n: torch.from_numpy(v.copy()) for n, v in received.items()}
    )
    plan = build_plan("full", SUPERNET.costs(STUDENT, True), recompute=True, parametrised=True)
    logits = 3 * teacher_logits(SUPERNET.build(TEACHER), INPUTS, 8)
    objective = taught_objective(logits, LABELS, TeacherLoss(), 0.0, 1.0)
    before = float(soft_cross_entropy(module(INPUTS).detach(), logits))
    training = LocalTraining(learning_rate=0.05, epochs=8, batch_size=8)
    generator = torch.Generator().manual_seed(0)
    result = fine_tune(module, plan, received, INPUTS, LABELS, training, generator, objective)
    entropy = float(soft_cross_entropy(logits, logits))
    trained = {name: torch.from_numpy(received[name] + change) for name, change in result.weights.items()}
    after = float(soft_cross_entropy(fill_skeleton(module, trained).eval()(INPUTS).detach(), logits))
    assert after - entropy < 0.5 * (before - entropy)
    assert set(result.weights) == {item.name for item in SUPERNET.slice_map(STUDENT, True)}
    for name, change in result.weights.items():
        assert change.shape == received[name].shape
        assert ".matrix_" not in name or np.abs(change).max() > 1e-6, name


def test_lean_operations_train_a_parametrised_subnet_as_stock_ones_do():
    received = SUPERNET.slice_map(STUDENT, True).extract(SUPERNET.state().tensors)
    training = LocalTraining(learning_rate=0.05, epochs=1, batch_size=8)
    results = []
    for lean in (False, True):
        torch.manual_seed(0)  # of dropout
        tensors = {name: torch.from_numpy(np.array(value)) for name, value in received.items()}
        module = fill_skeleton(SUPERNET.structure(STUDENT, True), tensors)
        plan = build_plan("full", SUPERNET.costs(STUDENT, True), parametrised=True, lean=lean)
        results.append(fine_tune(module, plan, received, INPUTS, LABELS, training, torch.Generator().manual_seed(0)))
    stock, own = results
    assert max(np.abs(change).max() for change in stock.weights.values()) > 1e-3
    for name, change in stock.weights.items():
        np.testing.assert_allclose(own.weights[name], change, atol=2e-5, rtol=1e-3, err_msg=name)
