"""NSGA-II (Deb et al. 2002) over the encoding: pymoo's, with a generation evaluated at once.

pymoo is imported where it runs: only searches need it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fedofa.types.encoding import Encoding

_MUTATED_COLUMNS = 2.0
"""Columns that a mutation draws anew, on average."""

Evaluate = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Normalised rows -> objectives, which are minimised, and excesses over limits, `(num_subnets, ...)` each."""


def evolve(
    encoding: Encoding, evaluate: Evaluate, starts: np.ndarray, population: int, generations: int, seed: int
) -> np.ndarray:
    """The rows of the first and the last generation, without repeats.

    Args:
        encoding: of the space.
        evaluate: prices rows.
        starts: the first generation.
        population, generations: sizes.
        seed: of crossover and mutation.
    """
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.operators.crossover.ux import UniformCrossover
    from pymoo.optimize import minimize

    operators: dict[str, Any] = {
        "sampling": np.maximum(starts, 0),
        "crossover": UniformCrossover(),
        "mutation": _redraw(encoding.choices),
        "eliminate_duplicates": _distinct(encoding),
    }
    problem = _problem(encoding, evaluate, starts)
    result: Any = minimize(problem, NSGA2(population, **operators), ("n_gen", generations), seed=seed)
    last = encoding.normalised(np.asarray(result.pop.get("X"), np.int16))
    return np.unique(np.concatenate([starts, last]), axis=0)


def _problem(encoding: Encoding, evaluate: Evaluate, starts: np.ndarray) -> Any:
    """The search as pymoo states it."""
    from pymoo.core.problem import Problem

    num_objectives, num_limits = (array.shape[1] for array in evaluate(starts[:1]))

    class Specialisation(Problem):
        def __init__(self) -> None:
            bounds = {"xl": np.zeros(encoding.num_columns), "xu": encoding.choices - 1.0}
            super().__init__(
                n_var=encoding.num_columns, n_obj=num_objectives, n_ieq_constr=num_limits, vtype=int, **bounds
            )

        def _evaluate(self, x: np.ndarray, out: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            out["F"], excess = evaluate(encoding.normalised(x.astype(np.int16)))
            if num_limits:
                out["G"] = excess

    return Specialisation()


def _redraw(choices: np.ndarray) -> Any:
    """A mutation that draws some columns anew."""
    from pymoo.core.mutation import Mutation

    class Redraw(Mutation):
        def _do(self, problem: Any, X: np.ndarray, *args: Any, random_state: Any = None, **kwargs: Any) -> np.ndarray:
            redrawn = random_state.random(X.shape) < _MUTATED_COLUMNS / X.shape[1]
            return np.where(redrawn, random_state.integers(choices, size=X.shape), X)

    return Redraw()


def _distinct(encoding: Encoding) -> Any:
    """Keeps equal subnets out of a generation, by their rows' bytes."""
    from pymoo.core.duplicate import DuplicateElimination

    class DistinctRows(DuplicateElimination):
        def _do(self, pop: Any, other: Any, is_duplicate: np.ndarray) -> np.ndarray:
            known = set() if other is None else set(_keys(other))
            for number, key in enumerate(_keys(pop)):
                is_duplicate[number] = key in known
                if other is None:
                    known.add(key)
            return is_duplicate

    def _keys(population: Any) -> list[bytes]:
        rows = encoding.normalised(np.asarray(population.get("X"), np.int16))
        return [row.tobytes() for row in rows]

    return DistinctRows()
