"""The optimiser of central training, and its moments as checkpoints hold them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from fedofa.shrinking.recipe import CentralTraining
from fedofa.types.errors import CheckpointError, DivergenceError

_BETA2 = 0.99
"""AdamW's mean of squares looks back on about 100 steps, so that a few hundred steps are not all warm-up."""
_MOMENTS = {
    "sgd": {"momentum": "momentum_buffer"},
    "adamw": {"momentum": "exp_avg", "second": "exp_avg_sq", "steps": "step"},
}
"""By optimiser: a moment's name in checkpoints, where the server's optimisers have the same, and torch's."""
_KINDS = ("momentum", "second", "steps")


class CentralOptimiser:
    """SGD or AdamW; a parameter without a gradient keeps its value and its moments.

    Args:
        parameters: by name; tensors named `matrix_*` are kernel matrices.
        training: the recipe.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], training: CentralTraining) -> None:
        self._parameters = parameters
        self._max_norm = training.max_gradient_norm
        self._names = _MOMENTS[training.optimiser]
        self._optimiser = _build(parameters, training)

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self._optimiser.zero_grad(set_to_none=True)

    def step(self, rate: float) -> None:
        """Scale the gradients down where they are larger than the recipe allows, and take a step.

        Raises:
            DivergenceError: when a gradient is not finite; nothing has changed then.
        """
        held = [item for item in self._parameters.values() if item.grad is not None]
        norm = nn.utils.get_total_norm([item.grad for item in held if item.grad is not None])
        if not torch.isfinite(norm):
            raise DivergenceError("gradients are not finite")
        if self._max_norm:
            nn.utils.clip_grads_with_norm_(held, self._max_norm, norm)
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._optimiser.step()

    def moments(self) -> dict[str, dict[str, np.ndarray]]:
        """A copy of what the next step depends on: moment -> parameter -> array."""
        found: dict[str, dict[str, np.ndarray]] = {kind: {} for kind in self._names}
        for name, parameter in self._parameters.items():
            state = self._optimiser.state.get(parameter, {})
            for kind, theirs in self._names.items():
                if state.get(theirs) is not None:
                    found[kind][name] = state[theirs].detach().cpu().numpy().copy()
        return found

    def check(self, moments: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Raise a CheckpointError unless the moments are of these parameters and of this optimiser."""
        found = {kind: set(moments[kind]) for kind in _KINDS if moments.get(kind)}
        if found and (set(found) != set(self._names) or len({frozenset(names) for names in found.values()}) > 1):
            raise CheckpointError(
                f"the checkpoint's moments ({', '.join(found)}) are not those of this training "
                f"({', '.join(self._names)}); resume with the shrinking.optimiser that it was made with"
            )
        for kind in self._names:
            self._check_shapes(kind, moments.get(kind, {}))

    def restore(self, moments: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Go on with the moments that `moments` gave and `check` has passed."""
        self._optimiser.state.clear()
        for kind, theirs in self._names.items():
            for name, value in moments.get(kind, {}).items():
                parameter = self._parameters[name]
                device = parameter.device
                self._optimiser.state[parameter][theirs] = torch.from_numpy(value.copy()).to(device)

    def _check_shapes(self, kind: str, moment: Mapping[str, np.ndarray]) -> None:
        shapes = {name: () if kind == "steps" else tuple(item.shape) for name, item in self._parameters.items()}
        wrong = [name for name, value in moment.items() if shapes.get(name) != value.shape]
        if wrong:
            expected = shapes.get(wrong[0], "none, since this training has no such parameter, or freezes it")
            raise CheckpointError(
                f"the checkpoint's {kind} of {len(wrong)} parameters is not of this training; of {wrong[0]!r}: found "
                f"{moment[wrong[0]].shape}, expected {expected}; resume with the supernet and the shrinking.frozen "
                "that it was made with"
            )


def _build(parameters: Mapping[str, nn.Parameter], training: CentralTraining) -> torch.optim.Optimizer:
    def decays(name: str, item: Tensor) -> bool:
        return item.dim() > 1 and ".matrix_" not in name

    decaying = [item for name, item in parameters.items() if decays(name, item)]
    others = [item for name, item in parameters.items() if not decays(name, item)]
    groups = [{"params": decaying, "weight_decay": training.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if training.optimiser == "adamw":
        return torch.optim.AdamW(groups, training.learning_rate, betas=(training.momentum, _BETA2), fused=True)
    return torch.optim.SGD(groups, training.learning_rate, training.momentum, nesterov=True)
