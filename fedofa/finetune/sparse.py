"""What a sparse plan trains: the layers and channels that promise most, under a budget of memory.

After MCUNetV3 (arXiv 2206.15472, section 3.2): the biases of the last blocks, and of some layers the weights of a
fraction of their input channels. There a layer's contribution is the accuracy that training it alone gains, which takes
a training for every layer and fraction. Here it is the squared norm of the loss's gradient by what would train: by so
much the loss falls in a step along it, to first order, for each unit of learning rate. That adds up over layers and
channels, and one backward pass over a few examples measures all of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, final

from fedofa.types.plan import leading_count

FRACTIONS = (0.125, 0.25, 0.5, 1.0)
"""The fractions of a weight's channels that may train."""

_STEP_VALUES = 2
"""Values that a trained one takes in a step: its gradient and its momentum."""


@dataclass(frozen=True, slots=True)
class WeightContribution:
    """What training a weight promises and takes.

    Args:
        name: of the weight.
        positions: values of one channel of the layer's input, for one example.
        row_values: values of the weight a channel.
        squared: squared norm of the gradient by each channel's values, in order (`FineTunePlan.part_shape` says which
            dimension channels are).
    """

    name: str
    positions: int
    row_values: int
    squared: tuple[float, ...]

    def cost(self, fraction: float) -> int:
        """Values that training the leading channels takes, for one example at a time."""
        return leading_count(fraction, len(self.squared)) * (self.positions + _STEP_VALUES * self.row_values)

    def gain(self, fraction: float) -> float:
        """Squared norm of the leading channels' gradient."""
        return math.fsum(self.squared[: leading_count(fraction, len(self.squared))])


@dataclass(frozen=True, slots=True)
class BlockContribution:
    """A block's weights, and what it promises and takes where only its biases train.

    Args:
        name: of the block.
        kept_values: values that are kept of one example so that gradients pass through the block.
        num_biases: values of its biases.
        bias_squared: squared norm of their gradient.
        weights: those of convolutions and linear layers.
    """

    name: str
    kept_values: int
    num_biases: int
    bias_squared: float
    weights: tuple[WeightContribution, ...]

    @property
    def bias_cost(self) -> int:
        """Values that training the biases takes, gradients through the block included."""
        return self.kept_values + _STEP_VALUES * self.num_biases

    @property
    def full_cost(self) -> int:
        """Values that training everything in the block takes."""
        return self.bias_cost + sum(weight.cost(1.0) for weight in self.weights)


@dataclass(frozen=True, slots=True)
class SparseChoice:
    """What a sparse plan trains, in every subnet that has it.

    Args:
        blocks: whose biases train.
        fractions: weights that train, each with the fraction of its channels.
    """

    blocks: frozenset[str]
    fractions: tuple[tuple[str, float], ...]


@final
class Contributions:
    """What every layer of a supernet's largest subnet contributes; the choices made of it hold for all its subnets.

    Args:
        blocks: in forward order, the last one being the head, which always trains whole.
    """

    def __init__(self, blocks: Sequence[BlockContribution]) -> None:
        self.blocks = tuple(blocks)
        self.choice = cache(self._choice)

    def _choice(self, fraction: float) -> SparseChoice:
        """The choice of largest contribution whose training takes at most that fraction of what training all takes.

        Counted are what is kept of one example, gradients and momentum. For every block at which gradients may stop,
        weights after it are taken greedily; the best of these is chosen, and the head alone where nothing more fits.
        """
        *body, head = self.blocks
        budget = fraction * sum(block.full_cost for block in self.blocks)
        best, best_gain = SparseChoice(frozenset(), ()), -1.0
        for start in reversed(range(len(body))):
            reached = body[start:]
            left = budget - head.full_cost - sum(block.bias_cost for block in reached)
            if left < 0:
                break
            chosen, gain = _greedy([weight for block in reached for weight in block.weights], left)
            gain += math.fsum(block.bias_squared for block in reached)
            if gain > best_gain:
                names = frozenset(block.name for block in reached)
                best, best_gain = SparseChoice(names, tuple(chosen.items())), gain
        return best


class _Increment(NamedTuple):
    """From one fraction of a weight's channels to a larger one: what that gains and takes."""

    density: float
    name: str
    before: float
    after: float
    gain: float
    cost: int


def _greedy(weights: Sequence[WeightContribution], budget: float) -> tuple[dict[str, float], float]:
    """Fractions by weight, and their gain: increments are taken by gain a cost as long as they fit.

    This is the greedy of the multiple-choice knapsack on the upper hull of each weight's fractions (Sinha and Zoltners,
    Operations Research 27(3), 1979): what it misses is at most one increment.
    """
    increments = sorted(itertools.chain.from_iterable(map(_hull, weights)), key=lambda item: (-item.density, item.name))
    chosen: dict[str, float] = {}
    total = 0.0
    for item in increments:
        if chosen.get(item.name, 0.0) == item.before and item.cost <= budget:
            chosen[item.name] = item.after
            budget -= item.cost
            total += item.gain
    ordered = {weight.name: chosen[weight.name] for weight in weights if weight.name in chosen}
    return ordered, total


def _hull(weight: WeightContribution) -> Iterator[_Increment]:
    """The increments of falling density that lead to the whole weight; those of no gain are left out."""
    points = [(0.0, 0.0, 0)]
    for fraction in FRACTIONS:
        point = (fraction, weight.gain(fraction), weight.cost(fraction))
        if point[2] == points[-1][2]:
            points[-1] = point if len(points) > 1 else points[-1]
            continue
        while len(points) > 1 and _density(points[-1], point) >= _density(points[-2], points[-1]):
            points.pop()
        points.append(point)
    for before, after in itertools.pairwise(points):
        gain, cost = after[1] - before[1], after[2] - before[2]
        if gain > 0:
            yield _Increment(gain / cost, weight.name, before[0], after[0], gain, cost)


def _density(before: tuple[float, float, int], after: tuple[float, float, int]) -> float:
    return (after[1] - before[1]) / (after[2] - before[2])
