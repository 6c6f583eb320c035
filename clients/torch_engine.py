"""The client's engine on torch: any plan, teachers, batch-norm statistics."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from clients.subnets import SubnetCache, build_teacher
from fedofa.data.federation import Examples
from fedofa.evaluation.calibration import CALIBRATION_BATCH, statistic_sums
from fedofa.evaluation.metrics import evaluate
from fedofa.finetune.draws import task_seeds
from fedofa.finetune.features import FeatureCache
from fedofa.finetune.inputs import Pixels, stored_inputs
from fedofa.finetune.recipe import FineTuneResult, LocalTraining, batch_bounds
from fedofa.finetune.trainer import Objective, fine_tune
from fedofa.shrinking.schedule import TeacherLoss
from fedofa.shrinking.teaching import taught_objective, teacher_logits
from fedofa.supernet.base import Supernet
from fedofa.types.score import Score
from fedofa.types.space import SubnetConfig
from fedofa.types.statistics import StatisticSums
from fedofa.update.exchange import ClientTask

Received = Mapping[str, np.ndarray]

_subnets = SubnetCache()
_features = FeatureCache()


def train(examples: Examples, task: ClientTask, received: Received, client_id: str) -> FineTuneResult:
    """Fine-tune the task's subnet under its plan."""
    generator = seed_task(task.seed, client_id, task.round)
    training = LocalTraining(**task.training)
    objective = _teacher_objective(examples, task, training)
    model, supernet = _subnets.load(task, received)
    inputs, labels = _inputs(examples, task, task.subnet, supernet)
    return fine_tune(model, task.plan, received, inputs, labels, training, generator, objective, _features)


def score(examples: Examples, task: ClientTask, received: Received) -> Score:
    """Score the task's subnet, as many examples at a time as training takes, which the device's memory holds."""
    torch.set_num_threads(1)
    model, supernet = _subnets.load(task, received)
    batch_size = LocalTraining(**task.training).batch_size
    return evaluate(model, *_inputs(examples, task, task.subnet, supernet), batch_size=batch_size)


def statistics(examples: Examples, task: ClientTask, received: Received) -> StatisticSums:
    """Sum up what the subnet's batch norms see of the examples."""
    torch.set_num_threads(1)
    model, supernet = _subnets.load(task, received)
    inputs, labels = _inputs(examples, task, task.subnet, supernet)
    bounds = batch_bounds(len(labels), CALIBRATION_BATCH)
    return statistic_sums(model, (inputs[start:end] for start, end in bounds))


def seed_task(seed: int, client_id: str, round_number: int) -> torch.Generator:
    """Make a client's task reproducible anywhere: one thread, and all draws from (seed, client id, round).

    Torch's default generator is seeded too, since dropout takes no generator.
    """
    torch.set_num_threads(1)
    dropout, others = task_seeds(seed, client_id, round_number)
    torch.default_generator.manual_seed(dropout)
    return torch.Generator().manual_seed(others)


def _teacher_objective(examples: Examples, task: ClientTask, training: LocalTraining) -> Objective | None:
    """The loss of a task with a teacher, whose logits are computed once, before the subnet is built; else None."""
    if task.teaching is None:
        return None
    supernet = _subnets.structure(task)
    inputs, labels = _inputs(examples, task, task.teaching.subnet, supernet)
    logits = teacher_logits(build_teacher(supernet, task.teaching), inputs, training.batch_size)
    weights = (task.teaching.label_weight, task.teaching.teacher_weight)
    return taught_objective(logits, labels, TeacherLoss(**task.teaching.loss), *weights, training.label_smoothing)


def _inputs(
    examples: Examples, task: ClientTask, subnet: SubnetConfig, supernet: Supernet
) -> tuple[Pixels, torch.Tensor]:
    """Examples as a subnet takes them, and their labels."""
    statistics = task.normalisation
    resolution = supernet.resolution(subnet)
    inputs = stored_inputs(examples.images, statistics["mean"], statistics["std"], resolution)
    return inputs, torch.from_numpy(examples.labels)
