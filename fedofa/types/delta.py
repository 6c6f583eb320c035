"""What a client sends back: the change of the tensors that it trained, and what the change belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fedofa.types.space import SubnetConfig


@dataclass(frozen=True, slots=True)
class LowRank:
    """A change of a weight as the product of two factors.

    Args:
        left: `(out, rank)`; right: `(rank, in)`, both float32.
    """

    left: np.ndarray
    right: np.ndarray

    def product(self, shape: tuple[int, ...]) -> np.ndarray:
        """`left @ right` in float64, in the shape of a weight of `out * in` values."""
        return (self.left.astype(np.float64) @ self.right.astype(np.float64)).reshape(shape)


@dataclass(frozen=True, slots=True)
class SubnetDelta:
    """One client's result of one round; a delta is always trained minus received.

    Args:
        client_id: who trained it, in the client's own words; not a transport's node id.
        round: the round that asked for it.
        subnet: the architecture that was trained.
        plan_digest: digest of the `FineTunePlan` it was trained under.
        base_version: version of the shared state that the client received.
        num_examples: examples in the client's training set; its weight in the fold.
        num_steps: optimiser steps taken.
        weights: parameter name -> float32 change; only what trained, in the subnet's shape or, where a plan trains the
            leading part of a weight, in the shape of that part.
        parametrised: whether the subnet was trained in its parametrised form (see `FineTunePlan`).
        low_rank: weight name -> the factors of its change.
    """

    client_id: str
    round: int
    subnet: SubnetConfig
    plan_digest: str
    base_version: int
    num_examples: int
    num_steps: int
    weights: Mapping[str, np.ndarray]
    parametrised: bool = False
    low_rank: Mapping[str, LowRank] = field(default_factory=dict)
