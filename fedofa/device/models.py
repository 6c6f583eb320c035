"""What a subnet costs, behind one interface: a value with its unit for one subnet, an array for thousands.

Models sum a table entry over a subnet's operators, or take the greatest; `SubnetBatch` looks the operators up once.
`memory`, `training`, `latency` and `energy` hold the others; prices of a whole round on a device are in `cost`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import numpy as np

from fedofa.device.operators import OperatorIndex, SubnetBatch
from fedofa.types.space import SubnetConfig

MEGABYTE, KILOBYTE = 1e6, 1024
"""Memory budgets are in millions of bytes, on-chip memory in 1024 bytes, as data sheets state them."""

_BYTES = 4


@dataclass(frozen=True, slots=True)
class Quantity:
    """A value with its unit."""

    value: float
    unit: str

    def __str__(self) -> str:
        return f"{self.value:,.4g} {self.unit}" if self.value < 1e4 else f"{self.value:,.0f} {self.unit}"


class SubnetCostModel(ABC):
    """Prices subnets.

    Attributes:
        setting: the name under which the cost is limited ("latency_ms").
        unit: of the values.
        index: of the space.
    """

    setting: str
    unit: str

    def __init__(self, index: OperatorIndex) -> None:
        self.index = index

    @abstractmethod
    def predict(self, batch: SubnetBatch) -> np.ndarray:
        """The cost of every subnet, float64 `(num_subnets,)`."""

    def warm_up(self) -> None:
        """Do what takes time once, so that no search waits for it; most models have nothing of the kind."""
        return

    @final
    def predict_one(self, subnet: SubnetConfig) -> Quantity:
        """The cost of one subnet.

        Raises:
            SpaceError: when it is not of the model's space.
        """
        return Quantity(float(self.predict(self.index.batch([subnet]))[0]), self.unit)


class AdditiveCost(SubnetCostModel):
    """A cost that is the sum of its operators' costs.

    Args:
        index: of the space.
        table: the cost of every operator, `(num_operators,)`.
    """

    def __init__(self, index: OperatorIndex, table: np.ndarray) -> None:
        super().__init__(index)
        self.table = table

    def predict(self, batch: SubnetBatch) -> np.ndarray:
        return batch.total(self.table).astype(np.float64)


@final
class Macs(AdditiveCost):
    """Multiply-accumulates of one forward pass of one example."""

    setting, unit = "macs", "MACs"

    def __init__(self, index: OperatorIndex) -> None:
        super().__init__(index, index.operator_table(lambda cost: cost.macs))


@final
class Parameters(AdditiveCost):
    """Trainable values."""

    setting, unit = "parameters", "parameters"

    def __init__(self, index: OperatorIndex) -> None:
        super().__init__(index, index.operator_table(lambda cost: cost.num_parameters))


@final
class BytesDown(AdditiveCost):
    """Bytes that a client receives a round: parameters and batch-norm statistics.

    Args:
        index: of the space.
        wire_bytes: bytes a value.
    """

    setting, unit = "bytes_down", "bytes"

    def __init__(self, index: OperatorIndex, wire_bytes: int = _BYTES) -> None:
        values = index.operator_table(lambda cost: cost.num_parameters + cost.num_statistics)
        super().__init__(index, wire_bytes * values)
