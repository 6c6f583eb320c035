"""From subnets to better ones nearby, for many devices in step: within a form, the best options are a matter of prices.

Within a form (see `search.forms`) costs add up over groups of columns or are the greatest of them, and near a subnet
accuracy adds up as well, to first order. The best options within the limits are then a knapsack problem
(`search.knapsack`). A step solves it for a subnet's own form and for the most promising of those that differ from it in
one column: each with its own costs, since at another resolution a device's operators take other times. In the own form
it also fills what is left of the limits with changes of one or two groups. All that is found is then priced as it is.

A subnet of another form is seldom better at once, but often a step later. So each device keeps its best subnets of
some unlike forms and goes on from all of them (beam search).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedofa.device.operators import OperatorIndex, SubnetBatch
from fedofa.search.accuracy import AccuracyPredictor
from fedofa.search.forms import FormTables, Options
from fedofa.search.knapsack import Knapsacks, Solution, highest
from fedofa.search.pricing import Pricing

_FIRST, _THEN = ((50.0, 6), (4.0, 4)), ((8.0, 4), (3.0, 3))
"""How far from the typical price, then from that of a subnet's own form, prices are tried, and how many."""
_FORMS = 4
"""Subnets of unlike forms that a step prices, the most promising ones."""
_PAIRED, _PAIRS = 40, 12
"""Changes of which pairs are looked at, and pairs that are priced."""
_TOGETHER = 128
"""Subnets that step together: their tables fit into a processor's cache."""


@dataclass(frozen=True, slots=True)
class Beam:
    """Subnets of devices, each within its device's limits.

    Args:
        rows: `(num_subnets, num_columns)`.
        accuracies: as predicted, `(num_subnets,)`.
        owners: the device of each, `(num_subnets,)`.
        excess: by which share each exceeds its device's limits, `(num_subnets, num_limits)`.
    """

    rows: np.ndarray
    accuracies: np.ndarray
    owners: np.ndarray
    excess: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, positions: np.ndarray) -> Beam:
        """Some of the subnets."""
        return Beam(*(getattr(self, name)[positions] for name in Beam.__slots__))

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
    pricing: Pricing,
    widths: Sequence[int],
) -> tuple[np.ndarray, np.ndarray]:
    """The best subnet that is reached for every device that has one to begin with, in order of their numbers.

    Args:
        index: of the space.
        predictor: of accuracy.
        rows: to begin with, within their devices' limits, `(num_subnets, num_columns)`.
        owners: the device of each, by its number in the pricing, `(num_subnets,)`.
        pricing: of subnets on the devices.
        widths: how many subnets of unlike forms a device keeps after each step; those that it had before take no
            further one.

    Returns:
        The subnets, `(num_owners, num_columns)`, and their accuracies, `(num_owners,)`.
    """
    step = Step(Options(index), predictor, pricing)
    beam = step.priced(rows, owners)
    fresh = np.arange(len(beam))
    for width in widths:
        if not len(fresh):
            break
        parts = np.array_split(fresh, -(-len(fresh) // _TOGETHER))
        found = [beam, *(step.taken(beam.take(part)) for part in parts)]
        known = len(beam)
        beam = Beam(*(np.concatenate([getattr(part, name) for part in found]) for name in Beam.__slots__))
        kept = beam.best(index.form_columns, width)
        beam, fresh = beam.take(kept), np.nonzero(kept >= known)[0]
    beam = beam.take(beam.best((), 1))
    return beam.rows, beam.accuracies


class Step:
    """A step from many subnets at once.

    Args:
        options: of the space.
        predictor: of accuracy.
        pricing: of subnets on devices.
    """

    def __init__(self, options: Options, predictor: AccuracyPredictor, pricing: Pricing) -> None:
        self.options, self.predictor, self.pricing = options, predictor, pricing
        self._tables = FormTables(options, pricing.features)
        self._factors = pricing.factors.astype(np.float32)
        self._latency = pricing.tables.astype(np.float32)

    def priced(self, rows: np.ndarray, owners: np.ndarray) -> Beam:
        """Subnets with what they reach and cost, on a device each."""
        batch = SubnetBatch(self.options.index, rows)
        return Beam(rows, self.predictor.predict(batch), owners, self.pricing.excess(batch, owners))

    def taken(self, beam: Beam) -> Beam:
        """What a step from every subnet finds within the limits."""
        options = self.options
        forms = options.neighbours(beam.rows)
        numbers = self._tables.numbers(forms)
        gains, of_form = self._gains(beam, forms)
        chosen = options.chosen(beam.rows).T
        own = self._knapsacks(gains, numbers[:, 0], beam.owners).calibrated(chosen, -beam.excess.T)
        best = own.relaxed(chosen, own.typical_price(chosen), _FIRST)
        start, form = self._promising(gains, of_form, numbers, beam.owners, best)
        other = self._knapsacks(gains[:, :, start], numbers[start, form], beam.owners[start])
        other = other.adding_up(own.additive[:, start]).relaxed(chosen[:, start], best.price[start], _THEN)
        found = np.isfinite(other.gain)
        filled, changed = own.filled(replace(best, chosen=chosen), _PAIRED, _PAIRS)
        starts = np.concatenate([np.arange(len(beam)), filled, start[found]])
        form = np.concatenate([np.zeros(len(beam) + len(filled), np.int64), form[found]])
        chosen = np.concatenate([best.chosen, changed, other.chosen[:, found]], axis=1).T
        reached = self.priced(options.rows(forms[starts, form], chosen), beam.owners[starts])
        return reached.take(np.nonzero(reached.excess.max(axis=1) <= 0)[0])

    def _gains(self, beam: Beam, forms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What options and forms add, `(num_options, num_groups, num_subnets)` and `(num_subnets, num_forms)`."""
        options = self.options
        slopes = self.predictor.slopes(SubnetBatch(options.index, beam.rows))
        slopes = np.concatenate([slopes, np.zeros((len(beam), 1), np.float32)], axis=1).T
        gains = slopes[options.features].sum(axis=2)
        gains[np.arange(gains.shape[1]) >= options.num_options[:, None]] = -np.inf
        features = options.encoding.feature_starts[options.form] + forms
        of_form = slopes[features, np.arange(len(beam))[:, None, None]].sum(axis=2)
        return np.ascontiguousarray(gains.transpose(1, 0, 2)), of_form

    def _knapsacks(self, gains: np.ndarray, numbers: np.ndarray, owners: np.ndarray) -> Knapsacks:
        """The problems of finding the best options within a form on a device each.

        Args:
            gains: `(num_options, num_groups, num_problems)`.
            numbers: of forms in the tables, `(num_problems,)`.
            owners: the devices, `(num_problems,)`.
        """
        tables = self._tables
        costs = self._factors[owners] @ tables.added[numbers]
        costs[:, self.pricing.timed] += self._times(numbers, owners)
        costs = np.ascontiguousarray(costs.transpose(1, 2, 0)).reshape(costs.shape[1], *gains.shape)
        gains = np.where(tables.present[numbers].T, gains, 0)
        return Knapsacks(gains, costs, -self._base(numbers, owners).T, np.ones((1, 1), np.float32))

    def _times(self, numbers: np.ndarray, owners: np.ndarray) -> np.ndarray:
        """What options add to latency, `(num_problems, most_options * num_groups)`."""
        positions = self._tables.replaced[numbers] + owners[:, None] * self._latency.shape[1]
        times = self._latency.reshape(-1).take(positions).reshape(len(numbers), *self.options.features.shape[1::-1])
        return (times - times[:, :1]).reshape(positions.shape)

    def _base(self, numbers: np.ndarray, owners: np.ndarray) -> np.ndarray:
        """The excess of a form's first options, float32 `(num_problems, num_limits)`."""
        tables, pricing = self._tables, self.pricing
        base = (pricing.factors[owners] @ tables.features[numbers, :, None])[:, :, 0] + pricing.offsets[owners]
        base[:, pricing.timed] += pricing.tables[owners[:, None], tables.operators[numbers]].sum(axis=1)
        return base.astype(np.float32)

    def _promising(
        self, gains: np.ndarray, of_form: np.ndarray, numbers: np.ndarray, owners: np.ndarray, own: Solution
    ) -> tuple[np.ndarray, np.ndarray]:
        """The other forms that may bring most at the prices of the own ones: numbers of starts and of forms."""
        others = numbers[:, 1:]
        start, flat = np.repeat(np.arange(len(others)), others.shape[1]), others.ravel()
        weights = own.weights.T
        factors = (weights[:, None] @ self._factors[owners])[start]
        costs = (factors @ self._tables.added[flat])[:, 0]
        costs += self._times(flat, owners[start]) * weights[start, self.pricing.timed, None]
        costs = np.ascontiguousarray(costs.T).reshape(*gains.shape[:2], len(flat))
        room = -(self._base(flat, owners[start]) * weights[start]).sum(axis=1)
        gains = np.where(self._tables.present[flat].T, gains[:, :, start], 0)
        bound = highest(gains, costs, own.price[start]) + own.price[start] * room
        bound = bound.reshape(others.shape) + of_form[:, 1:]
        form = np.argsort(-bound, axis=1, kind="stable")[:, :_FORMS]
        return np.repeat(np.arange(len(form)), form.shape[1]), form.ravel() + 1
