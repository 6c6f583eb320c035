"""Local fine-tuning of one subnet on one client's examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import UnionType

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedofa.finetune.engine import planned
from fedofa.finetune.optimisers import AdamW, Optimiser, Sgd
from fedofa.types.errors import ConfigError, DatasetError
from fedofa.types.plan import FineTunePlan

OPTIMISERS = ("sgd", "adamw")

Objective = Callable[[Tensor, Tensor], Tensor]
"""From a batch's logits `(batch, num_classes)` and the indices of its examples `(batch,)` to the loss."""
_ROUNDING = 1
"""Tells the draws that round compressed activations from those of the batches' order, by the seed."""


@dataclass(frozen=True, slots=True)
class LocalTraining:
    """How a client trains in one round; the same for the whole fleet.

    Args:
        optimiser: "sgd" or "adamw".
        learning_rate, momentum, weight_decay: of the optimiser (momentum for SGD only).
        epochs: passes over the client's examples, used where `max_steps` is 0.
        max_steps: optimiser steps instead of epochs; 0 for epochs.
        batch_size: examples a step.
        label_smoothing: share of the target spread over all classes.
        proximal_mu: FedProx term mu/2 |w - received|^2 (arXiv 1812.06127, equation 2).
        max_gradient_norm: gradients are scaled down to this L2 norm; 0 leaves them as they are.
        max_shift: random augmentation: each image of a batch is moved by up to so many pixels along both sides.
    """

    optimiser: str = "sgd"
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 0.0
    epochs: int = 1
    max_steps: int = 0
    batch_size: int = 16
    label_smoothing: float = 0.0
    proximal_mu: float = 0.0
    max_gradient_norm: float = 0.0
    max_shift: int = 0

    def __post_init__(self) -> None:
        if self.optimiser not in OPTIMISERS:
            raise ConfigError(f"finetune.optimiser: expected one of {list(OPTIMISERS)}, found {self.optimiser!r}")
        for name in ("learning_rate", "weight_decay", "proximal_mu", "max_gradient_norm"):
            self._expect(name, "a finite number of at least 0", lambda value: 0 <= value < math.inf)
        for name, least in (("epochs", 1), ("max_steps", 0), ("batch_size", 1), ("max_shift", 0)):
            self._expect(name, f"a whole number of at least {least}", lambda value, least=least: value >= least, int)
        for name in ("momentum", "label_smoothing"):
            self._expect(name, "a number in [0, 1)", lambda value: 0 <= value < 1)

    def _expect(
        self, name: str, wanted: str, accepts: Callable[[float], bool], kind: type | UnionType = int | float
    ) -> None:
        value = getattr(self, name)
        if not isinstance(value, kind) or isinstance(value, bool) or not accepts(value):
            raise ConfigError(f"finetune.{name}: expected {wanted}, found {value!r}")

    def num_steps(self, num_examples: int) -> int:
        """Optimiser steps on that many examples."""
        return self.max_steps or self.epochs * len(list(batch_bounds(num_examples, self.batch_size)))


@dataclass(frozen=True, slots=True)
class FineTuneResult:
    """Trained minus received for every trainable parameter (float32, by name), steps taken and the mean loss."""

    weights: dict[str, np.ndarray]
    num_steps: int
    loss: float


def fine_tune(
    model: nn.Module,
    plan: FineTunePlan,
    received: Mapping[str, np.ndarray],
    inputs: Tensor,
    labels: Tensor,
    training: LocalTraining,
    generator: torch.Generator,
    objective: Objective | None = None,
) -> FineTuneResult:
    """Train the model in place as the plan says.

    Args:
        model: the subnet, holding the received weights.
        plan: what trains and how.
        received: the weights as they came, by name; the delta is taken against them.
        inputs: `(num_examples, channels, height, width)`, normalised and at the subnet's resolution.
        labels: `(num_examples,)`, int64.
        training: the recipe.
        generator: draws the batches' order; another one of the same seed draws the rounding of compressed activations.
            Dropout draws from torch's default generator, which the caller seeds.
        objective: what is minimised, a mean over examples; by default the cross-entropy of `label_objective`.
    """
    if not len(labels):
        raise DatasetError("fine-tuning needs at least 1 training example, found none; the client cannot take part")
    _check_levers(plan, training)
    objective = objective or label_objective(labels, training.label_smoothing)
    parameters, losses = run_steps(model, plan, inputs, training, generator, objective)
    weights = {
        name: parameter.detach().cpu().numpy() - received[name]
        for name, parameter in zip(plan.trainable, parameters, strict=True)
    }
    return FineTuneResult(weights, len(losses), float(torch.stack(losses).mean()))


def run_steps(
    model: nn.Module,
    plan: FineTunePlan,
    inputs: Tensor,
    training: LocalTraining,
    generator: torch.Generator,
    objective: Objective,
) -> tuple[list[nn.Parameter], list[Tensor]]:
    """The steps of `fine_tune`, on any device: what trained, in the plan's order, and the loss of every batch."""
    losses = []
    rounding = torch.Generator().manual_seed(generator.initial_seed() ^ _ROUNDING)
    with planned(model, plan, rounding) as parameters:
        optimiser = _build_optimiser(parameters, training)
        anchors = [parameter.detach().clone() for parameter in parameters] if training.proximal_mu else []
        with _stepping_in_backward(parameters, optimiser, plan):
            for batch in _batches(len(inputs), training, generator):
                for parameter in parameters:
                    parameter.grad = None
                images = channels_innermost(shifted(inputs[batch], training.max_shift, generator))
                losses.append(_backward(model, images, batch, plan, objective))
                _add_proximal_gradient(parameters, anchors, training.proximal_mu)
                if training.max_gradient_norm:
                    nn.utils.clip_grad_norm_(parameters, training.max_gradient_norm)
                optimiser.step()
    return parameters, losses


def label_objective(labels: Tensor, label_smoothing: float) -> Objective:
    """Mean cross-entropy against the labels `(num_examples,)`."""
    return lambda logits, batch: functional.cross_entropy(logits, labels[batch], label_smoothing=label_smoothing)


def channels_innermost(images: Tensor) -> Tensor:
    """Images `(batch, channels, height, width)` in the layout that models train in; other tensors as they are.

    One batch at a time: a copy of all examples would stay in memory as long as a client trains.
    """
    return images.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else images


def shifted(images: Tensor, max_shift: int, generator: torch.Generator) -> Tensor:
    """Every image moved by its own random offset of at most `max_shift` pixels; its edge pixels fill the gap.

    Args:
        images: `(batch, channels, height, width)`; the result has the same shape, channels innermost in memory.
    """
    if not max_shift:
        return images
    batch, _, height, width = images.shape
    offsets = torch.randint(-max_shift, max_shift + 1, (2, batch, 1), generator=generator)
    rows = (torch.arange(height) + offsets[0]).clamp_(0, height - 1)
    columns = (torch.arange(width) + offsets[1]).clamp_(0, width - 1)
    examples = torch.arange(batch)
    return images.permute(0, 2, 3, 1)[examples[:, None, None], rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )


def _check_levers(plan: FineTunePlan, training: LocalTraining) -> None:
    """Refuse a recipe that needs all gradients at once under a plan that never has them."""
    if not plan.fused_step:
        return
    clashes = {
        "optimiser": training.optimiser != "sgd",
        "max_gradient_norm": training.max_gradient_norm > 0,
        "proximal_mu": training.proximal_mu > 0,
    }
    for name, clash in clashes.items():
        if clash:
            raise ConfigError(
                f"plan {plan.name!r} fuses the optimiser's step into the backward pass, which goes with plain SGD "
                f"only; found finetune.{name}={getattr(training, name)!r}"
            )


def _backward(model: nn.Module, images: Tensor, batch: Tensor, plan: FineTunePlan, objective: Objective) -> Tensor:
    """Add the gradients of the batch's mean loss, one micro-batch after the other; returns that loss."""
    size = plan.micro_batch or len(batch)
    total = None
    for start in range(0, len(batch), size):
        part = batch[start : start + size]
        loss = objective(model(images[start : start + size]), part)
        loss = loss if len(part) == len(batch) else loss * (len(part) / len(batch))
        loss.backward()
        total = loss.detach() if total is None else total + loss.detach()
    if total is None:
        raise DatasetError("a batch needs at least 1 example, found none")
    return total


@contextmanager
def _stepping_in_backward(
    parameters: Sequence[nn.Parameter], optimiser: Optimiser, plan: FineTunePlan
) -> Iterator[None]:
    """Where the plan says so, every parameter is changed as soon as its gradient is there."""
    hooks = []
    if plan.fused_step and isinstance(optimiser, Sgd):
        hooks = [parameter.register_post_accumulate_grad_hook(optimiser.step_one) for parameter in parameters]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _build_optimiser(parameters: Sequence[nn.Parameter], training: LocalTraining) -> Optimiser:
    if training.optimiser == "adamw":
        return AdamW(parameters, training.learning_rate, training.weight_decay)
    return Sgd(parameters, training.learning_rate, training.momentum, training.weight_decay)


def _add_proximal_gradient(parameters: Sequence[nn.Parameter], anchors: Sequence[Tensor], mu: float) -> None:
    for parameter, anchor in zip(parameters, anchors, strict=False):
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - anchor, alpha=mu)


def _batches(num_examples: int, training: LocalTraining, generator: torch.Generator) -> Iterator[Tensor]:
    """Index tensors, a fresh order every epoch, until the epochs or steps are done."""
    left = training.num_steps(num_examples)
    while left:
        order = torch.randperm(num_examples, generator=generator)
        for start, end in batch_bounds(num_examples, training.batch_size):
            if left:
                left -= 1
                yield order[start:end]


def batch_bounds(num_examples: int, batch_size: int) -> Iterator[tuple[int, int]]:
    """Bounds of the batches; a last batch of one joins the one before it, since batch norm cannot train on one."""
    starts = list(range(0, num_examples, batch_size))
    if len(starts) > 1 and num_examples - starts[-1] == 1:
        starts.pop()
    return zip(starts, [*starts[1:], num_examples], strict=True)


def largest_batch(num_examples: int, batch_size: int) -> int:
    """Examples of the largest batch."""
    return max((end - start for start, end in batch_bounds(num_examples, batch_size)), default=0)
