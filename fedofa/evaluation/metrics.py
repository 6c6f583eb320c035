"""Accuracy and loss of a module on a set of examples."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedofa.finetune.engine import use_channels_last
from fedofa.finetune.inputs import Inputs
from fedofa.types.errors import DatasetError
from fedofa.types.score import Score


@torch.no_grad()
def evaluate(model: nn.Module, inputs: Inputs, labels: Tensor, *, batch_size: int = 250) -> Score:
    """Score a module in evaluation mode.

    Args:
        inputs: `(num_examples, channels, height, width)`, at the subnet's resolution where they are taken.
        labels: `(num_examples,)`, int64.
    """
    if not len(labels):
        raise DatasetError("an evaluation needs at least 1 example, found none")
    model.eval()
    use_channels_last(model)
    correct, loss = 0, 0.0
    for x, y in zip(inputs.split(batch_size), labels.split(batch_size), strict=True):
        logits = model(x.contiguous(memory_format=torch.channels_last))
        correct += int((logits.argmax(1) == y).sum())
        loss += float(functional.cross_entropy(logits, y, reduction="sum"))
    return Score(correct / len(labels), loss / len(labels), len(labels))
