"""What subnets cost many unlike devices, as shares of limits: features times factors, and a table of latencies each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedofa.device.operators import SubnetBatch


@dataclass(frozen=True, slots=True)
class Pricing:
    """The costs of a subnet on a device are linear in its features, and one of them is a sum over its operators too.

    Args:
        features: of subnets, whatever the device, `(num_subnets, num_features)`.
        factors: of every device, share of a limit a feature, `(num_devices, num_limits, num_features)`.
        offsets: of every device, what any subnet takes less the limits, `(num_devices, num_limits)`.
        tables: of every device, share of a limit an operator, the last one of no operator,
            `(num_devices, num_operators + 1)`.
        timed: the limit that the tables count towards.
    """

    features: Callable[[SubnetBatch], np.ndarray]
    factors: np.ndarray
    offsets: np.ndarray
    tables: np.ndarray
    timed: int

    def excess(self, batch: SubnetBatch, owners: np.ndarray) -> np.ndarray:
        """By which share subnets exceed the limits, each on a device of its own, `(num_subnets, num_limits)`.

        Args:
            owners: the device of every subnet, `(num_subnets,)`.
        """
        features = self.features(batch)
        excess = (self.factors[owners] * features[:, None]) @ np.ones(features.shape[1]) + self.offsets[owners]
        excess[:, self.timed] += self.tables[owners[:, None], batch.operators] @ np.ones(batch.operators.shape[1])
        return excess
