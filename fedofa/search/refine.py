"""From a subnet to a better one nearby, for many devices in step: what single changes bring tells which to combine.

A step prices every change of one group of columns on every device; a block's kernel and expand ratio are one group. To
first order changes add up, so that the best combination within what is left of the limits is the one that takes, group
by group, the change of most accuracy less a price on cost; the price is found by bisection (Lagrangian relaxation;
Everett 1963). Of several limits, each counts the more the closer it is. A few combinations around that price, and the
most promising pairs of the changes that are best at it, are then priced as they are, and the best that meets all limits
is taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedofa.device.operators import OperatorIndex, SubnetBatch
from fedofa.search.accuracy import AccuracyPredictor
from fedofa.types.encoding import Encoding

Excess = Callable[[SubnetBatch, np.ndarray, np.ndarray], np.ndarray]
"""By which share subnets exceed limits, from a batch and, for every pair, the number of a subnet in it and that of a
device, `(num_pairs, num_limits)`."""

_SHARPNESS = 20.0
"""How fast a limit's weight falls with the share of it that is left."""
_AT_ONCE = (2, 4, 8, 1000)
"""Groups that a combination changes at the most: the fewer, the truer are first-order sums."""
_BISECTIONS = 9
_PAIRED, _PAIRS = 40, 16
"""Changes of which pairs are looked at, and pairs that are priced."""
_LEFT = -1
"""A column that a change leaves as it is."""
_AROUND = (1.0, 1.3)
"""The prices that are tried, as multiples of the one at which the first-order costs just fit."""
_TOGETHER = 48
"""Devices that step together: their effects fit into a processor's cache."""
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
        active = active[np.lexsort(rows[active].T)]  # devices with one subnet step together
        parts = np.array_split(active, -(-len(active) // _TOGETHER))
        stepped = [_step(index, predictor, rows[part], accuracies[part], part, excess) for part in parts]
        found, reached = (np.concatenate(part) for part in zip(*stepped, strict=True))
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
    single, subnets, device, change = _singles(index, rows)
    own = excess(SubnetBatch(index, rows), np.arange(len(rows)), owners).astype(np.float32)
    shape = (len(rows), len(changes.group))
    gains, added = np.zeros(shape, np.float32), np.zeros((*shape, own.shape[1]), np.float32)
    reached, over = _priced(index, predictor, single, subnets, owners[device], excess)
    gains[device, change], added[device, change] = reached - accuracies[device], over - own[device]
    closeness = np.exp(_SHARPNESS * own)
    weights = closeness / closeness.sum(axis=1, keepdims=True)
    combined = changes.combined(Effects(gains, (added * weights[:, None]).sum(axis=2), added, -own))
    flat = combined.reshape(-1, rows.shape[1])
    combining = np.repeat(np.arange(len(rows)), combined.shape[1])
    also, beyond = _priced(index, predictor, flat, np.arange(len(flat)), owners[combining], excess)
    near, subnets = np.concatenate([single, flat]), np.concatenate([subnets, len(single) + np.arange(len(flat))])
    device = np.concatenate([device, combining])
    reached, over = np.concatenate([reached, also]), np.concatenate([over, beyond])
    within = np.nonzero(over.max(axis=1) <= 0)[0]
    best = within[np.argsort(reached[within], kind="stable")]  # the last of a device is its best, and stays
    rows, accuracies = rows.copy(), np.full(len(rows), -np.inf)
    rows[device[best]], accuracies[device[best]] = near[subnets[best]], reached[best]
    return rows, accuracies


def _singles(index: OperatorIndex, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Subnets after one change, those once that several devices have, and which is which device's after which change.

    `(num_subnets, num_columns)`, and for every pair of a device and a change the subnet, the device and the change.
    """
    distinct, of = np.unique(rows, axis=0, return_inverse=True)
    changes = Changes(index, distinct)
    single, parent, change = changes.single()
    numbers = np.full((len(distinct), len(changes.group)), -1)
    numbers[parent, change] = np.arange(len(single))
    numbers = numbers[of.ravel()]
    device, change = np.nonzero(numbers >= 0)
    return single, numbers[device, change], device, change


def _priced(
    index: OperatorIndex,
    predictor: AccuracyPredictor,
    rows: np.ndarray,
    subnets: np.ndarray,
    owners: np.ndarray,
    excess: Excess,
) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy and excess of subnets on devices, for every pair of a row's number and a device."""
    batch = SubnetBatch(index, rows)
    return predictor.predict(batch)[subnets], excess(batch, subnets, owners)


@dataclass(frozen=True, slots=True)
class Effects:
    """What every change does by itself to every device's subnet, float32; of one that changes nothing, 0.

    Args:
        gains: what it adds to accuracy, `(num_devices, num_changes)`.
        prices: what it adds to the limits' weighted mean, the same shape.
        added: what it adds to each limit's excess, with an axis of limits.
        room: what is left of each limit, `(num_devices, num_limits)`.
    """

    gains: np.ndarray
    prices: np.ndarray
    added: np.ndarray
    room: np.ndarray


class Changes:
    """All changes of one group of columns to other values, the same for every subnet, and what they make of each.

    Columns that set nothing but the same places, as a block's kernel and expand ratio do, are one group: what one of
    them costs depends on the others, so that their values are only truly priced together.

    Args:
        index: of the space.
        rows: a subnet for every device, `(num_devices, num_columns)`.
    """

    def __init__(self, index: OperatorIndex, rows: np.ndarray) -> None:
        self.encoding, self.rows = index.encoding, rows
        self.filled = _filled(self.encoding, rows)
        self.groups = index.column_groups
        options = [list(itertools.product(*(range(self.encoding.choices[c]) for c in group))) for group in self.groups]
        self.group = np.repeat(np.arange(len(options)), [len(values) for values in options])
        self.option = np.concatenate([np.arange(len(values)) for values in options])
        self.targets = np.full((len(self.group), rows.shape[1]), _LEFT, np.int16)
        for change, (group, option) in enumerate(zip(self.group, self.option, strict=True)):
            self.targets[change, list(self.groups[group])] = options[group][option]
        self.number = np.zeros((len(options), int(self.option.max()) + 1), np.int64)  # of the change to an option
        self.number[self.group, self.option] = np.arange(len(self.group))
        self.group_of = np.zeros(rows.shape[1], np.int64)  # of every column
        for group, columns in enumerate(self.groups):
            self.group_of[list(columns)] = group

    def single(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Subnets after one change that makes another subnet, and the device and the change of each.

        `(num_subnets, num_columns)`, `(num_subnets,)` and `(num_subnets,)`.
        """
        present = np.stack([(self.rows[:, list(columns)] >= 0).all(axis=1) for columns in self.groups], axis=1)
        device, change = np.nonzero(present[:, self.group] & (self._current() != self.option))
        targets = self.targets[change]
        return self.encoding.normalised(np.where(targets != _LEFT, targets, self.filled[device])), device, change

    def _current(self) -> np.ndarray:
        """The option that each subnet has of every change's group, `(num_devices, num_changes)`."""
        options = np.zeros((len(self.rows), len(self.groups)), np.int64)
        for group, columns in enumerate(self.groups):
            for column in columns:
                options[:, group] = options[:, group] * self.encoding.choices[column] + self.filled[:, column]
        return options[:, self.group]

    def after(self, change: np.ndarray) -> np.ndarray:
        """Every device's subnet after one change, `(num_devices, num_columns)`."""
        return self._applied(self.targets[change])

    def _applied(self, targets: np.ndarray) -> np.ndarray:
        """Every device's subnet with other values in the columns that it has, `(num_devices, num_columns)`."""
        return self.encoding.normalised(np.where((targets != _LEFT) & (self.rows >= 0), targets, self.filled))

    def combined(self, effects: Effects) -> np.ndarray:
        """Subnets after some changes at once, `(num_devices, num_combinations, num_columns)`."""
        dense = self._dense(effects)
        found, price = [], np.zeros(len(self.rows), np.float32)
        for most in _AT_ONCE:
            price = dense.fitting_price(most)
            for factor in _AROUND:
                taken, moved = dense.taken(price * np.float32(factor), most)
                change = self.number[np.arange(len(self.groups))[:, None], taken].T[:, self.group_of]
                targets = self.targets[change, np.arange(self.rows.shape[1])]
                found.append(self._applied(np.where(moved.T[:, self.group_of], targets, _LEFT)))
        return np.concatenate([np.stack(found, axis=1), self._pairs(effects, price)], axis=1)

    def _dense(self, effects: Effects) -> DenseEffects:
        shape = (self.number.shape[1], len(self.groups), len(self.rows))
        gains, prices = np.full(shape, -np.inf, np.float32), np.zeros(shape, np.float32)
        gains[self.option, self.group], prices[self.option, self.group] = effects.gains.T, effects.prices.T
        added = np.zeros((effects.room.shape[1], *shape), np.float32)
        added[:, self.option, self.group] = effects.added.transpose(2, 1, 0)
        return DenseEffects(gains, prices, added, effects.room.T)

    def _pairs(self, effects: Effects, price: np.ndarray) -> np.ndarray:
        """Subnets after two changes, the most promising ones, `(num_devices, _PAIRS, num_columns)`."""
        score = effects.gains - price[:, None] * effects.prices
        score[effects.gains == 0] = -np.inf  # no change
        among = min(_PAIRED, score.shape[1] - 1)
        best = np.argpartition(-score, among, axis=1)[:, :among]
        first, second = np.triu_indices(among, 1)
        groups = self.group[best]
        gains = np.take_along_axis(effects.gains, best, axis=1)
        expected = gains[:, first] + gains[:, second]
        fits = groups[:, first] != groups[:, second]
        for limit in range(effects.room.shape[1]):
            added = np.take_along_axis(effects.added[:, :, limit], best, axis=1)
            fits &= added[:, first] + added[:, second] <= effects.room[:, limit, None]
        expected[~fits] = -np.inf
        kept = min(_PAIRS, len(first) - 1)
        chosen = np.argpartition(-expected, kept, axis=1)[:, :kept]
        one, other = (np.take_along_axis(best, part[chosen], axis=1) for part in (first, second))
        rows = []
        for number in range(kept):
            targets = self.targets[one[:, number]]
            rows.append(self._applied(np.where(targets != _LEFT, targets, self.targets[other[:, number]])))
        return np.stack(rows, axis=1)


@dataclass(frozen=True, slots=True)
class DenseEffects:
    """First-order effects by option, group and device; an option that a group has not brings minus infinity.

    Args:
        gains, prices: as in `Effects`, `(num_options, num_groups, num_devices)`.
        added: with an axis of limits before the others.
        room: `(num_limits, num_devices)`.
    """

    gains: np.ndarray
    prices: np.ndarray
    added: np.ndarray
    room: np.ndarray

    def fitting_price(self, most: int) -> np.ndarray:
        """The least price found at which at most so many changes fit into the room, `(num_devices,)`."""
        finite = np.where(np.isfinite(self.gains), np.abs(self.gains), 0)
        scale = finite.max(axis=(0, 1)) / np.maximum(np.abs(self.prices).max(axis=(0, 1)), _TINY)
        low, high = (np.full(len(scale), np.log(end), np.float32) for end in (_LEAST, _MOST))
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            taken, moved = self.taken(scale * np.exp(middle), most)
            fits = (self._total(taken, moved) <= self.room).all(axis=0)
            low, high = np.where(fits, low, middle), np.where(fits, middle, high)
        return scale * np.exp(high)

    def taken(self, price: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
        """For every group the option of most accuracy less price times cost, and whether it is among the best.

        Both are `(num_groups, num_devices)`; at most `most` groups change.
        """
        reached, taken = np.full(self.gains.shape[1:], -np.inf, np.float32), np.zeros(self.gains.shape[1:], np.int16)
        for option, (gains, prices) in enumerate(zip(self.gains, self.prices, strict=True)):
            score = gains - price * prices
            taken[score > reached] = option
            np.maximum(reached, score, out=reached)
        moved = reached > 0
        if most < len(reached):
            moved &= reached >= np.partition(reached, -most, axis=0)[-most]
        return taken, moved

    def _total(self, taken: np.ndarray, moved: np.ndarray) -> np.ndarray:
        """What the taken options add to every limit, `(num_limits, num_devices)`."""
        index = np.where(moved, taken, 0).astype(np.int64) * taken.size + np.arange(taken.size).reshape(taken.shape)
        added = self.added.reshape(len(self.added), -1)
        return np.stack([(np.take(own, index) * moved).sum(axis=0) for own in added])


def _filled(encoding: Encoding, rows: np.ndarray) -> np.ndarray:
    """Rows with a value in every column: one that a subnet has not takes that of the column before it, if it may.

    A block that a change adds is then like the block before it, and not the smallest one.
    """
    filled = np.maximum(rows, 0)
    for column in range(1, encoding.num_columns):
        if encoding.choices[column] == encoding.choices[column - 1]:
            filled[:, column] = np.where(rows[:, column] < 0, filled[:, column - 1], rows[:, column])
    return filled
