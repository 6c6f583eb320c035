"""From operators timed alone to operators inside a network: a correction that is learned from a few whole subnets.

Alone, an operator finds its weights in the cache and its input in the layout it wants. In a network it does not, and
some of it is overlapped. Each operator's time becomes a sum of non-negative multiples of what it took alone, its
weights, the values that its layers read and write, its MACs, its number of layers and a constant; the multiples are
fitted to measured subnets, relative errors counting alike. The result is a latency table like any other, so
`latency.Latency` predicts with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedofa.device.layers import layers_of
from fedofa.device.operators import OperatorIndex, SubnetBatch
from fedofa.types.errors import ConfigError

_STEPS = 5000
_SHRINKAGE = 1e-3
"""Keeps multiples small that the subnets say little about, relative to the fit's own scale."""


@dataclass(frozen=True, slots=True)
class Fit:
    """How well predictions match measurements.

    Args:
        mape: mean absolute error, relative to the measured.
        rank_correlation: Spearman's.
    """

    mape: float
    rank_correlation: float

    @classmethod
    def of(cls, predicted: np.ndarray, measured: np.ndarray) -> Fit:
        """Compare two arrays `(num_subnets,)`.

        Raises:
            ConfigError: with fewer than two subnets, of which nothing can be ranked.
        """
        if len(measured) < 2:
            raise ConfigError(f"expected at least 2 subnets to compare, found {len(measured)}")
        mape = float(np.mean(np.abs(predicted - measured) / measured))
        return cls(mape, rank_correlation(predicted, measured))


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rank correlation, equal values at their mean rank; 0 where one of them does not vary."""
    ranks = [_ranks(values) for values in (first, second)]
    if any(np.ptp(row) == 0 for row in ranks):
        return 0.0
    return float(np.corrcoef(np.stack(ranks))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, member, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[member.ravel()]


def corrected_times(
    index: OperatorIndex, alone: np.ndarray, batch: SubnetBatch, measured: np.ndarray
) -> tuple[np.ndarray, float]:
    """Milliseconds of every operator inside a network, and the overhead of a forward pass.

    Args:
        index: of the space.
        alone: milliseconds of every operator by itself, `(num_operators,)`.
        batch: subnets that were measured.
        measured: their milliseconds, `(num_subnets,)`.
    """
    layers = [list(layers_of(operator)) for operator in index.operators]
    counted = [
        index.operator_table(lambda cost: cost.num_parameters),
        np.array([sum(layer.input_elements + layer.output_elements for layer in row) for row in layers]),
        index.operator_table(lambda cost: cost.macs),
        np.array([len(row) for row in layers]),
    ]
    columns = np.stack([alone, *counted, np.ones(len(alone))], axis=1).astype(np.float64)
    scale = columns.mean(axis=0)
    columns = columns / np.where(scale > 0, scale, 1.0)
    totals = np.stack([*(batch.total(column) for column in columns.T), np.ones(len(batch))], axis=1)
    multiples = _nonnegative_least_squares(totals / measured[:, None], np.ones(len(measured)))
    return columns @ multiples[:-1], float(multiples[-1])


def _nonnegative_least_squares(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The `x >= 0` that minimises `|matrix x - target|^2` plus a little of `|x|^2`, by coordinate descent."""
    norms = np.linalg.norm(matrix, axis=0)
    norms = np.where(norms > 0, norms, 1.0)
    scaled = matrix / norms
    gram = scaled.T @ scaled + _SHRINKAGE * np.eye(scaled.shape[1])
    aim, x = scaled.T @ target, np.zeros(scaled.shape[1])
    for _ in range(_STEPS):
        for column in range(len(x)):
            rest = aim[column] - gram[column] @ x + gram[column, column] * x[column]
            x[column] = max(rest / gram[column, column], 0.0)
    return x / norms
