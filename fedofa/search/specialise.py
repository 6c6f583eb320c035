"""The best subnet for a device, or all best trade-offs: NSGA-II over the encoding, then climbing to a local optimum.

Everything is evaluated in batches: a generation, or a neighbourhood, is one table look-up and one pass of the
predictor. NSGA-II (Deb et al. 2002) is pymoo's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedofa.device.models import Quantity, SubnetCostModel
from fedofa.device.operators import OperatorIndex, SubnetBatch
from fedofa.search.accuracy import AccuracyPredictor
from fedofa.search.fit import uniform_subnets
from fedofa.search.limits import Limits
from fedofa.types.errors import ConfigError, InfeasibilityError
from fedofa.types.space import SearchSpace, SubnetConfig

_MUTATED_COLUMNS = 2.0
"""Columns that a mutation draws anew, on average."""
_CLIMBS, _APART = 8, 4
"""Subnets that climbing starts from, and columns in which they differ at the least."""
_MOST_STEPS = 60
_MOST_PAIRS = 6000
"""Pairs of changes that a step of climbing tries at the most."""


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
        rows = self._climb_from_best(limits, self._evolve(limits, self._starts(limits, seed), seed), seed)
        return max(self._found(rows), key=lambda found: found.accuracy)

    def pareto(self, limits: Limits, seed: int = 0) -> list[Found]:
        """The subnets within the limits of which none is better in accuracy and in every limited cost, best first.

        Raises:
            InfeasibilityError: as `best`.
        """
        rows = self._evolve(limits, self._starts(limits, seed), seed)
        rows = np.unique(np.concatenate([rows, self._climb_from_best(limits, rows, seed)]), axis=0)
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
            row = self._nearest(limits, rows[int(np.argmin(worst))], seed)
            rows, worst = np.concatenate([row[None], rows]), np.concatenate([[0.0], worst])
            batch = SubnetBatch(self.index, rows)
        rank = np.lexsort((-self.predictor.predict(batch), np.maximum(worst, 0)))
        return rows[rank[: self.population]]

    def _nearest(self, limits: Limits, row: np.ndarray, seed: int) -> np.ndarray:
        """A subnet that meets the limits, found by lessening the greatest excess.

        Raises:
            InfeasibilityError: when it cannot be lessened to nothing.
        """
        rng = np.random.default_rng(seed)
        for _ in range(_MOST_STEPS):
            near = np.concatenate([row[None], self._neighbours(row, rng)])
            worst = limits.worst(SubnetBatch(self.index, near))
            best = int(np.argmin(worst))
            if worst[best] <= 0:
                return near[best]
            if best == 0:
                break
            row = near[best]
        subnet = self.index.encoding.subnet(row)
        miss = limits.miss(SubnetBatch(self.index, row[None]))
        raise InfeasibilityError(
            f"no subnet of {subnet.family!r} meets the limits. With the nearest, "
            f"{describe(self.index.encoding.space, subnet)}, {miss}",
            nearest=subnet,
        )

    # -- evolution ---------------------------------------------------------------------------------------------------

    def _evolve(self, limits: Limits, starts: np.ndarray, seed: int) -> np.ndarray:
        """Rows of the last generation's subnets that meet the limits; at least one of the starts does."""
        from pymoo.algorithms.moo.nsga2 import NSGA2
        from pymoo.operators.crossover.ux import UniformCrossover
        from pymoo.optimize import minimize

        encoding = self.index.encoding
        operators: dict[str, Any] = {
            "sampling": np.maximum(starts, 0),
            "crossover": UniformCrossover(),
            "mutation": _redraw(encoding.choices),
        }
        algorithm = NSGA2(self.population, **operators)
        result: Any = minimize(_problem(self, limits), algorithm, ("n_gen", self.generations), seed=seed)
        rows = encoding.normalised(np.concatenate([np.maximum(starts, 0), result.pop.get("X")]).astype(np.int16))
        rows = np.unique(rows, axis=0)
        return rows[limits.worst(SubnetBatch(self.index, rows)) <= 0]

    # -- climbing ----------------------------------------------------------------------------------------------------

    def _climb_from_best(self, limits: Limits, rows: np.ndarray, seed: int) -> np.ndarray:
        """Where climbing from each of the best subnets ends, of those that are alike the best one."""
        accuracy = self.predictor.predict(SubnetBatch(self.index, rows))
        left = rows[np.argsort(-accuracy, kind="stable")]
        ends: list[np.ndarray] = []
        while len(left) and len(ends) < _CLIMBS:
            ends.append(self._climb(limits, left[0], seed))
            left = left[(left != left[0]).sum(axis=1) >= _APART]
        return np.unique(ends, axis=0)

    def _climb(self, limits: Limits, row: np.ndarray, seed: int) -> np.ndarray:
        """Take the best subnet within the limits that differs in one or two columns, until none is better."""
        rng = np.random.default_rng(seed)
        accuracy = float(self.predictor.predict(SubnetBatch(self.index, row[None]))[0])
        for _ in range(_MOST_STEPS):
            near = self._neighbours(row, rng)
            near = near[limits.worst(SubnetBatch(self.index, near)) <= 0]
            if not len(near):
                break
            found = self.predictor.predict(SubnetBatch(self.index, near))
            best = int(np.argmax(found))
            if not found[best] > accuracy:
                break
            row, accuracy = near[best], float(found[best])
        return row

    def _neighbours(self, row: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Rows that differ in one column, and in two; of many pairs a random part."""
        encoding = self.index.encoding
        columns = np.repeat(np.arange(encoding.num_columns), encoding.choices)
        values = np.concatenate([np.arange(number) for number in encoding.choices])
        keep = (row[columns] >= 0) & (row[columns] != values)
        columns, values = columns[keep], values[keep]
        single = np.repeat(row[None], len(columns), axis=0)
        single[np.arange(len(columns)), columns] = values
        first, second = np.triu_indices(len(columns), 1)
        apart = columns[first] != columns[second]
        first, second = first[apart], second[apart]
        if len(first) > _MOST_PAIRS:
            chosen = rng.choice(len(first), _MOST_PAIRS, replace=False)
            first, second = first[chosen], second[chosen]
        pairs = single[first]
        pairs[np.arange(len(second)), columns[second]] = values[second]
        return encoding.normalised(np.concatenate([single, pairs]))


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


def _problem(search: DeviceSearch, limits: Limits) -> Any:
    """The search as pymoo states it."""
    from pymoo.core.problem import Problem

    encoding = search.index.encoding

    class Specialisation(Problem):
        def __init__(self) -> None:
            objectives = 1 + max(len(limits.limits), 1)
            bounds = {"xl": np.zeros(encoding.num_columns), "xu": encoding.choices - 1.0}
            super().__init__(
                n_var=encoding.num_columns, n_obj=objectives, n_ieq_constr=len(limits.limits), vtype=int, **bounds
            )

        def _evaluate(self, x: np.ndarray, out: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            batch = SubnetBatch(search.index, encoding.normalised(x.astype(np.int16)))
            out["F"] = search._objectives(limits, batch)
            if limits.limits:
                out["G"] = limits.excess(batch)

    return Specialisation()


def _redraw(choices: np.ndarray) -> Any:
    """A mutation that draws some columns anew."""
    from pymoo.core.mutation import Mutation

    class Redraw(Mutation):
        def _do(self, problem: Any, X: np.ndarray, *args: Any, random_state: Any = None, **kwargs: Any) -> np.ndarray:
            redrawn = random_state.random(X.shape) < _MUTATED_COLUMNS / X.shape[1]
            return np.where(redrawn, random_state.integers(choices, size=X.shape), X)

    return Redraw()
