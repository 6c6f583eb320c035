"""Shrinking on one machine: several subnets a step, their gradients added up in the shared weights.

Everything random in a step comes from (seed, number of the step), so a run that goes on from a checkpoint needs no
random state. With one torch thread it ends with the same bits as a run that never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from fedofa.finetune.inputs import prepare_inputs, resized
from fedofa.finetune.ops.depthwise import FastDepthwise
from fedofa.finetune.trainer import shifted
from fedofa.shrinking.channels import check_channels, kept_widths, sorted_channels, with_channels
from fedofa.shrinking.losses import build_distance
from fedofa.shrinking.optimiser import CentralOptimiser
from fedofa.shrinking.recipe import CentralTraining
from fedofa.shrinking.sampling import PhaseSampler
from fedofa.shrinking.schedule import ShrinkPhase, ShrinkSchedule
from fedofa.supernet.base import Supernet
from fedofa.supernet.importance import measured_ordering
from fedofa.types.errors import CheckpointError, ConfigError, DatasetError, DivergenceError
from fedofa.types.space import SubnetConfig
from fedofa.types.state import SharedState

_SUBNETS, _ORDER, _IMAGES, _CHANNELS = 1, 2, 3, 4
"""Tell the random numbers of subnets, the examples' order, augmentation and dropout, and channels' importance apart."""


@dataclass(frozen=True, slots=True)
class ShrinkStep:
    """What one step did: its number (from 1), its phase, the learning rate, and the subnets' losses in their order."""

    step: int
    phase: str
    learning_rate: float
    losses: Mapping[SubnetConfig, float]


class CentralShrinking:
    """Trains a supernet's shared weights, kernel matrices included, by a schedule; one `advance` is one step.

    Args:
        supernet: holds the weights, which change in place; frozen parameters no longer ask for gradients.
        schedule: which subnets learn when from whom.
        training: the recipe.
        images: `(num_examples, channels, height, width)`, uint8.
        labels: `(num_examples,)`, int64.
        mean, std: per channel, of pixels scaled to [0, 1].
        seed: of everything random.

    Raises:
        SpaceError, InfeasibilityError: when a phase leaves the space, before anything trains.
        ConfigError: when `training.frozen` names a part that is not there, or leaves nothing to train; where channels
            are to be ordered and the supernet has none.
    """

    def __init__(
        self,
        supernet: Supernet,
        schedule: ShrinkSchedule,
        training: CentralTraining,
        images: np.ndarray,
        labels: np.ndarray,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        seed: int,
    ) -> None:
        if len(labels) < 2:
            raise DatasetError(f"shrinking needs at least 2 training examples, found {len(labels)}")
        if training.order_batches:
            with_channels(supernet, "shrinking.order_batches")
        check_channels(supernet, schedule)
        self.supernet = supernet
        self.schedule = schedule
        self.training = training
        self.seed = seed
        self.done = 0
        self._images, self._labels = images, np.asarray(labels, np.int64)
        self._mean, self._std = tuple(mean), tuple(std)
        self._samplers = [PhaseSampler(supernet.space, phase, self._macs) for phase in schedule.phases]
        self._parameters = _freeze(dict(supernet.network.named_parameters()), training.frozen)
        self._optimiser = CentralOptimiser(self._parameters, training)
        self._teacher: dict[str, Tensor] | None = None
        self._teacher_module: nn.Module | None = None
        self._answers: dict[int, Tensor] = {}

    def advance(self) -> ShrinkStep:
        """Take the next step.

        Raises:
            DivergenceError: when the loss or a gradient is no longer finite; the weights are then those before the
                step.
        """
        index, within = self.schedule.phase_at(self.done)
        phase = self.schedule.phases[index]
        rate = self.training.learning_rate * phase.rate(within)
        if within == 0 and (phase.order_channels or (index == 0 and self.training.order_batches)):
            self._order_channels(index)
        if within == 0:
            self._answers.clear()
        if phase.teacher == "trained" and self._teacher is None:
            self._teacher = {name: tensor.detach().clone() for name, tensor in self.supernet.shared().items()}
        self.supernet.train()
        self._optimiser.zero_grad()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(self._seed_of(_IMAGES, self.done))
            losses = self._accumulate(phase, self._samplers[index], within)
        try:
            if not all(map(math.isfinite, losses.values())):
                raise DivergenceError("the loss is not finite")
            self._optimiser.step(rate)
        except DivergenceError as error:
            raise DivergenceError(
                f"shrinking, step {self.done + 1} ({phase.name}): {error}; start again with a lower "
                "shrinking.learning_rate, or a shrinking.max_gradient_norm"
            ) from error
        self.done += 1
        return ShrinkStep(self.done, phase.name, rate, losses)

    def _accumulate(self, phase: ShrinkPhase, sampler: PhaseSampler, within: int) -> dict[SubnetConfig, float]:
        """The gradients of all subnets of the step in the shared weights, and their losses."""
        generator = torch.Generator().manual_seed(self._seed_of(_IMAGES, self.done))
        batch = self.done - within + phase.batch_of(within)
        pixels, labels = self._examples(batch)
        pixels = shifted(pixels, self.training.max_shift, generator)
        inputs_of = lru_cache(maxsize=None)(lambda subnet: self._inputs(pixels, subnet))
        label_loss = self._label_loss(labels)
        score_of = self._score(inputs_of, labels) if phase.candidates > 1 else None
        rng = np.random.default_rng([self.seed, _SUBNETS, self.done])
        teacher = self._trained_logits(inputs_of) if phase.teacher == "trained" else self._answers.get(batch)
        distance = build_distance(phase.loss)
        losses = {}
        for subnet in sampler.draw(rng, score_of, step=within):
            logits = self._logits(inputs_of(subnet), subnet)
            if teacher is None:
                loss = label_loss(logits)
            else:
                loss = phase.teacher_weight * distance(logits, teacher)
                loss = loss + phase.label_weight * label_loss(logits) if phase.label_weight else loss
            loss.backward()
            losses[subnet] = float(loss.detach())
            if phase.teacher == "in_place" and teacher is None:
                teacher = logits.detach()
        if phase.keeps_answers and teacher is not None and batch not in self._answers:
            self._answers[batch] = teacher
            if len(self._answers) > phase.num_kept:
                self._answers.pop(min(self._answers))
        return losses

    def _logits(self, x: Tensor, subnet: SubnetConfig) -> Tensor:
        """A subnet's, float32, differentiable with respect to the shared weights."""
        with self._autocast(), FastDepthwise():
            return self.supernet(x, subnet).float()

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.training.precision == "bfloat16")

    def _order_channels(self, index: int) -> None:
        """By importance, measured on the first batches or of the weights alone; earlier phases' subnets stay."""
        supernet = with_channels(self.supernet, f"shrinking phase {self.schedule.phases[index].name!r}")
        self._teacher_module = None  # it is built in the order of channels, as a run that goes on here builds it
        earlier = self.schedule.phases[:index]
        if not self.training.order_batches:
            supernet.set_ordering(sorted_channels(supernet, earlier, supernet.state()))
            return
        examples = (self._examples(number) for number in range(self.training.order_batches))
        batches = ((self._inputs(pixels, supernet.space.largest()), labels) for pixels, labels in examples)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(self._seed_of(_CHANNELS, 0))
            supernet.set_ordering(measured_ordering(supernet, batches, kept_widths(supernet, earlier)))

    def _examples(self, step: int) -> tuple[Tensor, Tensor]:
        """A step's pixels and labels."""
        batch = self._batch(step)
        return prepare_inputs(self._images[batch], self._mean, self._std), torch.from_numpy(self._labels[batch])

    def _batch(self, step: int) -> np.ndarray:
        """Indices of a step's examples: every epoch in an order of its own, what does not fill a batch left out."""
        size = min(self.training.batch_size, len(self._labels))
        epoch, number = divmod(step, len(self._labels) // size)
        order = np.random.default_rng([self.seed, _ORDER, epoch]).permutation(len(self._labels))
        return order[number * size : (number + 1) * size]

    def _inputs(self, pixels: Tensor, subnet: SubnetConfig) -> Tensor:
        side = self.supernet.resolution(subnet)
        return resized(pixels, side).contiguous(memory_format=torch.channels_last)

    def _label_loss(self, labels: Tensor) -> Callable[[Tensor], Tensor]:
        smoothing = self.training.label_smoothing
        return lambda logits: functional.cross_entropy(logits, labels, label_smoothing=smoothing)

    def _score(self, inputs_of: Callable[[SubnetConfig], Tensor], labels: Tensor) -> Callable[[SubnetConfig], float]:
        """Minus a candidate's loss on the step's examples (AttentiveNAS, arXiv 2011.09011)."""

        @torch.no_grad()
        def score(subnet: SubnetConfig) -> float:
            return -float(functional.cross_entropy(self._logits(inputs_of(subnet), subnet), labels))

        return score

    @torch.no_grad()
    def _trained_logits(self, inputs_of: Callable[[SubnetConfig], Tensor]) -> Tensor:
        """The trained largest network's; its batch norms use the batch's own statistics, like the subnets'."""
        largest = self.supernet.space.largest()
        if self._teacher_module is None:
            self._teacher_module = self.supernet.build(largest, self._teacher).eval()
            for module in self._teacher_module.modules():
                if isinstance(module, _BatchNorm):
                    module.train()
        with self._autocast():
            return self._teacher_module(inputs_of(largest)).float()

    def _macs(self, subnet: SubnetConfig) -> int:
        return sum(block.macs for block in self.supernet.block_costs(subnet))

    def _seed_of(self, stream: int, number: int) -> int:
        return int(np.random.SeedSequence([self.seed, stream, number]).generate_state(1, np.uint64)[0] >> 1)

    def state(self) -> SharedState:
        """Everything that the next step depends on: the version is the steps done, the rest of the training moments."""
        tensors = self.supernet.state()
        teacher = {name: tensor.numpy().copy() for name, tensor in (self._teacher or {}).items()}
        answers = {str(number): logits.numpy().copy() for number, logits in self._answers.items()}
        moments = {**self._optimiser.moments(), "teacher": teacher, "answers": answers}
        return SharedState(self.done, tensors.tensors, tensors.ordering, moments)

    def restore(self, state: SharedState) -> None:
        """Go on from what `state` gave.

        Raises:
            CheckpointError: when it is of another supernet or optimiser, or beyond the schedule; the weights are then
                as they were.
        """
        if state.version > self.schedule.num_steps:
            raise CheckpointError(
                f"the checkpoint is of step {state.version:,}, beyond the schedule's {self.schedule.num_steps:,}; "
                "resume with the schedule it was made with"
            )
        self._optimiser.check(state.moments)
        self.supernet.load_state(state)
        self._optimiser.restore(state.moments)
        teacher = state.moments.get("teacher", {})
        self._teacher = {name: torch.from_numpy(value.copy()) for name, value in teacher.items()} or None
        self._teacher_module = None
        answers = state.moments.get("answers", {})
        self._answers = {int(number): torch.from_numpy(value.copy()) for number, value in answers.items()}
        self.done = state.version


def _freeze(parameters: Mapping[str, nn.Parameter], frozen: Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters outside the frozen parts; those inside no longer ask for gradients."""
    for part in frozen:
        if not any(_lies_in(name, part) for name in parameters):
            known = list(dict.fromkeys(name.split(".")[0] for name in parameters))
            raise ConfigError(f"shrinking.frozen: no parameter lies in {part!r}; the supernet's parts are {known}")
    left = {}
    for name, parameter in parameters.items():
        if any(_lies_in(name, part) for part in frozen):
            parameter.requires_grad_(False)
        else:
            left[name] = parameter
    if not left:
        raise ConfigError(f"shrinking.frozen: {list(frozen)} leaves no parameter to train; name fewer parts")
    return left


def _lies_in(name: str, part: str) -> bool:
    return f"{name}.".startswith(f"{part}.")
