"""Batch-norm statistics as they travel: count, sum and sum of squares per channel, never finished means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedofa.types.space import SubnetConfig


@dataclass(frozen=True, slots=True, eq=False)
class ChannelSums:
    """What one norm has seen: values a channel, and their sum and sum of squares per channel, float64 `(channels,)`."""

    count: int
    total: np.ndarray
    squares: np.ndarray

    def __add__(self, other: ChannelSums) -> ChannelSums:
        return ChannelSums(self.count + other.count, self.total + other.total, self.squares + other.squares)

    @property
    def mean(self) -> np.ndarray:
        """Mean per channel, float64."""
        return self.total / self.count

    @property
    def variance(self) -> np.ndarray:
        """The population's variance per channel, float64."""
        return np.maximum(self.squares / self.count - self.mean**2, 0.0)


StatisticSums = Mapping[str, ChannelSums]
"""By the norm's name in the module; empty for a module without batch norm."""


@dataclass(frozen=True, slots=True)
class SubnetStatistics:
    """One client's statistics of one subnet.

    Args:
        client_id: who computed them, in the client's own words.
        round: the round that asked for them.
        subnet: whose norms were observed, in its plain form.
        base_version: version of the shared state that the subnet was cut from.
        num_examples: examples that were passed through it.
        sums: by the norm's name.
    """

    client_id: str
    round: int
    subnet: SubnetConfig
    base_version: int
    num_examples: int
    sums: StatisticSums
