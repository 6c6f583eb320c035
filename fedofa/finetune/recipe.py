"""How a client trains in one round and what comes of it, whichever engine trains. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import UnionType

import numpy as np

from fedofa.types.delta import LowRank
from fedofa.types.errors import ConfigError

OPTIMISERS = ("sgd", "adamw")


@dataclass(frozen=True, slots=True)
class LocalTraining:
    """How a client trains in one round; the same for the whole fleet.

    Args:
        optimiser: "sgd" or "adamw".
        learning_rate, momentum, weight_decay: of the optimiser (momentum for SGD only).
        epochs: passes over the client's examples, used where `max_steps` is 0.
        max_steps: optimiser steps instead of epochs; 0 for epochs.
        batch_size: examples a step.
        label_smoothing: share of the target spread over all classes.
        proximal_mu: FedProx term mu/2 |w - received|^2 (arXiv 1812.06127, equation 2).
        max_gradient_norm: gradients are scaled down to this L2 norm; 0 leaves them as they are.
        max_shift: random augmentation: each image of a batch is moved by up to so many pixels along both sides.
    """

    optimiser: str = "sgd"
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 0.0
    epochs: int = 1
    max_steps: int = 0
    batch_size: int = 16
    label_smoothing: float = 0.0
    proximal_mu: float = 0.0
    max_gradient_norm: float = 0.0
    max_shift: int = 0

    def __post_init__(self) -> None:
        if self.optimiser not in OPTIMISERS:
            raise ConfigError(f"finetune.optimiser: expected one of {list(OPTIMISERS)}, found {self.optimiser!r}")
        for name in ("learning_rate", "weight_decay", "proximal_mu", "max_gradient_norm"):
            self._expect(name, "a finite number of at least 0", lambda value: 0 <= value < math.inf)
        for name, least in (("epochs", 1), ("max_steps", 0), ("batch_size", 1), ("max_shift", 0)):
            self._expect(name, f"a whole number of at least {least}", lambda value, least=least: value >= least, int)
        for name in ("momentum", "label_smoothing"):
            self._expect(name, "a number in [0, 1)", lambda value: 0 <= value < 1)

    def _expect(
        self, name: str, wanted: str, accepts: Callable[[float], bool], kind: type | UnionType = int | float
    ) -> None:
        value = getattr(self, name)
        if not isinstance(value, kind) or isinstance(value, bool) or not accepts(value):
            raise ConfigError(f"finetune.{name}: expected {wanted}, found {value!r}")

    @property
    def against_fusing(self) -> list[str]:
        """Settings that need all gradients at once; with any of them no step is fused into the backward pass."""
        needing = {
            "optimiser": self.optimiser != "sgd",
            "max_gradient_norm": self.max_gradient_norm > 0,
            "proximal_mu": self.proximal_mu > 0,
        }
        return [name for name, needs in needing.items() if needs]

    def num_steps(self, num_examples: int) -> int:
        """Optimiser steps on that many examples."""
        return self.max_steps or self.epochs * len(list(batch_bounds(num_examples, self.batch_size)))


@dataclass(frozen=True, slots=True)
class FineTuneResult:
    """What training gave.

    Args:
        weights: trained minus received for every trainable parameter or its trained part, float32, by name.
        num_steps: steps taken.
        loss: mean training loss, in nats.
        low_rank: the factors of the plan's weights of low rank, by name.
    """

    weights: dict[str, np.ndarray]
    num_steps: int
    loss: float
    low_rank: dict[str, LowRank] = field(default_factory=dict)


def batch_bounds(num_examples: int, batch_size: int) -> Iterator[tuple[int, int]]:
    """Bounds of the batches; a last batch of one joins the one before it, since batch norm cannot train on one.

    Where every batch is of one, a recipe for frozen statistics, all stay so: two would take twice the memory.
    """
    starts = list(range(0, num_examples, batch_size))
    if batch_size > 1 and len(starts) > 1 and num_examples - starts[-1] == 1:
        starts.pop()
    return zip(starts, [*starts[1:], num_examples], strict=True)


def largest_batch(num_examples: int, batch_size: int) -> int:
    """Examples of the largest batch."""
    return max((end - start for start, end in batch_bounds(num_examples, batch_size)), default=0)
