"""From subnets to better ones nearby, for many devices in step: what single changes bring tells which to combine.

A step prices every change of one group of columns on every device; a block's kernel and expand ratio are one group. To
first order changes add up, so that the best combination within what is left of the limits is the one that takes, group
by group, the change of most accuracy less a price on cost; the least of some prices at which it fits is taken
(Lagrangian relaxation; Everett 1963). Of several limits, each counts the more the closer it is. Columns that set the
sizes of many blocks, as depth and resolution do, make a subnet's form: each change of them has a combination of its
own, which makes up for what it costs, with the blocks that it adds as they suit best. These combinations, and the most
promising pairs of changes, are then priced as they are.

A subnet of another form is seldom better at once, but often a step later. So each device keeps its best subnets of
some unlike forms and goes on from all of them (beam search).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fedofa.device.operators import OperatorIndex, SubnetBatch
from fedofa.search.accuracy import AccuracyPredictor

Excess = Callable[[SubnetBatch, np.ndarray, np.ndarray], np.ndarray]
"""By which share subnets exceed limits, from a batch and, for every pair, the number of a subnet in it and that of a
device, `(num_pairs, num_limits)`."""

_SHARPNESS = 20.0
"""How fast a limit's weight falls with the share of it that is left."""
_PRICES = np.append(0.0, np.geomspace(0.1, 30.0, 20)).astype(np.float32)
"""The prices that are tried, as multiples of a subnet's typical ratio of accuracy to cost."""
_FORMS = 8
"""Combinations that are priced: that of the same form, and the most promising ones of others."""
_PAIRED, _PAIRS = 40, 12
"""Changes of which pairs are looked at, and pairs that are priced."""
_LEFT = -1
"""A column that a change leaves as it is."""
_TOGETHER = 48
"""Subnets that step together: their effects fit into a processor's cache."""
_TINY = 1e-12


@dataclass(frozen=True, slots=True)
class Beam:
    """Subnets of devices, each within its device's limits.

    Args:
        rows: `(num_subnets, num_columns)`.
        accuracies: as predicted, `(num_subnets,)`.
        owners: the device of each, `(num_subnets,)`.
    """

    rows: np.ndarray
    accuracies: np.ndarray
    owners: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, positions: np.ndarray) -> Beam:
        """Some of the subnets."""
        return Beam(self.rows[positions], self.accuracies[positions], self.owners[positions])

    def best(self, form: Sequence[int], width: int | None = None) -> np.ndarray:
        """The positions of the best subnet of each form for every device, of so many forms; device by device.

        Args:
            form: columns that make it.
        """
        order = np.lexsort((-self.accuracies, self.owners))
        keys = np.concatenate([self.owners[order, None], self.rows[order][:, list(form)] + 1], axis=1)
        weights = np.cumprod(np.append(1, keys.max(axis=0, initial=0)[:-1] + 1))
        order = order[np.sort(np.unique(keys @ weights, return_index=True)[1])]
        owners = self.owners[order]
        rank = np.arange(len(order)) - np.searchsorted(owners, owners)
        return order if width is None else order[rank < width]


def refine(
    index: OperatorIndex,
    predictor: AccuracyPredictor,
    rows: np.ndarray,
    owners: np.ndarray,
    excess: Excess,
    widths: Sequence[int],
) -> tuple[np.ndarray, np.ndarray]:
    """The best subnet that is reached for every device, `(num_devices, num_columns)`, and its accuracy.

    Args:
        index: of the space.
        predictor: of accuracy.
        rows: to begin with, within their devices' limits, `(num_subnets, num_columns)`.
        owners: the device of each, every one from 0 on, `(num_subnets,)`.
        excess: prices subnets on devices.
        widths: how many subnets of unlike forms a device keeps after each step; those that it had before take no
            further one.
    """
    changes = Changes(index)
    beam = Beam(rows, predictor.predict(SubnetBatch(index, rows)), owners)
    fresh = np.arange(len(rows))
    for width in widths:
        if not len(fresh):
            break
        fresh = fresh[np.lexsort(beam.rows[fresh].T)]  # devices with one subnet step together
        parts = np.array_split(fresh, -(-len(fresh) // _TOGETHER))
        found = [beam, *(_step(changes, predictor, beam.take(part), excess) for part in parts)]
        known = len(beam)
        beam = Beam(*(np.concatenate([getattr(part, name) for part in found]) for name in Beam.__slots__))
        kept = beam.best(changes.form, width)
        beam, fresh = beam.take(kept), np.nonzero(kept >= known)[0]
    beam = beam.take(beam.best((), 1))
    return beam.rows, beam.accuracies


def _step(changes: Changes, predictor: AccuracyPredictor, beam: Beam, excess: Excess) -> Beam:
    """What a step from every subnet finds within the limits, the best of each form."""
    index, rows = changes.index, beam.rows

    def priced(rows: np.ndarray, subnets: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Accuracy and excess for every pair of a row's number and a start."""
        batch = SubnetBatch(index, rows)
        return predictor.predict(batch)[subnets], excess(batch, subnets, beam.owners[start])

    every = np.arange(len(rows))
    single, subnets, start, change = _singles(changes, rows)
    reached, over = priced(single, subnets, start)
    own = excess(SubnetBatch(index, rows), every, beam.owners).astype(np.float32)
    shape = (len(rows), len(changes.group))
    gains, added = np.zeros(shape, np.float32), np.zeros((*shape, own.shape[1]), np.float32)
    gains[start, change], added[start, change] = reached - beam.accuracies[start], over - own[start]
    combined = changes.combined(rows, Effects.of(changes, rows, gains, added, own))
    flat, combining = combined.reshape(-1, rows.shape[1]), np.repeat(every, combined.shape[1])
    also, beyond = priced(flat, np.arange(len(flat)), combining)
    near, subnets = np.concatenate([single, flat]), np.concatenate([subnets, len(single) + np.arange(len(flat))])
    start, reached = np.concatenate([start, combining]), np.concatenate([reached, also])
    within = np.nonzero(np.concatenate([over, beyond]).max(axis=1) <= 0)[0]
    found = Beam(near[subnets[within]], reached[within], beam.owners[start[within]])
    return found.take(found.best(changes.form))


def _singles(changes: Changes, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Subnets after one change, those once that several starts have, and which is which start's after which change.

    `(num_subnets, num_columns)`, and for every pair of a start and a change the subnet, the start and the change.
    """
    distinct, of = np.unique(rows, axis=0, return_inverse=True)
    single, parent, change = changes.single(distinct)
    numbers = np.full((len(distinct), len(changes.group)), -1)
    numbers[parent, change] = np.arange(len(single))
    numbers = numbers[of.ravel()]
    start, change = np.nonzero(numbers >= 0)
    return single, numbers[start, change], start, change


@dataclass(frozen=True, slots=True)
class Effects:
    """What every change does by itself to every subnet, float32; of one that changes nothing, 0.

    Args:
        gains: what it adds to accuracy, `(num_subnets, num_changes)`.
        prices: what it adds to the limits' weighted mean, the same shape.
        added: what it adds to each limit's excess, with an axis of limits.
        room: what is left of each limit, `(num_subnets, num_limits)`.
    """

    gains: np.ndarray
    prices: np.ndarray
    added: np.ndarray
    room: np.ndarray

    @classmethod
    def of(cls, changes: Changes, rows: np.ndarray, gains: np.ndarray, added: np.ndarray, own: np.ndarray) -> Effects:
        """From differences to the subnets themselves; what a change of a missing block does is told from adding it."""
        start, change = np.nonzero((gains != 0) & ~changes.present(rows)[:, changes.group])
        adding = changes.adding[change]
        gains[start, change] -= gains[start, adding]
        added[start, change] -= added[start, adding]
        closeness = np.exp(_SHARPNESS * own)
        weights = closeness / closeness.sum(axis=1, keepdims=True)
        return cls(gains, (added * weights[:, None]).sum(axis=2), added, -own)


class Changes:
    """All changes of one group of columns to other values, and what they make of subnets.

    Columns that set nothing but the same places, as a block's kernel and expand ratio do, are one group: what one of
    them costs depends on the others, so that their values are only truly priced together.

    Args:
        index: of the space.

    Attributes:
        group: of every change, `(num_changes,)`.
        adding: for changes of columns that a subnet may lack, the change that adds them, else -1, `(num_changes,)`.
        form: the columns that make a subnet's form.
    """

    def __init__(self, index: OperatorIndex) -> None:
        self.index, self.encoding, self.form = index, index.encoding, index.form_columns
        groups, choices = index.column_groups, index.encoding.choices
        options = [list(itertools.product(*(range(choices[c]) for c in columns))) for columns in groups]
        self.group = np.repeat(np.arange(len(groups)), [len(values) for values in options])
        self._option = np.concatenate([np.arange(len(values)) for values in options])
        self._first = np.array([columns[0] for columns in groups])  # a group's columns are all there, or none
        self._group_of = np.zeros(index.encoding.num_columns, np.int64)
        self._values = np.full((index.encoding.num_columns, int(self._option.max()) + 2), _LEFT)  # the last: no change
        for number, (columns, values) in enumerate(zip(groups, options, strict=True)):
            self._group_of[list(columns)] = number
            self._values[list(columns), : len(values)] = np.array(values).T
        own = self._group_of == self.group[:, None]
        self._targets = np.where(own, self._values[:, self._option].T, _LEFT)
        self.adding = np.full(len(self.group), -1)
        for change, group in enumerate(self.group):
            control = self.encoding.control_of(self._first[group])
            if control is not None:
                self.adding[change] = np.nonzero(self._targets[:, control[0]] == choices[control[0]] - 1)[0][-1]
        self._reforming = np.nonzero(np.isin(self._first[self.group], self.form))[0]

    def present(self, rows: np.ndarray) -> np.ndarray:
        """Which groups subnets have, `(num_subnets, num_groups)`."""
        return rows[:, self._first] >= 0

    def single(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Subnets after one change, that of what they lack after adding it, and the start and the change of each.

        `(num_subnets, num_columns)`, `(num_subnets,)` and `(num_subnets,)`.
        """
        filled = self._filled(rows)
        differs = ((self._targets != _LEFT) & (self._targets != filled[:, None])).any(axis=2)
        present = self.present(rows)
        controlled = np.where(self.adding >= 0, present[:, self.group[self.adding]], False)
        start, change = np.nonzero(differs & (present[:, self.group] | controlled))
        added = np.where(present[start, self.group[change]], -1, self.adding[change])
        targets = np.where(added[:, None] >= 0, self._targets[added], _LEFT)
        targets = np.where(self._targets[change] != _LEFT, self._targets[change], targets)
        return self._applied(filled[start], targets), start, change

    def combined(self, rows: np.ndarray, effects: Effects) -> np.ndarray:
        """Subnets after some changes at once, `(num_subnets, num_combinations, num_columns)`."""
        filled = self._filled(rows)
        many, price = self._many(filled, effects)
        targets = np.concatenate([many, self._pairs(self.present(rows), effects, price)], axis=1)
        flat = self._applied(np.repeat(filled, targets.shape[1], axis=0), targets.reshape(-1, rows.shape[1]))
        return flat.reshape(targets.shape)

    def _many(self, filled: np.ndarray, effects: Effects) -> tuple[np.ndarray, np.ndarray]:
        """New values for as many columns as fit, `(num_subnets, _FORMS, num_columns)`, and the price at which they do.

        The first is of the same form.
        """
        typical = np.abs(effects.gains).sum(axis=1) / np.maximum(np.abs(effects.prices).sum(axis=1), _TINY)
        price = typical[:, None] * _PRICES
        every = np.arange(len(filled))
        dense = self._dense(effects.gains, effects.prices, *effects.added.transpose(2, 0, 1))
        taken = _most_worth(dense[0], dense[1], price)
        effect = np.stack([np.take_along_axis(of, taken, axis=2) for of in (dense[0], *dense[2:])], axis=-1)
        forms = np.concatenate([np.full((1, filled.shape[1]), _LEFT), self._targets[self._reforming]])
        after = self._applied(np.repeat(filled, len(forms), axis=0), np.tile(forms, (len(filled), 1)))
        free = self.present(after).reshape(len(filled), len(forms), -1) & ~np.isin(self._first, self.form)
        total = free.astype(np.float32) @ effect.reshape(*free.shape[::2], -1)
        total = total.reshape(len(filled), len(forms), *effect.shape[2:])  # by subnet, form and price: gain and costs
        total[:, 1:, :, 0] += effects.gains[:, self._reforming, None]
        total[:, 1:, :, 1:] += effects.added[:, self._reforming, None]
        fits = (total[..., 1:] <= effects.room[:, None, None]).all(axis=3)
        fitting = fits.any(axis=-1)
        first = np.where(fitting, fits.argmax(axis=2), len(_PRICES) - 1)
        expected = np.take_along_axis(total[..., 0], first[:, :, None], axis=2)[:, :, 0]
        expected[~fitting] = -np.inf
        expected[:, 1:][effects.gains[:, self._reforming] == 0] = -np.inf  # no other form
        expected[:, 0] = np.inf
        kept = np.argsort(-expected, axis=1, kind="stable")[:, :_FORMS]
        chosen = taken[every[:, None], :, np.take_along_axis(first, kept, axis=1)]
        chosen[~np.take_along_axis(free, kept[:, :, None], axis=1)] = -1
        targets = self._values[np.arange(filled.shape[1]), chosen[:, :, self._group_of]]
        return np.where(forms[kept] != _LEFT, forms[kept], targets), price[every, first[:, 0]]

    def _dense(self, *effects: np.ndarray) -> list[np.ndarray]:
        """Effects by subnet, group and option, and none at the last option, `(num_subnets, num_groups, ...)` each."""
        shape = (len(self._first), self._values.shape[1])
        dense = [np.zeros((len(effect), *shape), np.float32) for effect in effects]
        for into, effect in zip(dense, effects, strict=True):
            into[:, self.group, self._option] = effect
        return dense

    def _pairs(self, present: np.ndarray, effects: Effects, price: np.ndarray) -> np.ndarray:
        """New values for the columns of two changes, the most promising ones, `(num_subnets, _PAIRS, num_columns)`."""
        score = effects.gains - price[:, None] * effects.prices
        score[(effects.gains == 0) | ~present[:, self.group]] = -np.inf  # no change
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
        chosen = np.argpartition(-expected, min(_PAIRS, len(first) - 1), axis=1)[:, :_PAIRS]
        one, other = (self._targets[np.take_along_axis(best, part[chosen], axis=1)] for part in (first, second))
        return np.where(one != _LEFT, one, other)

    def _applied(self, filled: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Subnets with new values in some columns."""
        return self.encoding.normalised(np.where(targets != _LEFT, targets, filled))

    def _filled(self, rows: np.ndarray) -> np.ndarray:
        """Rows with a value in every column: one that a subnet has not takes that of the column before it, if it may.

        A block that a change adds is then like the block before it, and not the smallest one.
        """
        filled = np.maximum(rows, 0)
        for column in range(1, self.encoding.num_columns):
            if self.encoding.choices[column] == self.encoding.choices[column - 1]:
                filled[:, column] = np.where(rows[:, column] < 0, filled[:, column - 1], rows[:, column])
        return filled


def _most_worth(gains: np.ndarray, costs: np.ndarray, price: np.ndarray) -> np.ndarray:
    """The option of most accuracy less price times cost, -1 where none is worth more than no change.

    Args:
        gains, costs: `(num_subnets, num_groups, num_options)`.
        price: `(num_subnets, num_prices)`.

    Returns:
        `(num_subnets, num_groups, num_prices)`.
    """
    shape = (*gains.shape[:2], price.shape[1])
    reached, taken = np.zeros(shape, np.float32), np.full(shape, -1, np.int16)
    for option in range(gains.shape[2]):
        worth = gains[:, :, option, None] - price[:, None] * costs[:, :, option, None]
        np.copyto(taken, option, where=worth > reached)
        np.maximum(reached, worth, out=reached)
    return taken
