"""What an evaluation gives."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Score:
    """Top-1 accuracy in [0, 1], mean cross-entropy in nats, and the number of examples behind both."""

    accuracy: float
    loss: float
    num_examples: int
