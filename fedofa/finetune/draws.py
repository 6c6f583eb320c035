"""A client's random numbers without torch: those that torch's CPU generator of the same seed gives.

Both training engines see the same batches and shifts, so that their deltas agree and a device can change its engine.
"""

from __future__ import annotations

import hashlib
from typing import final

import numpy as np


def task_seeds(seed: int, client_id: str, round_number: int) -> tuple[int, int]:
    """Seeds of a client's task, for dropout and for everything else; all draws come from (seed, client id, round)."""
    material = hashlib.sha256(f"{seed}/{client_id}/{round_number}".encode()).digest()
    dropout, others = (int.from_bytes(material[start : start + 8], "little") >> 1 for start in (0, 8))
    return dropout, others


@final
class TorchDraws:
    """What `torch.Generator().manual_seed(seed)` draws.

    It is a Mersenne Twister of 32 bits that starts from the seed's lower half; torch takes remainders of its words.
    """

    def __init__(self, seed: int) -> None:
        self._words = np.random.RandomState(seed & 0xFFFFFFFF)

    def permutation(self, count: int) -> np.ndarray:
        """As `torch.randperm(count, generator=...)`: int64, `(count,)`."""
        order = np.arange(count)
        places = np.arange(count - 1)
        others = places + self._next(max(count - 1, 0)) % (count - places)
        for place, other in zip(places, others, strict=True):
            order[place], order[other] = order[other], order[place]
        return order

    def integers(self, low: int, high: int, shape: tuple[int, ...]) -> np.ndarray:
        """As `torch.randint(low, high, shape, generator=...)`: int64, `high` left out, less than 2^28 above `low`."""
        words = self._next(int(np.prod(shape)))
        return (words % (high - low) + low).reshape(shape)

    def _next(self, count: int) -> np.ndarray:
        """Words of 32 bits, as int64; none are drawn for none (numpy would draw one)."""
        drawn = self._words.bytes(4 * count) if count else b""
        return np.frombuffer(drawn, "<u4").astype(np.int64)
