"""Local fine-tuning of one subnet on one client's examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedofa.finetune.engine import planned
from fedofa.finetune.features import FeatureCache, cut_of
from fedofa.finetune.inputs import Inputs
from fedofa.finetune.optimisers import AdamW, Optimiser, Sgd, SummingSgd
from fedofa.finetune.recipe import FineTuneResult, LocalTraining, batch_bounds
from fedofa.types.delta import LowRank
from fedofa.types.errors import ConfigError, DatasetError
from fedofa.types.plan import FineTunePlan

SHIFT_REFUSAL = (
    "cached features are those of images that stay as they are; set finetune.max_shift=0 or feature_cache=false"
)

Objective = Callable[[Tensor, Tensor], Tensor]
"""From a batch's logits `(batch, num_classes)` and the indices of its examples `(batch,)` to the loss."""
_ROUNDING = 1
"""Tells the draws that round compressed activations from those of the batches' order, by the seed."""


def fine_tune(
    model: nn.Module,
    plan: FineTunePlan,
    received: Mapping[str, np.ndarray],
    inputs: Inputs,
    labels: Tensor,
    training: LocalTraining,
    generator: torch.Generator,
    objective: Objective | None = None,
    features: FeatureCache | None = None,
) -> FineTuneResult:
    """Train the model as the plan says, for its changes, and use it up.

    A board has no room for weights and changes at once: the memory of what trained becomes the delta. What the model
    computes afterwards means nothing; its next training begins with weights put in anew (`holding.hold`).

    Args:
        model: the subnet, holding copies of the received weights that train.
        plan: what trains and how.
        received: the weights as they came, by name; the delta is taken against them.
        inputs: `(num_examples, channels, height, width)`, at the subnet's resolution where they are taken.
        labels: `(num_examples,)`, int64.
        training: the recipe.
        generator: draws the batches' order; another one of the same seed draws the rounding of compressed activations.
            Dropout draws from torch's default generator, which the caller seeds.
        objective: what is minimised, a mean over examples; by default the cross-entropy of `label_objective`.
        features: what earlier trainings of this process computed; used by plans with a feature cache.
    """
    if not len(labels):
        raise DatasetError("fine-tuning needs at least 1 training example, found none; the client cannot take part")
    _check_levers(plan, training)
    objective = objective or label_objective(labels, training.label_smoothing)
    parameters, losses = run_steps(model, plan, inputs, training, generator, objective, features)
    weights, low_rank = _changes(plan, [parameter.detach().cpu().numpy() for parameter in parameters], received)
    return FineTuneResult(weights, len(losses), float(torch.stack(losses).mean()), low_rank)


def _changes(
    plan: FineTunePlan, trained: Sequence[np.ndarray], received: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, LowRank]]:
    """What `planned` gave to train, after training, becomes changes of whole weights or trained parts, and factors."""
    dense, factors = trained[: len(plan.trainable)], trained[len(plan.trainable) :]
    weights = dict(zip(plan.trainable, dense, strict=True))
    for name, values in weights.items():
        np.subtract(values, received[name][tuple(map(slice, values.shape))], out=values)
    pairs = zip(factors[::2], factors[1::2], strict=True)
    return weights, {name: LowRank(*pair) for name, pair in zip(plan.low_rank, pairs, strict=True)}


def run_steps(
    model: nn.Module,
    plan: FineTunePlan,
    inputs: Inputs,
    training: LocalTraining,
    generator: torch.Generator,
    objective: Objective,
    features: FeatureCache | None = None,
) -> tuple[list[nn.Parameter], list[Tensor]]:
    """The steps of `fine_tune`, on any device: what trained, in the plan's order, and the loss of every batch."""
    losses = []
    rounding = torch.Generator().manual_seed(generator.initial_seed() ^ _ROUNDING)
    with planned(model, plan, rounding) as parameters:
        if plan.feature_cache:
            model, inputs = _behind_features(model, plan, inputs, training.batch_size, features or FeatureCache())
        optimiser = _build_optimiser(parameters, training, plan)
        anchors = [parameter.detach().clone() for parameter in parameters] if training.proximal_mu else []
        with _stepping_in_backward(parameters, optimiser, plan.fused_step):
            for batch in _batches(len(inputs), training, generator):
                optimiser.begin()
                offsets = draw_offsets(len(batch), training.max_shift, generator)
                losses.append(_backward(model, inputs, batch, offsets, plan, objective))
                _add_proximal_gradient(parameters, anchors, training.proximal_mu)
                if training.max_gradient_norm:
                    nn.utils.clip_grad_norm_(parameters, training.max_gradient_norm)
                optimiser.step()
        optimiser.drop_gradients()
    return parameters, losses


def label_objective(labels: Tensor, label_smoothing: float) -> Objective:
    """Mean cross-entropy against the labels `(num_examples,)`."""
    return lambda logits, batch: functional.cross_entropy(logits, labels[batch], label_smoothing=label_smoothing)


def channels_innermost(images: Tensor) -> Tensor:
    """Images `(batch, channels, height, width)` in the layout that models train in; other tensors as they are."""
    return images.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else images


def shifted(images: Tensor, max_shift: int, generator: torch.Generator) -> Tensor:
    """Every image moved by its own random offset of at most `max_shift` pixels; its edge pixels fill the gap.

    Args:
        images: `(batch, channels, height, width)`; the result has the same shape, channels innermost in memory.
    """
    return moved(images, draw_offsets(len(images), max_shift, generator))


def draw_offsets(count: int, max_shift: int, generator: torch.Generator) -> Tensor | None:
    """Offsets of images along height and width in pixels, `(2, count, 1)`; None, and nothing is drawn, for no shift."""
    return torch.randint(-max_shift, max_shift + 1, (2, count, 1), generator=generator) if max_shift else None


def moved(images: Tensor, offsets: Tensor | None) -> Tensor:
    """Images `(batch, channels, height, width)` moved by their `draw_offsets`; the same images where those are None."""
    if offsets is None:
        return images
    batch, _, height, width = images.shape
    rows = (torch.arange(height) + offsets[0]).clamp_(0, height - 1)
    columns = (torch.arange(width) + offsets[1]).clamp_(0, width - 1)
    examples = torch.arange(batch)
    return images.permute(0, 2, 3, 1)[examples[:, None, None], rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )


def _behind_features(
    model: nn.Module, plan: FineTunePlan, inputs: Inputs, batch_size: int, cache: FeatureCache
) -> tuple[nn.Module, Inputs]:
    """The part of the model that trains, and what it takes in place of the inputs."""
    cut = cut_of(model, plan)
    form = "lean" if plan.lean else "stock"
    return cut.suffix, cache.features(cut.prefix, inputs, plan.micro_batch or batch_size, form)


def _check_levers(plan: FineTunePlan, training: LocalTraining) -> None:
    """Refuse a recipe that changes cached inputs, or needs what the plan never has: whole weights, all gradients."""
    if plan.low_rank and training.proximal_mu:
        raise ConfigError(
            f"plan {plan.name!r} trains factors, which have no distance from the received weights; set "
            f"finetune.proximal_mu=0, found {training.proximal_mu!r}"
        )
    if plan.feature_cache and training.max_shift:
        raise ConfigError(f"plan {plan.name!r}: {SHIFT_REFUSAL}, found finetune.max_shift={training.max_shift}")
    if plan.fused_step and (names := training.against_fusing):
        raise ConfigError(
            f"plan {plan.name!r} fuses the optimiser's step into the backward pass, which goes with plain SGD "
            f"only; found finetune.{names[0]}={getattr(training, names[0])!r}"
        )


def _backward(
    model: nn.Module,
    inputs: Inputs,
    batch: Tensor,
    offsets: Tensor | None,
    plan: FineTunePlan,
    objective: Objective,
) -> Tensor:
    """Add the gradients of the batch's mean loss, one micro-batch after the other; returns that loss.

    Images are prepared a micro-batch at a time: a whole batch of large ones takes more than a small plan does.
    """
    size = plan.micro_batch or len(batch)
    total = None
    for start in range(0, len(batch), size):
        part = batch[start : start + size]
        own = None if offsets is None else offsets[:, start : start + size]
        loss = objective(model(channels_innermost(moved(inputs[part], own))), part)
        loss = loss if len(part) == len(batch) else loss * (len(part) / len(batch))
        loss.backward()
        total = loss.detach() if total is None else total + loss.detach()
    if total is None:
        raise DatasetError("a batch needs at least 1 example, found none")
    return total


@contextmanager
def _stepping_in_backward(parameters: Sequence[nn.Parameter], optimiser: Optimiser, fused: bool) -> Iterator[None]:
    """Where the step is fused, `Sgd` changes every parameter as soon as its gradient is there."""
    hooks = []
    if fused and isinstance(optimiser, Sgd):
        hooks = [parameter.register_post_accumulate_grad_hook(optimiser.step_one) for parameter in parameters]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _build_optimiser(parameters: Sequence[nn.Parameter], training: LocalTraining, plan: FineTunePlan) -> Optimiser:
    if training.optimiser == "adamw":
        return AdamW(parameters, training.learning_rate, training.weight_decay)
    sgd = SummingSgd if plan.sums_in_momentum else Sgd
    return sgd(parameters, training.learning_rate, training.momentum, training.weight_decay)


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
