"""Good subnets over the whole range of costs: found once for a space and a predictor, for devices yet unknown.

Nothing is known of the devices, so that they are made up: latency tables of every shape, each a random mixture of what
operators compute, move, hold and keep, every operator times a factor of its own, and limits from the smallest subnet's
cost to the largest one's. The archive is what `refine` makes of the best random subnet for each of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fedofa.device.operators import OperatorIndex, SubnetBatch
from fedofa.search.accuracy import AccuracyPredictor
from fedofa.search.fit import uniform_subnets
from fedofa.search.pricing import Pricing
from fedofa.search.refine import refine
from fedofa.types.errors import ConfigError

_RANDOM = 2000
"""Random subnets that searches for made-up devices begin with."""
_SPREAD = 0.4
"""Standard deviation of the logarithm of an operator's own factor."""
_WIDTHS = (2, 1, 1, 1)
"""Subnets that a made-up device keeps after each step of the refinement."""
_LEAST_DEVICES = 8


@dataclass(frozen=True)
class Archive:
    """Subnets of one space with their predicted accuracies, the best first.

    Args:
        index: of the space.
        rows: `(num_subnets, num_columns)`.
        accuracies: as predicted, `(num_subnets,)`, descending.
    """

    index: OperatorIndex
    rows: np.ndarray
    accuracies: np.ndarray

    @cached_property
    def batch(self) -> SubnetBatch:
        """The subnets as cost models take them."""
        return SubnetBatch(self.index, self.rows)

    @cached_property
    def counts(self) -> np.ndarray:
        """How often each subnet has each operator, float32 `(num_subnets, num_operators)`."""
        return self.batch.counts()

    def differing(self, chosen: np.ndarray) -> np.ndarray:
        """In how many columns every subnet differs from each of some, float32 `(num_subnets, num_chosen)`.

        A column that only one of two subnets has counts as well.

        Args:
            chosen: positions in the archive.
        """
        equal = self._present @ self._present[chosen].T
        return self.rows.shape[1] - equal

    @cached_property
    def _present(self) -> np.ndarray:
        """Each column's value, or that the subnet has none, as an indicator, `(num_subnets, num_indicators)`."""
        encoding = self.index.encoding
        return np.concatenate([encoding.one_hot(self.rows), (self.rows < 0).astype(np.float32)], axis=1)

    def __len__(self) -> int:
        return len(self.rows)


def build_archive(
    index: OperatorIndex, predictor: AccuracyPredictor, num_devices: int = 2000, seed: int = 0
) -> Archive:
    """The archive of a space.

    Args:
        index: of the space.
        predictor: of accuracy.
        num_devices: made-up devices, each of which adds at most one subnet.
        seed: of the devices and of the random subnets.

    Raises:
        ConfigError: for fewer than 8 devices.
    """
    if num_devices < _LEAST_DEVICES:
        raise ConfigError(f"archive: expected at least {_LEAST_DEVICES} made-up devices, found {num_devices}")
    rng = np.random.default_rng(seed)
    encoding = index.encoding
    uniform = encoding.rows(list(uniform_subnets(encoding.space)))
    starts = np.unique(np.concatenate([uniform, encoding.sample(rng, _RANDOM)]), axis=0)
    tables = _tables(index, num_devices, rng)
    batch = SubnetBatch(index, starts)
    costs = batch.counts() @ tables[:, :-1].T.astype(np.float32)
    share = np.linspace(0.0, 1.0, num_devices)
    limits = costs.min(axis=0) ** (1 - share) * costs.max(axis=0) ** share * (1 + 1e-5)
    accuracies = predictor.predict(batch)
    first = np.where(costs <= limits, accuracies[:, None], -np.inf).argmax(axis=0)

    pricing = Pricing(
        features=lambda near: np.zeros((len(near), 0)),
        factors=np.zeros((num_devices, 1, 0)),
        offsets=np.full((num_devices, 1), -1.0),
        tables=tables / limits[:, None],
        timed=0,
    )
    found, _ = refine(index, predictor, starts[first], np.arange(num_devices), pricing, _WIDTHS)
    rows = np.unique(np.concatenate([starts, found]), axis=0)
    accuracies = predictor.predict(SubnetBatch(index, rows))
    order = np.argsort(-accuracies, kind="stable")
    return Archive(index, rows[order], accuracies[order])


def _tables(index: OperatorIndex, num_devices: int, rng: np.random.Generator) -> np.ndarray:
    """Made-up costs of operators, `(num_devices, num_operators + 1)`, the last one of no operator."""
    operators = index.operators
    kinds = [
        index.operator_table(lambda cost: cost.macs),
        index.operator_table(lambda cost: cost.num_parameters),
        np.array([operator.input_elements + operator.output_elements for operator in operators]),
        np.array([operator.saved_elements for operator in operators]),
        np.ones(len(operators)),
    ]
    scaled = np.stack([kind / kind.mean() for kind in kinds])
    mixed = rng.dirichlet(np.full(len(kinds), 0.4), num_devices) @ scaled
    mixed *= np.exp(rng.normal(0.0, _SPREAD, mixed.shape))
    return np.concatenate([mixed, np.zeros((num_devices, 1))], axis=1)
