"""The best subnet for a device, or all best trade-offs: NSGA-II over the encoding, then climbing to a local optimum.

Everything is evaluated in batches: a generation, or a neighbourhood, is one table look-up and one pass of the
predictor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedofa.device.models import Quantity, SubnetCostModel
from fedofa.device.operators import OperatorIndex, SubnetBatch
from fedofa.search.accuracy import AccuracyPredictor
from fedofa.search.climbing import Climber, closeness, within
from fedofa.search.evolution import evolve
from fedofa.search.fit import uniform_subnets
from fedofa.search.limits import Limits
from fedofa.types.errors import ConfigError, InfeasibilityError
from fedofa.types.space import SearchSpace, SubnetConfig

_CLIMBS, _APART = 8, 4
"""Subnets of each generation that climbing starts from, and columns in which they differ at the least."""


@dataclass(frozen=True, slots=True)
class Found:
    """A subnet that meets the limits.

    Args:
        subnet: the subnet.
        accuracy: as predicted; with the zero-cost proxy a rank, not an accuracy.
        costs: setting -> cost.
    """

    subnet: SubnetConfig
    accuracy: float
    costs: Mapping[str, Quantity]


@dataclass(frozen=True, slots=True)
class DeviceSearch:
    """Searches one space with one predictor.

    Args:
        index: of the space.
        predictor: of accuracy.
        reported: cost models whose figures are reported; the first is traded against accuracy where nothing is limited.
        population, generations: of NSGA-II.
    """

    index: OperatorIndex
    predictor: AccuracyPredictor
    reported: Sequence[SubnetCostModel]
    population: int = 128
    generations: int = 40

    def __post_init__(self) -> None:
        for name, least in (("population", 8), ("generations", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: expected at least {least}, found {getattr(self, name)}")

    def best(self, limits: Limits, seed: int = 0) -> Found:
        """The subnet of highest predicted accuracy within the limits.

        Raises:
            InfeasibilityError: when no subnet meets them: which limits, by how much, and the nearest subnet.
        """
        rows = self._evolve_and_climb(limits, seed)
        best = int(np.argmax(self.predictor.predict(SubnetBatch(self.index, rows))))
        return self._found(rows[best : best + 1])[0]

    def pareto(self, limits: Limits, seed: int = 0) -> list[Found]:
        """The subnets within the limits of which none is better in accuracy and in every limited cost, best first.

        Raises:
            InfeasibilityError: as `best`.
        """
        rows = self._evolve_and_climb(limits, seed)
        front = rows[_non_dominated(self._objectives(limits, SubnetBatch(self.index, rows)))]
        return sorted(self._found(front), key=lambda found: -found.accuracy)

    def _found(self, rows: np.ndarray) -> list[Found]:
        batch = SubnetBatch(self.index, rows)
        accuracies = self.predictor.predict(batch)
        costs = {model.setting: (model.predict(batch), model.unit) for model in self.reported}
        return [
            Found(
                self.index.encoding.subnet(row),
                float(accuracies[number]),
                {setting: Quantity(float(values[number]), unit) for setting, (values, unit) in costs.items()},
            )
            for number, row in enumerate(rows)
        ]

    def _objectives(self, limits: Limits, batch: SubnetBatch) -> np.ndarray:
        """What is minimised, `(num_subnets, num_objectives)`: negative accuracy and the limited costs."""
        costs = limits.costs(batch) if limits.limits else self.reported[0].predict(batch)[:, None]
        return np.concatenate([-self.predictor.predict(batch)[:, None], costs], axis=1)

    # -- where to begin ----------------------------------------------------------------------------------------------

    def _starts(self, limits: Limits, seed: int) -> np.ndarray:
        """The first population: uniform and random subnets, those first that meet the limits or come close."""
        encoding = self.index.encoding
        uniform = encoding.rows(list(uniform_subnets(encoding.space)))
        rows = np.concatenate([uniform, encoding.sample(np.random.default_rng(seed), 2 * self.population)])
        batch = SubnetBatch(self.index, rows)
        worst = limits.worst(batch)
        if (worst > 0).all():
            row = self._nearest(limits, rows[int(np.argmin(worst))])
            rows, worst = np.concatenate([row[None], rows]), np.concatenate([[0.0], worst])
            batch = SubnetBatch(self.index, rows)
        rank = np.lexsort((-self.predictor.predict(batch), np.maximum(worst, 0)))
        return rows[rank[: self.population]]

    def _nearest(self, limits: Limits, row: np.ndarray) -> np.ndarray:
        """A subnet that meets the limits, found by lessening the greatest excess.

        Raises:
            InfeasibilityError: when it cannot be lessened to nothing.
        """
        row = self._climber(limits).climb(row, closeness, enough=0.0)
        batch = SubnetBatch(self.index, row[None])
        if limits.worst(batch)[0] <= 0:
            return row
        subnet = self.index.encoding.subnet(row)
        raise InfeasibilityError(
            f"no subnet of {subnet.family!r} meets the limits. With the nearest, "
            f"{describe(self.index.encoding.space, subnet)}, {limits.miss(batch)}. Raise what is exceeded, or take a "
            "supernet with smaller subnets",
            nearest=subnet,
        )

    def _evolve_and_climb(self, limits: Limits, seed: int) -> np.ndarray:
        """Rows that meet the limits: both generations', and where climbing from the best of each ends."""
        starts = self._starts(limits, seed)
        rows = self._evolve(limits, starts, seed)
        first = starts[limits.worst(SubnetBatch(self.index, starts)) <= 0]
        ends = [self._climb_from_best(limits, generation) for generation in (first, rows)]
        return np.unique(np.concatenate([rows, *ends]), axis=0)

    def _evolve(self, limits: Limits, starts: np.ndarray, seed: int) -> np.ndarray:
        """Rows of the first and the last generation that meet the limits; at least one of the starts does."""

        def evaluate(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            batch = SubnetBatch(self.index, rows)
            return self._objectives(limits, batch), limits.excess(batch)

        rows = evolve(self.index.encoding, evaluate, starts, self.population, self.generations, seed)
        return rows[limits.worst(SubnetBatch(self.index, rows)) <= 0]

    def _climb_from_best(self, limits: Limits, rows: np.ndarray) -> np.ndarray:
        """Where climbing from each of the best subnets ends, of those that are alike the best one."""
        accuracy = self.predictor.predict(SubnetBatch(self.index, rows))
        left = rows[np.argsort(-accuracy, kind="stable")]
        climber, ends = self._climber(limits), list[np.ndarray]()
        while len(left) and len(ends) < _CLIMBS:
            ends.append(climber.climb(left[0], within))
            left = left[(left != left[0]).sum(axis=1) >= _APART]
        return np.unique(ends, axis=0)

    def _climber(self, limits: Limits) -> Climber:
        return Climber(self.index, self.predictor, limits)


def describe(space: SearchSpace, subnet: SubnetConfig) -> str:
    """A subnet in a few words, axis by axis."""
    parts = []
    for axis in space.axes:
        values = [value for value in space.values(subnet, axis.name) if value is not None]
        text = f"{values[0]:g}" if len(set(values)) == 1 else "[" + " ".join(f"{value:g}" for value in values) + "]"
        parts.append(f"{axis.name} {text}")
    return ", ".join(parts)


def _non_dominated(objectives: np.ndarray) -> np.ndarray:
    """Which rows no other row is at most equal to everywhere and less somewhere, bool `(num_rows,)`."""
    less = (objectives[:, None] <= objectives[None]).all(axis=2) & (objectives[:, None] < objectives[None]).any(axis=2)
    return np.asarray(~less.any(axis=0))
