"""Server optimisers: how the folded change becomes a step. All are lazy: what no client trained stays as it is.

Plain and momentum step as Hsu et al. (arXiv 1909.06335), Adam and Yogi as Reddi et al. (arXiv 2003.00295), whose
pseudo-gradient is the negated change. Lazy means that an uncovered coordinate keeps its weight, its moments and its
step count to the bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import final

import numpy as np

Moments = MutableMapping[str, dict[str, np.ndarray]]


class ServerOptimiser(ABC):
    """Turns a folded change into new weights and moments, tensor by tensor."""

    @final
    def step(
        self, name: str, weight: np.ndarray, change: np.ndarray, covered: np.ndarray, moments: Moments
    ) -> np.ndarray:
        """The new weight; `moments` (kind -> name -> array) are replaced for this tensor.

        Args:
            name: the tensor.
            weight: float32, current value.
            change: float64, the folded change in the same shape.
            covered: boolean, broadcastable to the shape: what some client trained.
            moments: float32 moments and int32 step counts of all tensors, by kind.
        """
        step = self._direction(name, change, covered, moments)
        moved = (weight.astype(np.float64) + step).astype(weight.dtype)
        return np.where(covered & (step != 0), moved, weight)

    @abstractmethod
    def _direction(self, name: str, change: np.ndarray, covered: np.ndarray, moments: Moments) -> np.ndarray:
        """The float64 step; moments are updated where covered."""


def _moment(moments: Moments, kind: str, name: str, change: np.ndarray, dtype: type = np.float32) -> np.ndarray:
    return moments.setdefault(kind, {}).get(name, np.zeros(change.shape, dtype))


def _advance(old: np.ndarray, new: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """The new moment where covered, the old one's bits elsewhere."""
    return np.where(covered, new.astype(old.dtype), old)


@final
@dataclass(frozen=True, slots=True)
class Plain(ServerOptimiser):
    """`w += learning_rate * change`; with 1.0 this is FedAvg."""

    learning_rate: float = 1.0

    def _direction(self, name: str, change: np.ndarray, covered: np.ndarray, moments: Moments) -> np.ndarray:
        return self.learning_rate * change


@final
@dataclass(frozen=True, slots=True)
class Momentum(ServerOptimiser):
    """`m = beta * m + change; w += learning_rate * m`."""

    learning_rate: float = 1.0
    beta: float = 0.9

    def _direction(self, name: str, change: np.ndarray, covered: np.ndarray, moments: Moments) -> np.ndarray:
        old = _moment(moments, "momentum", name, change)
        moments["momentum"][name] = new = _advance(old, self.beta * old + change, covered)
        return self.learning_rate * new


@final
@dataclass(frozen=True, slots=True)
class Adaptive(ServerOptimiser):
    """FedAdam, or FedYogi with `yogi`: a step normalised by a running second moment.

    The moments are corrected for their start at zero by each coordinate's own step count, since coordinates of rarely
    trained subnets start late.
    """

    learning_rate: float = 0.01
    beta: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-3
    yogi: bool = False

    def _direction(self, name: str, change: np.ndarray, covered: np.ndarray, moments: Moments) -> np.ndarray:
        first, second = _moment(moments, "momentum", name, change), _moment(moments, "second", name, change)
        steps = _moment(moments, "steps", name, change, np.int32)
        squared = np.square(change)
        if self.yogi:
            raised = second - (1 - self.beta2) * squared * np.sign(second - squared)
        else:
            raised = self.beta2 * second + (1 - self.beta2) * squared
        moments["momentum"][name] = first = _advance(first, self.beta * first + (1 - self.beta) * change, covered)
        moments["second"][name] = second = _advance(second, raised, covered)
        moments["steps"][name] = steps = _advance(steps, steps + 1, covered)
        late = np.maximum(steps, 1).astype(np.float64)
        unbiased = first / (1 - self.beta**late)
        scale = np.sqrt(second / (1 - self.beta2**late))
        return self.learning_rate * unbiased / (scale + self.epsilon)
