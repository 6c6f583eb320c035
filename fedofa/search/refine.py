"""From a subnet to a better one nearby, for many devices in step: what single changes bring tells which to combine.

A step prices every change of one column on every device. To first order changes add up, so that the best combination
within what is left of the limits is the one that takes, column by column, the change of most accuracy less a price on
cost; the price is found by bisection (Lagrangian relaxation; Everett 1963). Of several limits, each counts the more the
closer it is. A few combinations around that price are then priced as they are, and the best that meets all limits is
taken.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fedofa.device.operators import OperatorIndex, SubnetBatch
from fedofa.search.accuracy import AccuracyPredictor
from fedofa.types.encoding import Encoding

Excess = Callable[[SubnetBatch, np.ndarray], np.ndarray]
"""By which share subnets exceed limits, from a batch and the device of every subnet, `(num_subnets, num_limits)`."""

_SHARPNESS = 20.0
"""How fast a limit's weight falls with the share of it that is left."""
_AT_ONCE = (2, 4, 8, 1000)
"""Columns that a combination changes at the most: the fewer, the truer are first-order sums."""
_BISECTIONS = 9
_AROUND = (1.0, 1.3)
"""The prices that are tried, as multiples of the one at which the first-order costs just fit."""
_AT_A_TIME = 4096
"""Subnets that are priced at once: few enough for a processor's cache."""
_LEAST, _MOST, _TINY = 1e-4, 1e4, 1e-12
"""Where the price is sought, as multiples of a device's typical ratio of accuracy to cost."""


def refine(
    index: OperatorIndex, predictor: AccuracyPredictor, rows: np.ndarray, excess: Excess, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Better subnets than the given ones, and their accuracies.

    Args:
        index: of the space.
        predictor: of accuracy.
        rows: a subnet for every device, within its limits, `(num_devices, num_columns)`.
        excess: prices subnets on devices.
        steps: to take at the most; devices whose last step brought nothing take no further one.
    """
    rows = rows.copy()
    accuracies = predictor.predict(SubnetBatch(index, rows))
    active = np.arange(len(rows))
    for _ in range(steps):
        if not len(active):
            break
        found, reached = _step(index, predictor, rows[active], accuracies[active], active, excess)
        better = reached > accuracies[active]
        active, found, reached = active[better], found[better], reached[better]
        rows[active], accuracies[active] = found, reached
    return rows, accuracies


def _step(
    index: OperatorIndex,
    predictor: AccuracyPredictor,
    rows: np.ndarray,
    accuracies: np.ndarray,
    owners: np.ndarray,
    excess: Excess,
) -> tuple[np.ndarray, np.ndarray]:
    """The best subnet of one step for every device, and its accuracy; minus infinity where none meets the limits."""
    changes = Changes(index, rows)
    single, device, change = changes.single()
    own = excess(SubnetBatch(index, rows), owners)
    gains, added = np.zeros(changes.shape), np.zeros((*changes.shape, own.shape[1]))
    reached, over = _priced(index, predictor, single, owners[device], excess)
    gains[device, change], added[device, change] = reached - accuracies[device], over - own[device]
    closeness = np.exp(_SHARPNESS * own)
    weights = closeness / closeness.sum(axis=1, keepdims=True)
    first_order = (gains, (added * weights[:, None]).sum(axis=2), added, -own)
    combined = changes.combined(*(part.astype(np.float32) for part in first_order))
    flat = combined.reshape(-1, rows.shape[1])
    also, beyond = _priced(index, predictor, flat, np.repeat(owners, combined.shape[1]), excess)
    best = np.where((own[:, None] + added).max(axis=2) <= 0, gains, -np.inf)
    most = best.argmax(axis=1)
    rows, reached = changes.after(most), accuracies + best[np.arange(len(rows)), most]
    also = np.where(beyond.max(axis=1) <= 0, also, -np.inf).reshape(combined.shape[:2])
    better = also.max(axis=1) > reached
    found = combined[np.arange(len(rows)), also.argmax(axis=1)]
    return np.where(better[:, None], found, rows), np.where(better, also.max(axis=1), reached)


def _priced(
    index: OperatorIndex, predictor: AccuracyPredictor, rows: np.ndarray, owners: np.ndarray, excess: Excess
) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy and excess of subnets on their devices."""
    accuracies, over = [], []
    for start in range(0, len(rows), _AT_A_TIME):
        batch = SubnetBatch(index, rows[start : start + _AT_A_TIME])
        accuracies.append(predictor.predict(batch))
        over.append(excess(batch, owners[start : start + _AT_A_TIME]))
    return np.concatenate(accuracies), np.concatenate(over)


class Changes:
    """All changes of one column to another value, the same for every subnet, and what they make of each.

    Args:
        index: of the space.
        rows: a subnet for every device, `(num_devices, num_columns)`.
    """

    def __init__(self, index: OperatorIndex, rows: np.ndarray) -> None:
        self.encoding, self.rows = index.encoding, rows
        self.filled = _filled(self.encoding, rows)
        choices = self.encoding.choices.astype(np.int64)
        self.columns = np.repeat(np.arange(len(choices)), choices)
        self.values = np.concatenate([np.arange(number) for number in choices]).astype(np.int16)
        self.starts = np.concatenate([[0], np.cumsum(choices)])

    @property
    def shape(self) -> tuple[int, int]:
        """Devices and changes."""
        return len(self.rows), len(self.columns)

    def single(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Subnets after one change that makes another subnet, and the device and the change of each.

        `(num_subnets, num_columns)`, `(num_subnets,)` and `(num_subnets,)`.
        """
        before = self.rows[:, self.columns]
        device, change = np.nonzero((before >= 0) & (before != self.values))
        rows = self.filled[device]
        rows[np.arange(len(rows)), self.columns[change]] = self.values[change]
        return self.encoding.normalised(rows), device, change

    def after(self, change: np.ndarray) -> np.ndarray:
        """Every device's subnet after one change, `(num_devices, num_columns)`."""
        rows, devices, columns = self.filled.copy(), np.arange(len(self.rows)), self.columns[change]
        rows[devices, columns] = np.where(self.rows[devices, columns] >= 0, self.values[change], rows[devices, columns])
        return self.encoding.normalised(rows)

    def combined(self, gains: np.ndarray, prices: np.ndarray, added: np.ndarray, room: np.ndarray) -> np.ndarray:
        """Subnets after some changes at once, `(num_devices, num_combinations, num_columns)`.

        Args:
            gains: what each change adds to accuracy, `(num_devices, num_changes)`.
            prices: what it adds to the limits' weighted mean, the same shape.
            added: what it adds to each limit's excess, with an axis of limits.
            room: what is left of each limit, `(num_devices, num_limits)`.
        """
        scale = np.abs(gains).max(axis=1) / np.maximum(np.abs(prices).max(axis=1), _TINY)
        found = []
        for most in _AT_ONCE:
            low, high = (np.full(len(scale), np.log(end), np.float32) for end in (_LEAST, _MOST))
            for _ in range(_BISECTIONS):
                middle = (low + high) / 2
                taken, moved = self._taken(gains, prices, scale * np.exp(middle), most)
                total = (np.take_along_axis(added, taken[:, :, None], axis=1) * moved[:, :, None]).sum(axis=1)
                fits = (total <= room).all(axis=1)
                low, high = np.where(fits, low, middle), np.where(fits, middle, high)
            for factor in _AROUND:
                taken, moved = self._taken(gains, prices, scale * np.exp(high) * factor, most)
                found.append(np.where(moved & (self.rows >= 0), self.values[taken], self.filled))
        rows = np.concatenate(found)
        return self.encoding.normalised(rows).reshape(len(found), *self.rows.shape).swapaxes(0, 1)

    def _taken(
        self, gains: np.ndarray, prices: np.ndarray, price: np.ndarray, most: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """For every column the change of most accuracy less price times cost, and whether it is among the best.

        Both are `(num_devices, num_columns)`; at most `most` columns change.
        """
        score = gains - price[:, None] * prices
        spans = zip(self.starts[:-1], self.starts[1:], strict=True)
        taken = np.stack([score[:, start:end].argmax(axis=1) + start for start, end in spans], axis=1)
        reached = np.take_along_axis(score, taken, axis=1)
        least = np.zeros(len(score))
        if most < reached.shape[1]:
            least = np.maximum(np.partition(reached, -most, axis=1)[:, -most], 0.0)
        return taken, (reached >= least[:, None]) & (reached > 0)


def _filled(encoding: Encoding, rows: np.ndarray) -> np.ndarray:
    """Rows with a value in every column: one that a subnet has not takes that of the column before it, if it may.

    A block that a change adds is then like the block before it, and not the smallest one.
    """
    filled = np.maximum(rows, 0)
    for column in range(1, encoding.num_columns):
        if encoding.choices[column] == encoding.choices[column - 1]:
            filled[:, column] = np.where(rows[:, column] < 0, filled[:, column - 1], rows[:, column])
    return filled
