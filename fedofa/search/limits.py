"""What a subnet may cost on a device: any set of cost models, each with the most that it allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedofa.device.models import Quantity, SubnetCostModel
from fedofa.device.operators import SubnetBatch
from fedofa.types.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Limit:
    """The most that one cost may be, in its model's unit."""

    model: SubnetCostModel
    most: float

    def __post_init__(self) -> None:
        number = isinstance(self.most, int | float) and not isinstance(self.most, bool)
        if not number or not self.most > 0 or not math.isfinite(self.most):
            raise ConfigError(
                f"{self.model.setting}: expected a positive finite number of {self.model.unit}, found {self.most!r:.40}"
            )


@dataclass(frozen=True, slots=True)
class Limits:
    """All limits of one search; none where there are none."""

    limits: tuple[Limit, ...]

    def costs(self, batch: SubnetBatch) -> np.ndarray:
        """What every subnet costs, `(num_subnets, num_limits)`."""
        return _stacked([limit.model.predict(batch) for limit in self.limits], len(batch))

    def excess(self, batch: SubnetBatch) -> np.ndarray:
        """By which share of the limit every cost exceeds it, negative below it, `(num_subnets, num_limits)`."""
        most = np.array([limit.most for limit in self.limits])
        return self.costs(batch) / most - 1.0

    def worst(self, batch: SubnetBatch) -> np.ndarray:
        """The greatest excess of every subnet; at most 0 where it meets all limits, `(num_subnets,)`."""
        excess = self.excess(batch)
        return excess.max(axis=1) if excess.shape[1] else np.full(len(batch), -1.0)

    def miss(self, batch: SubnetBatch) -> str:
        """In words which limits the only subnet of a batch exceeds, and by how much."""
        words = []
        for limit, excess in zip(self.limits, self.excess(batch)[0], strict=True):
            if excess > 0:
                needs, most = (Quantity(limit.most * factor, limit.model.unit) for factor in (1 + excess, 1.0))
                words.append(
                    f"{limit.model.setting} is exceeded by {excess:.1%} (it needs {needs}, the limit is {most})"
                )
        return "; ".join(words)


def _stacked(columns: Sequence[np.ndarray], length: int) -> np.ndarray:
    return np.stack(columns, axis=1) if columns else np.zeros((length, 0))
