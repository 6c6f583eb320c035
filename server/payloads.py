"""What travels to clients: a subnet's weights and what to do with them, packed into one buffer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from fedofa.finetune.recipe import LocalTraining
from fedofa.types.errors import WireError
from fedofa.types.plan import FineTunePlan
from fedofa.types.space import SubnetConfig
from fedofa.types.state import SharedState
from fedofa.update.exchange import ClientTask, Teaching, encode_task
from server.compiled import COMPILED, compiled
from server.fleet import Assignment
from server.phases import FederatedShrinking
from server.scoring import Scorer, SumsOf
from server.settings import FederationSettings

_FINAL_RATE = 0.01
"""Share of the learning rate that is left in the last round of a decay."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What payloads of a round carry beside the shared weights.

    Args:
        sums: clients' statistics of the subnets that are calibrated; empty where the server's images are used.
        teachers: the calibrated tensors of each teacher.
    """

    sums: SumsOf = field(default_factory=dict)
    teachers: Mapping[SubnetConfig, Mapping[str, np.ndarray]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Payloads:
    """Packs subnets of a state for clients that train them or look at them.

    Args:
        scorer: knows the supernet, calibrates its subnets.
        training: the recipe of the first round.
        settings: seed, width of floats on the wire, decay of the learning rate.
        shrinking: the schedule that gives rates and teachers; None for ordinary fine-tuning.
    """

    scorer: Scorer
    training: LocalTraining
    settings: FederationSettings
    shrinking: FederatedShrinking | None

    def to_train(self, server_round: int, state: SharedState, item: Assignment, prepared: Prepared) -> bytes:
        """The task of everybody who trains that subnet under that plan and teacher with that engine."""
        fit, supernet = item.fit, self.scorer.supernet
        slices = supernet.slice_map(fit.subnet, fit.plan.parametrised)
        tensors = slices.extract(state.tensors)
        if fit.plan.statistics == "frozen":
            calibrated = self.scorer.calibrated_tensors(state, fit.subnet, prepared.sums)
            tensors |= {item.name: calibrated[item.name] for item in slices if item.role == "statistic"}
        task = self._task(server_round, state, fit.subnet, fit.plan)
        task = replace(task, teaching=self._teaching(server_round, item, prepared))
        if item.client.profile.engine == COMPILED:
            graph, tensors = compiled(supernet, fit.subnet, fit.plan, tensors)
            task = replace(task, graph=graph)
        return _encoded(task, tensors)

    def to_score(self, server_round: int, state: SharedState, item: Assignment, sums: SumsOf) -> bytes:
        """The task of everybody who scores that subnet with that engine: its statistics are the calibrated ones."""
        plan = FineTunePlan("none", (), statistics="frozen", parametrised=item.fit.plan.parametrised)
        scored = replace(item, fit=replace(item.fit, plan=plan), teacher=None)
        return self.to_train(server_round, state, scored, Prepared(sums))

    def plain(self, server_round: int, state: SharedState, subnet: SubnetConfig) -> bytes:
        """A subnet as it is, to be looked at and not trained."""
        return self._shown(server_round, state, subnet, self.scorer.supernet.slice_map(subnet).extract(state.tensors))

    def calibrated(self, server_round: int, state: SharedState, subnet: SubnetConfig, sums: SumsOf) -> bytes:
        """A subnet with calibrated statistics, to be looked at and not trained."""
        return self._shown(server_round, state, subnet, self.scorer.calibrated_tensors(state, subnet, sums))

    def recipe(self, server_round: int) -> LocalTraining:
        """The recipe of a round: the learning rate falls along a half cosine to a hundredth of its first value.

        With a schedule it is the schedule's.
        """
        training = self.training
        if self.shrinking is not None and server_round > 0:
            return replace(training, learning_rate=training.learning_rate * self.shrinking.rate(server_round))
        if not self.settings.decay_rounds:
            return training
        done = min(1.0, (server_round - 1) / max(1, self.settings.decay_rounds - 1))
        factor = _FINAL_RATE + (1 - _FINAL_RATE) * (1 + math.cos(math.pi * done)) / 2
        return replace(training, learning_rate=training.learning_rate * factor)

    def _shown(
        self, server_round: int, state: SharedState, subnet: SubnetConfig, tensors: Mapping[str, np.ndarray]
    ) -> bytes:
        return _encoded(self._task(server_round, state, subnet, FineTunePlan("none", ())), tensors)

    def _task(self, server_round: int, state: SharedState, subnet: SubnetConfig, plan: FineTunePlan) -> ClientTask:
        return ClientTask(
            round=server_round,
            version=state.version,
            subnet=subnet,
            plan=plan,
            supernet=self.scorer.supernet.description(),
            training=asdict(self.recipe(server_round)),
            normalisation=self.scorer.normalisation,
            seed=self.settings.seed,
            float_dtype=self.settings.float_dtype,
        )

    def _teaching(self, server_round: int, item: Assignment, prepared: Prepared) -> Teaching | None:
        if self.shrinking is None or item.teacher is None:
            return None
        phase, tensors = self.shrinking.phase_of(server_round), prepared.teachers[item.teacher]
        return Teaching(item.teacher, tensors, asdict(phase.loss), phase.label_weight, phase.teacher_weight)


def _encoded(task: ClientTask, tensors: Mapping[str, np.ndarray]) -> bytes:
    try:
        return encode_task(task, tensors)
    except WireError:  # a weight is out of half precision's range: this payload travels whole
        return encode_task(replace(task, float_dtype="float32"), tensors)
