"""The clients' optimisers in numpy, for the engine without torch: the steps of `optimisers`, to float rounding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import final

import numpy as np

from fedofa.finetune.recipe import LocalTraining

Arrays = Mapping[str, np.ndarray]

_BETAS, _EPSILON = (0.9, 0.999), 1e-8
_NORM_GUARD = 1e-6
"""Added to the gradients' norm before it divides, as torch does."""


class NumpyOptimiser(ABC):
    """Changes parameters in place along their gradients, which it may overwrite."""

    @abstractmethod
    def step(self, parameters: Arrays, gradients: Arrays) -> None:
        """Take a step."""


@final
class NumpySgd(NumpyOptimiser):
    """Gradient descent with momentum and L2 decay."""

    def __init__(self, training: LocalTraining) -> None:
        self._training = training
        self._velocities: dict[str, np.ndarray] = {}

    def step(self, parameters: Arrays, gradients: Arrays) -> None:
        recipe = self._training
        for name, parameter in parameters.items():
            gradient = gradients[name]
            if recipe.weight_decay:
                gradient += recipe.weight_decay * parameter
            if recipe.momentum and name in self._velocities:
                self._velocities[name] *= recipe.momentum
                self._velocities[name] += gradient
                gradient = self._velocities[name]
            elif recipe.momentum:
                self._velocities[name] = gradient.copy()
            np.subtract(parameter, recipe.learning_rate * gradient, out=parameter)


@final
class NumpyAdamW(NumpyOptimiser):
    """Adam with decoupled decay (arXiv 1711.05101), with torch's defaults."""

    def __init__(self, training: LocalTraining) -> None:
        self._training = training
        self._moments: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._steps = 0

    def step(self, parameters: Arrays, gradients: Arrays) -> None:
        recipe = self._training
        self._steps += 1
        corrections = [1 - beta**self._steps for beta in _BETAS]
        for name, parameter in parameters.items():
            gradient = gradients[name]
            if name not in self._moments:
                self._moments[name] = (np.zeros_like(parameter), np.zeros_like(parameter))
            first, second = self._moments[name]
            first += (1 - _BETAS[0]) * (gradient - first)
            second += (1 - _BETAS[1]) * (gradient * gradient - second)
            kept = parameter * (1 - recipe.learning_rate * recipe.weight_decay)
            spread = np.sqrt(second / corrections[1]) + _EPSILON
            np.subtract(kept, recipe.learning_rate / corrections[0] * (first / spread), out=parameter)


def build_numpy_optimiser(training: LocalTraining) -> NumpyOptimiser:
    """The recipe's optimiser."""
    return NumpyAdamW(training) if training.optimiser == "adamw" else NumpySgd(training)


def clip_gradients(gradients: Arrays, max_norm: float) -> None:
    """Scale gradients down in place where the L2 norm of all together is above `max_norm`."""
    norm = np.sqrt(sum(float(np.square(gradient).sum()) for gradient in gradients.values()))
    factor = max_norm / (norm + _NORM_GUARD)
    if factor < 1:
        for gradient in gradients.values():
            np.multiply(gradient, np.float32(factor), out=gradient)
