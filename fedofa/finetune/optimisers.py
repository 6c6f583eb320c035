"""The clients' optimisers: SGD in place, without torch.optim, and torch's AdamW.

The first optimiser of torch.optim imports torch's compiler: 72 MB that a board which trains with SGD does not pay.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn


class Optimiser(ABC):
    """Takes steps along the gradients that the parameters hold.

    Args:
        parameters: what trains.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)

    @final
    def drop_gradients(self) -> None:
        """Let the memory of all gradients go."""
        for parameter in self._parameters:
            parameter.grad = None

    def begin(self) -> None:
        """Make ready for the gradients of the next batch."""
        self.drop_gradients()

    @abstractmethod
    def step(self) -> None:
        """Change every parameter that has a gradient."""


@final
class Sgd(Optimiser):
    """Stochastic gradient descent with momentum and L2 decay, as a fused `torch.optim.SGD` takes it, to the bit.

    Args:
        parameters: what trains; one momentum value a parameter is kept, none without momentum.
        learning_rate, momentum, weight_decay: of every step.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], learning_rate: float, momentum: float, weight_decay: float
    ) -> None:
        super().__init__(parameters)
        self._learning_rate, self._momentum, self._weight_decay = learning_rate, momentum, weight_decay
        self._velocities: dict[Tensor, Tensor] = {}

    def step(self) -> None:
        fresh = [parameter for parameter in self._parameters if parameter not in self._velocities]
        self._step([parameter for parameter in self._parameters if parameter in self._velocities], first=False)
        self._step(fresh, first=True)

    def step_one(self, parameter: Tensor) -> None:
        """Change one parameter, and drop its gradient."""
        self._step([parameter], first=parameter not in self._velocities)
        parameter.grad = None

    @torch.no_grad()
    def _step(self, parameters: Sequence[Tensor], *, first: bool) -> None:
        """Change those that have a gradient; `first`: they have no velocity yet."""
        parameters = [parameter for parameter in parameters if parameter.grad is not None]
        if not parameters:
            return
        if first and self._momentum:
            self._velocities.update((parameter, torch.empty_like(parameter)) for parameter in parameters)
        torch.ops.aten._fused_sgd_(
            parameters,
            [parameter.grad for parameter in parameters],
            [self._velocities[parameter] for parameter in parameters] if self._momentum else [],
            weight_decay=self._weight_decay,
            momentum=self._momentum,
            lr=self._learning_rate,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=first,
        )


@final
class SummingSgd(Optimiser):
    """The steps of `Sgd`, to rounding, with one value a parameter for gradient and momentum together.

    What is left of the momentum is what the next batch's gradients are added to, micro-batch after micro-batch. So no
    gradient is there by itself, to be clipped or looked at.

    Args:
        parameters, learning_rate, momentum, weight_decay: as for `Sgd`.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], learning_rate: float, momentum: float, weight_decay: float
    ) -> None:
        super().__init__(parameters)
        self._learning_rate, self._momentum, self._weight_decay = learning_rate, momentum, weight_decay

    def begin(self) -> None:
        if not self._momentum:
            self.drop_gradients()
            return
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(self._momentum)

    @torch.no_grad()
    def step(self) -> None:
        for parameter in self._parameters:
            if parameter.grad is None:
                continue
            if self._weight_decay:
                parameter.grad.add_(parameter, alpha=self._weight_decay)
            parameter.add_(parameter.grad, alpha=-self._learning_rate)


@final
class AdamW(Optimiser):
    """Torch's own (arXiv 1711.05101)."""

    def __init__(self, parameters: Sequence[nn.Parameter], learning_rate: float, weight_decay: float) -> None:
        super().__init__(parameters)
        self._optimiser = torch.optim.AdamW(parameters, learning_rate, weight_decay=weight_decay, fused=True)

    def step(self) -> None:
        self._optimiser.step()
