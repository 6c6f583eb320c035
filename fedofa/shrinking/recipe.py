"""How a supernet is trained centrally, whatever the schedule: the optimiser and what it sees; no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedofa.types.errors import ConfigError

OPTIMISERS = ("sgd", "adamw")
PRECISIONS = ("float32", "bfloat16")
_LARGEST_ADAMW_RATE = 0.1
"""AdamW moves each weight by about the rate in every step, whatever the gradient: none bears this one."""


@dataclass(frozen=True, slots=True)
class CentralTraining:
    """The recipe of central training.

    Args:
        learning_rate: at its highest; the schedule says how it runs.
        optimiser: "sgd" with Nesterov momentum, or "adamw" (arXiv 1711.05101).
        momentum: of the gradients; AdamW's beta 1.
        weight_decay: of convolutions and the classifier; norms, biases and kernel matrices (which would shrink towards
            zero, not towards the identity) do not decay. AdamW's is apart from the gradient.
        batch_size: examples a step; every subnet of the step sees the same ones.
        label_smoothing: share of the target spread over all classes.
        max_gradient_norm: the summed gradients are scaled down to this L2 norm; 0 leaves them as they are.
        max_shift: each image is moved by up to so many pixels along both sides.
        frozen: names of parts ("stem", "stages.0") whose parameters stay as they are; their norms still use the
            batch's statistics, as every other does, so that calibration afterwards suits them too.
        order_batches: batches of training examples on which the largest subnet says which channels narrower ones keep
            (`importance.measured_ordering`): before the first step, and where a phase orders channels. 0: the first
            phase keeps the ordering that the supernet has, a phase that orders channels does so by L1 importance.
        precision: of the convolutions and matrix products, "float32" or "bfloat16" (autocast: weights, gradients,
            statistics and losses stay float32). The latter pays on processors that multiply bfloat16 themselves.

    Raises:
        ConfigError: naming the setting that is out of range.
    """

    learning_rate: float = 0.1
    optimiser: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 3e-5
    batch_size: int = 64
    label_smoothing: float = 0.1
    max_gradient_norm: float = 1.0
    max_shift: int = 0
    frozen: tuple[str, ...] = ()
    order_batches: int = 0
    precision: str = "float32"

    def __post_init__(self) -> None:
        self._expect("learning_rate", 0 < self.learning_rate < math.inf, "a positive number")
        self._expect("optimiser", self.optimiser in OPTIMISERS, f"one of {list(OPTIMISERS)}")
        bearable = self.optimiser == "sgd" or self.learning_rate < _LARGEST_ADAMW_RATE
        self._expect("learning_rate", bearable, f"below {_LARGEST_ADAMW_RATE} with adamw (optimiser=adamw sets 0.001)")
        self._expect("momentum", 0 < self.momentum < 1, "a number in (0, 1)")
        self._expect("weight_decay", 0 <= self.weight_decay < math.inf, "a number of at least 0")
        self._expect("batch_size", self.batch_size >= 2, "at least 2")
        self._expect("label_smoothing", 0 <= self.label_smoothing < 1, "a number in [0, 1)")
        self._expect("max_gradient_norm", 0 <= self.max_gradient_norm < math.inf, "a number of at least 0")
        self._expect("max_shift", self.max_shift >= 0, "at least 0")
        self._expect("order_batches", self.order_batches >= 0, "at least 0")
        self._expect("precision", self.precision in PRECISIONS, f"one of {list(PRECISIONS)}")

    def _expect(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise ConfigError(f"shrinking.{name}: expected {wanted}, found {getattr(self, name)!r}")
