"""The client's engine without torch: runs the graphs that the server compiles, on numpy and ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedofa.data.federation import Examples
from fedofa.finetune.draws import task_seeds
from fedofa.finetune.onnx_trainer import CompiledSession, StoredExamples, fine_tune_compiled, score_compiled
from fedofa.finetune.pixels import prepare_pixels
from fedofa.finetune.recipe import FineTuneResult, LocalTraining
from fedofa.types.errors import ConfigError, WireError
from fedofa.types.score import Score
from fedofa.types.statistics import StatisticSums
from fedofa.update.exchange import ClientTask

Received = Mapping[str, np.ndarray]


def train(examples: Examples, task: ClientTask, received: Received, client_id: str) -> FineTuneResult:
    """Fine-tune the task's subnet under its plan."""
    session = _session(task, received)
    plan, trained = task.plan, session.trained
    if tuple(trained) != plan.trainable:
        raise WireError(
            f"the task's graph trains {len(trained)} parameters, its plan {len(plan.trainable)}; "
            "expected the same ones in the same order"
        )
    for name, shape in trained.items():
        expected = plan.part_shape(name, received[name].shape)
        if shape != expected:
            raise WireError(f"of {name!r} the task's graph trains {shape}; expected {expected}, as its plan says")
    training, seeds = LocalTraining(**task.training), task_seeds(task.seed, client_id, task.round)
    return fine_tune_compiled(session, received, _stored(examples, task), training, seeds)


def score(examples: Examples, task: ClientTask, received: Received) -> Score:
    """Score the task's subnet."""
    return score_compiled(_session(task, received), _stored(examples, task))


def statistics(examples: Examples, task: ClientTask, received: Received) -> StatisticSums:
    """Refuse: a compiled step runs one example at a time, batch norms are observed on batches.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(
        "engine onnxruntime gives no batch-norm statistics; use clients with torch, or evaluation.calibration=server"
    )


def _session(task: ClientTask, received: Received) -> CompiledSession:
    if task.graph is None:
        raise WireError("the task carries no graph; the server takes this client for one with torch")
    return CompiledSession(task.graph, received)


def _stored(examples: Examples, task: ClientTask) -> StoredExamples:
    return StoredExamples(
        examples.images, examples.labels, lambda images, side: prepare_pixels(images, task.normalisation, side)
    )
