"""Knapsack problems, many at once: an option for every group, of most gain in all, within several limits.

An option's worth is its gain less a price times its costs, of which each limit counts the more the closer it is. At a
given price the best choice is a matter of each group alone (Lagrangian relaxation; Everett 1963), and the best price is
the least one at which the choice fits. What is then left of the limits is filled by changes of one or two groups.

Arrays have their axis of problems last: what is done to one option of a group is done to all problems at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_SHARPNESS = 6.0
"""How fast a limit's weight falls with the share of it that is left."""
_TELLING = 1e-3
"""From which difference on between sum and greatest of costs it is told how far they add up."""
_SUM = 0.999
"""From which share on costs are taken to add up altogether."""
_TINY = 1e-12


@dataclass(frozen=True, slots=True)
class Solution:
    """A choice in every problem.

    Args:
        chosen: the option of every group, `(num_groups, num_problems)`.
        gain: in all, `(num_problems,)`; minus infinity where no choice that fits was found.
        price: gain for a unit of cost, the least at which the choice fits, `(num_problems,)`.
        weights: of the limits in that cost, `(num_limits, num_problems)`.
    """

    chosen: np.ndarray
    gain: np.ndarray
    price: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True, slots=True)
class Knapsacks:
    """As many problems with as many groups, options and limits each, float32.

    Args:
        gains: `(num_options, num_groups, num_problems)`; minus infinity for options that a group has not.
        costs: `(num_limits, num_options, num_groups, num_problems)`.
        room: what the options may cost together, `(num_limits, num_problems)`.
        additive: how far costs add up, `(num_limits, num_problems)`: 1 for their sum over groups, 0 for the greatest.
    """

    gains: np.ndarray
    costs: np.ndarray
    room: np.ndarray
    additive: np.ndarray

    def calibrated(self, chosen: np.ndarray, left: np.ndarray) -> Knapsacks:
        """The same problems, their costs adding up as far as they are known to do in one choice.

        Args:
            chosen: the options, `(num_groups, num_problems)`.
            left: what they leave of the limits, `(num_limits, num_problems)`.
        """
        total, greatest = self._total_and_greatest(chosen)
        more = total - greatest
        share = np.clip((self.room - left - greatest) / np.where(more > _TELLING, more, 1), 0, 1)
        return self.adding_up(np.where((more > _TELLING) & (share < _SUM), share, 1).astype(np.float32))

    def adding_up(self, additive: np.ndarray) -> Knapsacks:
        """The same problems, their costs adding up so far, without options that alone cost too much.

        Args:
            additive: `(num_limits, num_problems)`. Of limits below 1 no costs may be negative.
        """
        beyond = ((self.costs[:, 1:] > self.room[:, None, None]) & (additive < 1)[:, None, None]).any(axis=0)
        gains = np.concatenate([self.gains[:1], np.where(beyond, -np.inf, self.gains[1:])])
        return Knapsacks(gains, self.costs, self.room, additive)

    def left(self, chosen: np.ndarray) -> np.ndarray:
        """What options, `(num_groups, num_problems)`, leave of the limits, `(num_limits, num_problems)`."""
        total, greatest = self._total_and_greatest(chosen)
        return self.room - greatest - self.additive * (total - greatest)

    def _total_and_greatest(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        costs = self._at(self.costs, chosen)
        return costs.sum(axis=1), costs.max(axis=1, initial=0)

    def _at(self, values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """The values of options, `(..., num_groups, num_problems)`."""
        size = chosen.size
        positions = chosen * np.int64(size) + np.arange(size).reshape(chosen.shape)
        flat = values.reshape(*values.shape[:-3], values.shape[-3] * size)
        return flat.take(positions, axis=-1)

    def _weights(self, chosen: np.ndarray) -> np.ndarray:
        """How much each limit counts, from what options leave of it, `(num_limits, num_problems)`."""
        left = self.left(chosen)
        closeness = np.exp(_SHARPNESS * (left.min(axis=0) - left))
        return closeness / closeness.sum(axis=0)

    def weighted(self, weights: np.ndarray) -> np.ndarray:
        """The costs of all limits in one, `(num_options, num_groups, num_problems)`."""
        weights = weights * self.additive
        total = self.costs[0] * weights[0]
        for cost, weight in zip(self.costs[1:], weights[1:], strict=True):
            total += cost * weight
        return total

    def typical_price(self, chosen: np.ndarray) -> np.ndarray:
        """The mean ratio of gain to cost, with the weights of a choice, `(num_problems,)`."""
        gains = np.abs(np.where(np.isfinite(self.gains), self.gains, 0)).sum(axis=(0, 1))
        return gains / np.maximum(np.abs(self.weighted(self._weights(chosen))).sum(axis=(0, 1)), _TINY)

    def relaxed(self, chosen: np.ndarray, price: np.ndarray, rounds: Sequence[tuple[float, int]]) -> Solution:
        """The best choice at a price, of those that fit.

        Args:
            chosen: that tells which limits are close, at first; in later rounds the best choice so far does.
            price: to begin with, `(num_problems,)`.
            rounds: by which factor prices above and below are tried, and how often that range is halved.
        """
        best = Solution(chosen.astype(np.int16), np.full(len(price), -np.inf, np.float32), price, self._weights(chosen))
        for factor, halvings in rounds:
            weights = self._weights(best.chosen)
            costs = self.weighted(weights)
            price, span = best.price.astype(np.float32), np.float32(np.log(factor))
            for _ in range(halvings):
                chosen = _most_worth(self.gains, costs, price)
                fits = (self.left(chosen) >= 0).all(axis=0)
                gain = self._at(self.gains, chosen).sum(axis=0)
                better = fits & (gain > best.gain)
                best = Solution(
                    np.where(better, chosen, best.chosen),
                    np.where(better, gain, best.gain),
                    np.where(better | np.isinf(best.gain), price, best.price),
                    weights,
                )
                span /= 2
                price = price * np.exp(np.where(fits, -span, span))
        return best

    def filled(self, best: Solution, among: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The best choices after one or two changes, to first order: the problem of each, and its options.

        Args:
            best: to begin with; its price and weights tell which changes are promising.
            among: changes of which pairs are looked at.
            number: of choices a problem, at the most.

        Returns:
            `(num_choices,)` and `(num_groups, num_choices)`.
        """
        groups, problems = best.chosen.shape
        if not best.chosen.size:
            return np.zeros(0, np.int64), best.chosen[:, :0]
        own = self._at(self.gains, best.chosen)
        gains = (self.gains - np.where(np.isfinite(own), own, np.inf)).reshape(-1, problems)
        costs = (self.costs - self._at(self.costs, best.chosen)[:, None]) * self.additive[:, None, None]
        costs = costs.reshape(len(costs), -1, problems)
        score = gains - best.price * (costs * best.weights[:, None]).sum(axis=0)
        score[(gains == 0) & (costs == 0).all(axis=0)] = -np.inf  # no change
        among = min(among, len(score))
        changes = np.argpartition(-score.T, among - 1, axis=1)[:, :among]
        gains = np.take_along_axis(gains.T, changes, axis=1)
        first, second = np.triu_indices(among)  # a change with itself is that change alone
        expected = gains[:, first] + np.where(first != second, gains[:, second], 0)
        fits = (changes[:, first] % groups != changes[:, second] % groups) | (first == second)
        for cost, left in zip(costs, self.left(best.chosen), strict=True):
            added = np.take_along_axis(cost.T, changes, axis=1)
            fits &= added[:, first] + np.where(first != second, added[:, second], 0) <= left[:, None]
        expected[~fits] = -np.inf
        kept = np.argpartition(-expected, min(number, len(first)) - 1, axis=1)[:, :number]
        problem, place = np.nonzero(np.take_along_axis(expected, kept, axis=1) > 0)
        pair = kept[problem, place]
        chosen = best.chosen[:, problem]
        for change in (changes[problem, first[pair]], changes[problem, second[pair]]):
            chosen[change % groups, np.arange(len(problem))] = change // groups
        return problem, chosen


def highest(gains: np.ndarray, costs: np.ndarray, price: np.ndarray) -> np.ndarray:
    """What the most worthy options are worth together, `(num_problems,)`.

    Args:
        gains, costs: `(num_options, num_groups, num_problems)`.
        price: `(num_problems,)`.
    """
    reached = gains[0] - price * costs[0]
    for gain, cost in zip(gains[1:], costs[1:], strict=True):
        np.maximum(reached, gain - price * cost, out=reached)
    return reached.sum(axis=0)


def _most_worth(gains: np.ndarray, costs: np.ndarray, price: np.ndarray) -> np.ndarray:
    """The options of most gain less price times cost, int16 `(num_groups, num_problems)`; arguments as of `highest`."""
    reached = gains[0] - price * costs[0]
    taken, worth = np.zeros(reached.shape, np.int16), np.empty_like(reached)
    for option in range(1, len(gains)):
        np.multiply(price, costs[option], out=worth)
        np.subtract(gains[option], worth, out=worth)
        np.maximum(taken, (worth > reached) * np.int16(option), out=taken)  # the last that is better than all before
        np.maximum(reached, worth, out=reached)
    return taken
