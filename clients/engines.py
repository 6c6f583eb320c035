"""What trains and scores on a client: torch, or ONNX Runtime on boards without it; a process imports only its own."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Protocol, cast

import numpy as np

from fedofa.data.federation import Examples
from fedofa.finetune.recipe import FineTuneResult
from fedofa.types.score import Score
from fedofa.types.statistics import StatisticSums
from fedofa.update.exchange import ClientTask

_HOMES = {"torch": "clients.torch_engine", "onnxruntime": "clients.onnx_engine"}

Received = Mapping[str, np.ndarray]


class ClientEngine(Protocol):
    """What every engine's module offers; `received` are the task's tensors by name."""

    def train(self, examples: Examples, task: ClientTask, received: Received, client_id: str) -> FineTuneResult:
        """Fine-tune the task's subnet under its plan."""
        ...

    def score(self, examples: Examples, task: ClientTask, received: Received) -> Score:
        """Score the task's subnet."""
        ...

    def statistics(self, examples: Examples, task: ClientTask, received: Received) -> StatisticSums:
        """Sum up what the subnet's batch norms see of the examples."""
        ...


def load_engine(name: str) -> ClientEngine:
    """The engine of that name, one of `fedofa.types.device.ENGINES`."""
    return cast(ClientEngine, import_module(_HOMES[name]))
