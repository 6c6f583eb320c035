"""What training costs thousands of subnets at once, under a plan: peak memory and the bytes of a delta.

The figures are those of `cost.AnalyticCostModel`, computed place by place instead of subnet by subnet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from fedofa.device.cost import LocalWork
from fedofa.device.models import MEGABYTE, SubnetCostModel
from fedofa.device.operators import OperatorIndex, SubnetBatch
from fedofa.supernet.costs import BlockCost
from fedofa.types.plan import FineTunePlan

PlanOf = Callable[[Sequence[BlockCost]], FineTunePlan]

_BYTES = 4
_WARM_UP = 2000


@dataclass(frozen=True, slots=True)
class PlannedBatch:
    """What a plan does to every place of many subnets, each `(num_subnets, num_places)`.

    Args:
        trained: values that train.
        backward: whether gradients pass through.
        recomputed: whether activations are recomputed.
    """

    trained: np.ndarray
    backward: np.ndarray
    recomputed: np.ndarray


@final
class PlannedPlaces:
    """A plan for every subnet of a space. What trains is a matter of which blocks a subnet has, not of their sizes.

    Args:
        index: of the space.
        plan_of: makes the plan of a subnet from its blocks.
    """

    def __init__(self, index: OperatorIndex, plan_of: PlanOf) -> None:
        self.index = index
        self.plan_of = plan_of
        self._names = [index.parameter_names(place) for place in range(len(index.places))]
        self._columns: dict[tuple[int, frozenset[str]], np.ndarray] = {}
        self._patterns: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}
        rng = np.random.default_rng(0)
        self.of(SubnetBatch(index, index.encoding.sample(rng, _WARM_UP)))

    def of(self, batch: SubnetBatch) -> PlannedBatch:
        """The plan of every subnet."""
        present = batch.present
        shape = (len(batch), len(self.index.places))
        trained, recomputed = np.zeros(shape, np.int64), np.zeros(shape, bool)
        patterns, first, member = np.unique(present, axis=0, return_index=True, return_inverse=True)
        places = np.arange(shape[1])
        tables, again = zip(
            *(self._pattern(p, batch.rows[f]) for p, f in zip(patterns, first, strict=True)), strict=True
        )
        member = member.ravel()
        for number, (table, recompute) in enumerate(zip(tables, again, strict=True)):
            chosen = np.nonzero(member == number)[0]
            trained[chosen] = np.where(present[chosen], table[places, batch.operators[chosen]], 0)
            recomputed[chosen] = recompute
        backward = present & (np.cumsum(trained, axis=1) > 0)
        return PlannedBatch(trained, backward, recomputed & backward)

    def _pattern(self, present: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For subnets with these places: trained values `(num_places, num_operators)`, recomputed places."""
        key = present.tobytes()
        if key not in self._patterns:
            plan = self.plan_of(self.index.block_costs(row))
            names = set(plan.changes)
            columns = [self._column(place, names, plan) for place in range(len(self.index.places))]
            recomputed = np.isin(self.index.places, plan.recompute)
            self._patterns[key] = np.stack(columns), recomputed
        return self._patterns[key]

    def _column(self, place: int, names: set[str], plan: FineTunePlan) -> np.ndarray:
        """Trained values of every operator in a place; all plans of a space train the same part of a parameter."""
        own = self._names[place] & names
        if (place, own) not in self._columns:
            column = np.zeros(len(self.index.operators), np.int64)
            for operator, cost in self.index.costs_in(place):
                column[operator] = sum(
                    plan.num_trained(item.name, item.shape) for item in cost.parameters if item.name in own
                )
            self._columns[place, own] = column
        return self._columns[place, own]


@final
class BytesUp(SubnetCostModel):
    """Bytes that a client sends a round: what it trained.

    Args:
        plans: the plan of every subnet.
        wire_bytes: bytes a value.
    """

    setting, unit = "bytes_up", "bytes"

    def __init__(self, plans: PlannedPlaces, wire_bytes: int = _BYTES) -> None:
        super().__init__(plans.index)
        self.plans = plans
        self.wire_bytes = wire_bytes

    def predict(self, batch: SubnetBatch) -> np.ndarray:
        return self.plans.of(batch).trained.sum(axis=1) * float(self.wire_bytes)


@final
class TrainingMemory(SubnetCostModel):
    """Peak bytes of training under a plan, above the engine's floor.

    Args:
        plans: the plan of every subnet.
        work: what the device does in a round.
    """

    setting, unit = "training_memory_mb", "MB"

    def __init__(self, plans: PlannedPlaces, work: LocalWork) -> None:
        super().__init__(plans.index)
        self.plans, self.work = plans, work
        table = self.index.place_table
        self._parameters = table(lambda cost: cost.num_parameters)
        self._saved = table(lambda cost: cost.saved_elements)
        self._inputs = table(lambda cost: cost.input_elements)
        self._widest = table(lambda cost: cost.widest_elements)

    def predict(self, batch: SubnetBatch) -> np.ndarray:
        work, planned = self.work, self.plans.of(batch)
        saved, inputs = batch.in_places(self._saved), batch.in_places(self._inputs)
        kept = np.where(planned.backward, np.where(planned.recomputed, inputs, saved), 0).sum(axis=1)
        kept += np.where(planned.recomputed, saved - inputs, 0).max(axis=1)
        temporary = 2 * batch.in_places(self._widest).max(axis=1)
        values = 2 * batch.in_places(self._parameters).sum(axis=1)
        values += planned.trained.sum(axis=1) * (1 + work.optimiser_slots)
        examples = min(work.batch_size + 1, max(work.num_examples, 1))
        return _BYTES * (values + examples * (kept + temporary) + work.num_examples * inputs[:, 0]) / MEGABYTE
