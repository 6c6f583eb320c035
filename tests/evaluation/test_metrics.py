"""Scores against the same numbers by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedofa.evaluation.metrics import evaluate


def build_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Dropout(0.9))


@pytest.mark.parametrize("batch_size", [1, 4, 10, 23, 100])
def test_accuracy_and_loss_do_not_depend_on_the_batches(batch_size):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(23, 3, 2, 2, generator=generator)
    labels = torch.randint(0, 4, (23,), generator=generator)
    model = build_model().train()
    score = evaluate(model, inputs, labels, batch_size=batch_size)
    with torch.no_grad():
        logits = build_model().eval()(inputs)
    hits = sum(int(row.argmax()) == int(label) for row, label in zip(logits, labels, strict=True))
    picked = -functional.log_softmax(logits, 1)[torch.arange(23), labels]
    assert 0 < hits < 23
    assert score.accuracy == hits / 23
    assert score.loss == pytest.approx(float(picked.mean()), rel=1e-5)
    assert score.num_examples == 23
    assert not model.training


@pytest.mark.parametrize(("side", "most"), [(8, 250), (96, 18), (1024, 1)])
def test_the_larger_the_images_the_fewer_pass_at_once(side, most):
    sizes = []
    model = nn.Sequential(nn.AdaptiveAvgPool2d(2), *build_model())
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    count = min(most + 1, 251)
    evaluate(model, torch.zeros(count, 3, side, side), torch.zeros(count, dtype=torch.int64))
    assert sizes == [most, 1]
