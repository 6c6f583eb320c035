"""Climbing in a search space: from a subnet to the best one that differs in one or two columns, until none is better.

All single changes are priced. What a pair of changes does is first taken to be the sum of what each does alone, which
is nearly so for costs that add up over operators and for a linear predictor; only the promising pairs are then priced.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedofa.device.operators import OperatorIndex, SubnetBatch
from fedofa.search.accuracy import AccuracyPredictor
from fedofa.search.limits import Limits

_MOST_STEPS = 60
_PRICED_PAIRS = 300
"""Pairs of changes that a step prices at the most."""

Worth = Callable[[np.ndarray], np.ndarray]
"""What prices are worth, the more the better; see `within` and `closeness`."""


def within(prices: np.ndarray) -> np.ndarray:
    """The accuracy of subnets that meet all limits, minus infinity for the others, `(num_subnets,)`."""
    return np.where(_worst(prices) <= 0, prices[:, 0], -np.inf)


def closeness(prices: np.ndarray) -> np.ndarray:
    """How far the greatest excess lies below its limit, negative above it, `(num_subnets,)`."""
    return -_worst(prices)


def _worst(prices: np.ndarray) -> np.ndarray:
    return prices[:, 1:].max(axis=1, initial=-np.inf)


@dataclass(frozen=True, slots=True)
class Climber:
    """Climbs with one predictor within one set of limits.

    Args:
        index: of the space.
        predictor: of accuracy.
        limits: that subnets have to meet.
    """

    index: OperatorIndex
    predictor: AccuracyPredictor
    limits: Limits

    def climb(self, row: np.ndarray, worth: Worth, enough: float = np.inf) -> np.ndarray:
        """Where climbing ends: where no step is worth more, or as soon as a subnet is worth `enough`."""
        prices = self._prices(row[None])
        for _ in range(_MOST_STEPS):
            here = float(worth(prices)[0])
            if here >= enough:
                break
            near, near_prices = self._neighbours(row, prices, worth)
            worths = worth(near_prices)
            best = int(np.argmax(worths))
            if not worths[best] > here:
                break
            row, prices = near[best], near_prices[best : best + 1]
        return row

    def _prices(self, rows: np.ndarray) -> np.ndarray:
        """Accuracy and the excess over every limit, `(num_subnets, 1 + num_limits)`."""
        batch = SubnetBatch(self.index, rows)
        return np.concatenate([self.predictor.predict(batch)[:, None], self.limits.excess(batch)], axis=1)

    def _neighbours(self, row: np.ndarray, prices: np.ndarray, worth: Worth) -> tuple[np.ndarray, np.ndarray]:
        """Rows that differ in one column, the promising ones of those that differ in two, and their prices."""
        encoding = self.index.encoding
        columns, values = _changes(row, encoding.choices)
        if not len(columns):
            return row[None], prices
        changed = np.repeat(row[None], len(columns), axis=0)
        changed[np.arange(len(columns)), columns] = values
        singles = encoding.normalised(changed)
        single_prices = self._prices(singles)
        first, second = np.triu_indices(len(columns), 1)
        apart = columns[first] != columns[second]
        first, second = first[apart], second[apart]
        expected = worth(single_prices[first] + single_prices[second] - prices)
        chosen = _most(expected, _PRICED_PAIRS)
        chosen = chosen[expected[chosen] > worth(prices)[0]]
        if not len(chosen):
            return singles, single_prices
        pairs = changed[first[chosen]]
        pairs[np.arange(len(chosen)), columns[second[chosen]]] = values[second[chosen]]
        pairs = encoding.normalised(pairs)
        return np.concatenate([singles, pairs]), np.concatenate([single_prices, self._prices(pairs)])


def _changes(row: np.ndarray, choices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All single changes of a row: a column and its new value each."""
    columns = np.repeat(np.arange(len(choices)), choices)
    values = np.concatenate([np.arange(number) for number in choices])
    changes = (row[columns] >= 0) & (row[columns] != values)
    return columns[changes], values[changes]


def _most(values: np.ndarray, count: int) -> np.ndarray:
    """The positions of the greatest values, as many at the most, in their order."""
    if len(values) <= count:
        return np.arange(len(values))
    return np.sort(np.argpartition(-values, count)[:count])
