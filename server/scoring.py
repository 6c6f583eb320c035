"""The server's own measurements: subnets cut from the shared weights, calibrated, scored on the global test set."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn

from fedofa.data.federation import Examples
from fedofa.evaluation.calibration import CALIBRATION_BATCH, apply_sums, calibrate
from fedofa.evaluation.metrics import Score, evaluate
from fedofa.finetune.inputs import Pixels, stored_inputs
from fedofa.finetune.probing import measure_contributions
from fedofa.finetune.recipe import batch_bounds
from fedofa.finetune.sparse import Contributions
from fedofa.supernet.base import Supernet
from fedofa.types.errors import ConfigError
from fedofa.types.space import SubnetConfig
from fedofa.types.state import SharedState
from fedofa.types.statistics import StatisticSums

_PROBE_EXAMPLES = 256
"""Examples, at most, on which contributions of layers are measured."""

SumsOf = Mapping[SubnetConfig, StatisticSums]
"""The clients' statistics, by subnet."""


class Scorer:
    """Scores and calibrates subnets with the examples that the server holds.

    Args:
        supernet: for the structure.
        test: the global test set.
        calibration: the server's calibration set; may be empty where no subnet has batch norm, or others calibrate.
        normalisation: per-channel "mean" and "std" of pixels in [0, 1].
        by: whose images give batch norms' statistics. "server": those of `calibration`; "clients": theirs, as sums that
            every call is given (see `server.calibration`); "none": statistics stay those that the supernet came with.
    """

    def __init__(
        self,
        supernet: Supernet,
        test: Examples,
        calibration: Examples,
        normalisation: Mapping[str, list[float]],
        *,
        by: str = "server",
    ) -> None:
        self.supernet = supernet
        self.test = test
        self.calibration = calibration
        self.normalisation = normalisation
        statistics = [item for item in supernet.slice_map(supernet.space.largest()) if item.role == "statistic"]
        self.calibrates = bool(statistics) and by != "none"
        self.by_clients = self.calibrates and by == "clients"
        if self.calibrates and not self.by_clients and len(calibration.labels) < 2:
            raise ConfigError(
                "data.calibration_examples: expected at least 2 for a supernet with batch norm, found "
                f"{len(calibration.labels)}; a subnet's statistics must be calibrated before it is evaluated (about "
                "500 to 2,000 examples), here or on the clients (evaluation.calibration=clients)"
            )

    def score(
        self, state: SharedState, subnets: Mapping[str, SubnetConfig], sums: SumsOf | None = None
    ) -> dict[str, Score]:
        """Score named subnets of a state, calibrated; equal subnets are scored once."""
        return self._score(subnets, lambda subnet: self.build(state, subnet, sums))

    def score_uncalibrated(self, state: SharedState, subnets: Mapping[str, SubnetConfig]) -> dict[str, Score]:
        """The same with the statistics that the state holds: what a subnet without calibration would reach."""
        return self._score(subnets, lambda subnet: self._cut(state, subnet))

    def _score(
        self, subnets: Mapping[str, SubnetConfig], module_of: Callable[[SubnetConfig], nn.Module]
    ) -> dict[str, Score]:
        by_subnet: dict[SubnetConfig, Score] = {}
        for subnet in subnets.values():
            if subnet not in by_subnet:
                inputs = self._inputs(self.test, subnet)
                by_subnet[subnet] = evaluate(module_of(subnet), inputs, torch.from_numpy(self.test.labels))
        return {name: by_subnet[subnet] for name, subnet in subnets.items()}

    def build(self, state: SharedState, subnet: SubnetConfig, sums: SumsOf | None = None) -> nn.Module:
        """The subnet as an ordinary module, its batch-norm statistics calibrated.

        Args:
            sums: the clients' statistics, by subnet; needed where clients calibrate.
        """
        module = self._cut(state, subnet)
        if self.by_clients:
            apply_sums(module, (sums or {})[subnet])
        elif self.calibrates:
            self._calibrate(module, subnet)
        return module

    def _calibrate(self, module: nn.Module, subnet: SubnetConfig) -> None:
        """With the examples that the server holds."""
        inputs = self._inputs(self.calibration, subnet)
        bounds = batch_bounds(len(self.calibration.labels), CALIBRATION_BATCH)
        calibrate(module, (inputs[start:end] for start, end in bounds))

    def _cut(self, state: SharedState, subnet: SubnetConfig) -> nn.Module:
        return self.supernet.build(subnet, state.tensors)

    def calibrated_tensors(
        self, state: SharedState, subnet: SubnetConfig, sums: SumsOf | None = None
    ) -> dict[str, np.ndarray]:
        """The subnet's tensors with calibrated statistics: what clients need that train with frozen ones."""
        tensors = self.build(state, subnet, sums).state_dict()
        return {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in tensors.items()}

    def loss_on_own(self, state: SharedState, subnet: SubnetConfig) -> float:
        """Mean cross-entropy of the subnet on the server's calibration examples, calibrated with them."""
        module = self._cut(state, subnet)
        if self.calibrates:
            self._calibrate(module, subnet)
        return evaluate(module, self._inputs(self.calibration, subnet), torch.from_numpy(self.calibration.labels)).loss

    def contributions(self, state: SharedState) -> Contributions:
        """What the layers of the largest subnet contribute, measured on some of the server's calibration examples.

        Raises:
            ConfigError: where the server holds none.
        """
        if not len(self.calibration.labels):
            raise ConfigError(
                "data.calibration_examples: layers of a sparse plan are chosen by gradients on images that the server "
                "holds: expected at least 1, found 0; set it to 100 to 500"
            )
        subnet = self.supernet.space.largest()
        module = self._cut(state, subnet)
        if self.calibrates:
            self._calibrate(module, subnet)
        some = slice(None, None, -(-len(self.calibration.labels) // _PROBE_EXAMPLES))
        examples = Examples(self.calibration.images[some], self.calibration.labels[some])
        inputs, labels = self._inputs(examples, subnet)[:], torch.from_numpy(examples.labels)
        return measure_contributions(module, self.supernet.block_costs(subnet), inputs, labels)

    def input_shape(self, subnet: SubnetConfig) -> tuple[int, ...]:
        """Shape of one example as the subnet takes it, `(1, channels, height, width)`."""
        return tuple(self._inputs(Examples(self.test.images[:1], self.test.labels[:1]), subnet)[:].shape)

    def _inputs(self, examples: Examples, subnet: SubnetConfig) -> Pixels:
        mean, std = self.normalisation["mean"], self.normalisation["std"]
        return stored_inputs(np.ascontiguousarray(examples.images), mean, std, self.supernet.resolution(subnet))
