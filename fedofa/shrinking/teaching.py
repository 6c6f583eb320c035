"""A teacher on a client: its logits are computed once, then it is gone and the subnet trains.

So teacher and subnet are never in memory at the same time, and random shifts of the images are the subnet's alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedofa.finetune.engine import use_channels_last
from fedofa.finetune.inputs import Inputs
from fedofa.finetune.trainer import Objective, label_objective
from fedofa.shrinking.losses import build_distance
from fedofa.shrinking.schedule import TeacherLoss


@torch.no_grad()
def teacher_logits(teacher: nn.Module, inputs: Inputs, batch_size: int) -> Tensor:
    """Logits `(num_examples, num_classes)` of a module in evaluation mode."""
    teacher.eval()
    use_channels_last(teacher)
    return torch.cat([teacher(x.contiguous(memory_format=torch.channels_last)) for x in inputs.split(batch_size)])


def taught_objective(
    logits: Tensor,
    labels: Tensor,
    loss: TeacherLoss,
    label_weight: float,
    teacher_weight: float,
    label_smoothing: float = 0.0,
) -> Objective:
    """The loss of a subnet that has a teacher.

    Args:
        logits: the teacher's, `(num_examples, num_classes)`.
        labels: `(num_examples,)`.
        loss: the distance to the teacher.
        label_weight, teacher_weight: of the two losses.
        label_smoothing: of the labels' loss.
    """
    distance, by_labels = build_distance(loss), label_objective(labels, label_smoothing)

    def objective(own: Tensor, batch: Tensor) -> Tensor:
        total = teacher_weight * distance(own, logits[batch])
        return total + label_weight * by_labels(own, batch) if label_weight else total

    return objective
