"""Accuracy and loss of a module on a set of examples."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedofa.finetune.engine import use_channels_last
from fedofa.finetune.inputs import Inputs
from fedofa.types.errors import DatasetError
from fedofa.types.score import Score

_MOST_EXAMPLES, _BATCH_VALUES = 250, 1 << 19
"""Of one pass. A network's activations are some tens of times its input; larger ones take several times as long, as
their pages are given back to the system and mapped anew for each of them."""


@torch.no_grad()
def evaluate(model: nn.Module, inputs: Inputs, labels: Tensor, *, batch_size: int | None = None) -> Score:
    """Score a module in evaluation mode.

    Args:
        inputs: `(num_examples, channels, height, width)`, at the subnet's resolution where they are taken.
        labels: `(num_examples,)`, int64.
        batch_size: examples at a time; None takes so many that their activations are some tens of MB.
    """
    if not len(labels):
        raise DatasetError("an evaluation needs at least 1 example, found none")
    model.eval()
    use_channels_last(model)
    batch_size = batch_size or min(_MOST_EXAMPLES, max(1, _BATCH_VALUES // max(1, inputs[:1].numel())))
    correct, loss = 0, 0.0
    for x, y in zip(inputs.split(batch_size), labels.split(batch_size), strict=True):
        logits = model(x.contiguous(memory_format=torch.channels_last))
        correct += int((logits.argmax(1) == y).sum())
        loss += float(functional.cross_entropy(logits, y, reduction="sum"))
    return Score(correct / len(labels), loss / len(labels), len(labels))
