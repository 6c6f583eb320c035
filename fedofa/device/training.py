"""What training costs thousands of subnets at once, under a plan: peak memory, bytes and seconds of a round.

The figures are those of `cost.AnalyticCostModel`, computed place by place instead of subnet by subnet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import final

import numpy as np

from fedofa.device.cost import BACKWARD_PASSES, LocalWork
from fedofa.device.models import SubnetCostModel
from fedofa.device.operators import OperatorIndex, SubnetBatch
from fedofa.supernet.costs import BlockCost
from fedofa.types.device import DeviceProfile
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
        parts: numbers of what the plan does in the place (see `PlannedPlaces.part_plans`).
    """

    trained: np.ndarray
    backward: np.ndarray
    recomputed: np.ndarray
    parts: np.ndarray


@final
class PlannedPlaces:
    """A plan for every subnet of a space. What trains is a matter of which blocks a subnet has, not of their sizes.

    Args:
        index: of the space.
        plan_of: makes the plan of a subnet from its blocks.

    Attributes:
        part_plans: what plans do in a place, by number: the place, and the part of a plan for each set of parameters
            that train there.
    """

    def __init__(self, index: OperatorIndex, plan_of: PlanOf) -> None:
        self.index = index
        self.plan_of = plan_of
        self._names = [index.parameter_names(place) for place in range(len(index.places))]
        self._columns: dict[tuple[int, frozenset[str]], int] = {}  # the number of each
        self.part_plans: list[tuple[int, FineTunePlan]] = []
        self._values = np.zeros((1, len(index.operators) + 1))  # trained of every operator, a column each; last of none
        self._slots: dict[bytes, int] = {}  # by which places a subnet has
        self._numbers = np.zeros((1, len(index.places)), np.int64)  # of every place's column, a pattern each
        self._recomputed = np.zeros((1, len(index.places)), bool)
        rng = np.random.default_rng(0)
        self.of(SubnetBatch(index, index.encoding.sample(rng, _WARM_UP)))

    def of(self, batch: SubnetBatch) -> PlannedBatch:
        """The plan of every subnet."""
        present = batch.present
        packed = np.packbits(present, axis=1)
        words = np.zeros((len(packed), -(-packed.shape[1] // 8) * 8), np.uint8)
        words[:, : packed.shape[1]] = packed
        codes = words.view(np.uint64 if words.shape[1] == 8 else f"V{words.shape[1]}").ravel()  # one value a pattern
        _, first, member = np.unique(codes, return_index=True, return_inverse=True)
        slots = [self._slot(present[row], batch.rows[row]) for row in first]
        slot = np.array(slots, np.int64)[member.ravel()]
        parts = self._numbers[slot]
        trained = self._values[parts, batch.operators]
        backward = present & (np.cumsum(trained, axis=1) > 0)
        return PlannedBatch(trained, backward, self._recomputed[slot] & backward, parts)

    def _slot(self, present: np.ndarray, row: np.ndarray) -> int:
        """The number of the pattern of subnets with these places."""
        key = present.tobytes()
        if key not in self._slots:
            plan = self.plan_of(self.index.block_costs(row))
            names = set(plan.changes)
            columns = [self._column(place, names, plan) for place in range(len(self.index.places))]
            number = self._slots[key] = len(self._slots)
            if number == len(self._numbers):
                self._numbers, self._recomputed = _doubled(self._numbers), _doubled(self._recomputed)
            self._numbers[number] = columns
            self._recomputed[number] = np.isin(self.index.places, plan.recompute)
        return self._slots[key]

    def _column(self, place: int, names: set[str], plan: FineTunePlan) -> int:
        """The number of the column of a place; all plans of a space train the same part of a parameter."""
        own = self._names[place] & names
        if (place, own) not in self._columns:
            column = np.zeros(len(self.index.operators) + 1)
            for operator, cost in self.index.costs_in(place):
                column[operator] = sum(
                    plan.num_trained(item.name, item.shape) for item in cost.parameters if item.name in own
                )
            number = self._columns[place, own] = len(self._columns)
            if number == len(self._values):
                self._values = _doubled(self._values)
            self._values[number] = column
            self.part_plans.append((place, plan.part({name: name for name in own})))
        return self._columns[place, own]


def _doubled(array: np.ndarray) -> np.ndarray:
    """With as many rows again, of zeros."""
    return np.concatenate([array, np.zeros_like(array)])


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


@dataclass(frozen=True, slots=True)
class RoundFeatures:
    """What a round costs is linear in these, each float64 `(num_subnets,)`; the device and its work give the factors.

    Args:
        parameters, statistics: values of the subnet.
        trained: values that train.
        example: values that one example of a micro-batch keeps or has at the widest place.
        image: values of one example.
        macs: of one example's forward pass.
        passes: multiply-accumulates of one example's training, recomputation included.
    """

    parameters: np.ndarray
    statistics: np.ndarray
    trained: np.ndarray
    example: np.ndarray
    image: np.ndarray
    macs: np.ndarray
    passes: np.ndarray

    def matrix(self) -> np.ndarray:
        """All of them, `(num_subnets, num_features)`, in the order of the fields."""
        return np.stack([getattr(self, item.name) for item in fields(self)], axis=1)


@dataclass(frozen=True, slots=True)
class RoundFactors:
    """By what a device multiplies each of `RoundFeatures`, `(num_features,)`.

    Args:
        memory_bytes: of training, above the engine's floor.
        download_bytes, upload_bytes: payload and delta.
        download_seconds, compute_seconds, upload_seconds: parts of the round.
    """

    memory_bytes: np.ndarray
    download_bytes: np.ndarray
    upload_bytes: np.ndarray
    download_seconds: np.ndarray
    compute_seconds: np.ndarray
    upload_seconds: np.ndarray

    @property
    def round_seconds(self) -> np.ndarray:
        """Of the whole round."""
        return self.download_seconds + self.compute_seconds + self.upload_seconds


def memory_factors(work: LocalWork, micro_batch: int = 0) -> np.ndarray:
    """The factors of training memory, `(num_features,)`."""
    batch = min(work.batch_size + 1, max(work.num_examples, 1))
    at_a_time = min(micro_batch or batch, batch)
    images = work.num_examples + batch - at_a_time
    return _BYTES * np.array([2.0, 0.0, 1.0 + work.optimiser_slots, at_a_time, images, 0.0, 0.0])


def round_factors(profile: DeviceProfile, work: LocalWork, micro_batch: int = 0) -> RoundFactors:
    """The factors of one device, so that features times factors are what `cost.AnalyticCostModel` says."""
    download = work.wire_bytes * np.array([1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    upload = work.wire_bytes * np.array([0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    compute = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, work.num_samples])
    return RoundFactors(
        memory_bytes=memory_factors(work, micro_batch),
        download_bytes=download,
        upload_bytes=upload,
        download_seconds=download / profile.downlink_bytes_per_second,
        compute_seconds=compute / profile.macs_per_second,
        upload_seconds=upload / profile.uplink_bytes_per_second,
    )


@final
class RoundCosts:
    """The features of a round under a plan, for many subnets at once.

    Args:
        plans: the plan of every subnet.
    """

    def __init__(self, plans: PlannedPlaces) -> None:
        self.plans, self.index = plans, plans.index
        place, operator = self.index.place_table, self.index.operator_table
        self._parameters = operator(lambda cost: cost.num_parameters)
        self._statistics = operator(lambda cost: cost.num_statistics)
        self._saved = place(lambda cost: cost.saved_elements).astype(np.float64)  # whole numbers below 2^53: exact
        self._inputs = place(lambda cost: cost.input_elements).astype(np.float64)
        self._widest = place(lambda cost: cost.widest_elements).astype(np.float64)
        self._macs = place(lambda cost: cost.macs).astype(np.float64)

    def features(self, batch: SubnetBatch) -> RoundFeatures:
        """The features of every subnet."""
        planned = self.plans.of(batch)
        saved, inputs, macs = (batch.in_places(table) for table in (self._saved, self._inputs, self._macs))
        each = np.ones(saved.shape[1])
        if planned.recomputed.any():
            kept = (planned.backward * np.where(planned.recomputed, inputs, saved)) @ each
            kept += (planned.recomputed * (saved - inputs)).max(axis=1)
        else:
            kept = (planned.backward * saved) @ each
        again = planned.backward * (BACKWARD_PASSES + planned.recomputed)
        columns = (
            batch.total(self._parameters),
            batch.total(self._statistics),
            planned.trained @ each,
            kept + 2 * batch.in_places(self._widest).max(axis=1),
            inputs[:, 0],
            macs @ each,
            (macs * (1 + again)) @ each,
        )
        return RoundFeatures(*(column.astype(np.float64) for column in columns))
