"""Draws the subnets of a training step, by the rule of a phase. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from fedofa.shrinking.schedule import ShrinkPhase
from fedofa.types.errors import ConfigError, InfeasibilityError
from fedofa.types.space import INACTIVE, Axis, SearchSpace, SubnetConfig

MacsOf = Callable[[SubnetConfig], float]
"""Multiply-accumulates of a subnet for one example."""

ScoreOf = Callable[[SubnetConfig], float]
"""How good a subnet is expected to be, higher is better: minus its loss on the current batch, or a predictor."""


class PhaseSampler:
    """The subnets of one phase.

    Args:
        space: of the supernet.
        phase: what may be drawn, and how.
        macs_of: counts a subnet's MACs.

    Raises:
        SpaceError: when the phase leaves the space.
        InfeasibilityError: when no subnet of the phase has about the MACs that a target asks for.
    """

    def __init__(self, space: SearchSpace, phase: ShrinkPhase, macs_of: MacsOf) -> None:
        phase.check(space)
        self.space = space
        self.phase = phase
        self._allowed = _restricted(space, phase.elastic)
        self._macs = lru_cache(maxsize=4096)(lambda inner: macs_of(self.outer(inner)))
        self._check_targets()

    def largest(self) -> SubnetConfig:
        """The largest subnet that the phase allows."""
        return self.outer(self._allowed.largest())

    def smallest(self) -> SubnetConfig:
        """The smallest one."""
        return self.outer(self._allowed.smallest())

    def below(self, subnet: SubnetConfig) -> SearchSpace:
        """What the phase allows and is at no position larger than `subnet`, itself one that the phase allows.

        Its configurations count the phase's values; `outer` makes them configurations of the whole space.
        """
        axes = []
        for axis in self._allowed.axes:
            values = self.space.values(subnet, axis.name)
            stops = [
                axis.indices(position).start + 1 if value is None else axis.values.index(value) + 1
                for position, value in enumerate(values)
            ]
            axes.append(replace(axis, limits=tuple(stops)))
        return SearchSpace(self.space.family, axes)

    def draw(
        self, rng: np.random.Generator, score_of: ScoreOf | None = None, *, step: int = 0
    ) -> tuple[SubnetConfig, ...]:
        """The distinct subnets of one step; with the sandwich or an in-place teacher the largest comes first.

        Args:
            score_of: chooses among the candidates of a phase that has more than one.
            step: the step's number within the phase: says whose turn it is in a phase of turns.

        Raises:
            ConfigError: when candidates have to be compared and nothing was given to compare them by.
        """
        if self.phase.candidates > 1 and score_of is None:
            raise ConfigError(f"shrinking phase {self.phase.name!r}: {self.phase.candidates} candidates need a score")
        first = [self.largest] if self.phase.leads else []
        last = [self.smallest] if self.phase.sandwich else []
        members = [*first, *[lambda: self._draw_one(rng, score_of)] * self.phase.num_random, *last]
        if self.phase.turns:
            members = [members[step % len(members)]]
        return tuple(dict.fromkeys(member() for member in members))

    def _draw_one(self, rng: np.random.Generator, score_of: ScoreOf | None) -> SubnetConfig:
        phase, uniform = self.phase, self._allowed.sample(rng)
        if phase.candidates == 1 and not phase.macs_targets:
            return self.outer(uniform)
        target = rng.choice(phase.macs_targets) if phase.macs_targets else self._macs(uniform)
        candidates = [self.outer(self._near(target, rng)) for _ in range(phase.candidates)]
        if phase.candidates == 1 or score_of is None:
            return candidates[0]
        scores = [score_of(candidate) for candidate in candidates]
        return candidates[int(np.argmax(scores) if phase.prefer == "best" else np.argmin(scores))]

    def _near(self, target: float, rng: np.random.Generator) -> SubnetConfig:
        """A random subnet walked towards the target, one position at a time, until it is within the tolerance.

        Where no single step comes closer, the subnet reached is as near as it gets.
        """
        subnet = self._allowed.sample(rng)
        while self._distance(subnet, target) > self.phase.macs_tolerance * target:
            here = self._distance(subnet, target)
            moves = self._allowed.neighbours(subnet, rng)
            closer = next((move for move in moves if self._distance(move, target) < here), None)
            if closer is None:
                break
            subnet = closer
        return subnet

    def _distance(self, subnet: SubnetConfig, target: float) -> float:
        return abs(self._macs(subnet) - target)

    def _check_targets(self) -> None:
        if not self.phase.macs_targets:
            return
        low, high = self._macs(self._allowed.smallest()), self._macs(self._allowed.largest())
        for target in self.phase.macs_targets:
            if not low <= target <= high:
                raise InfeasibilityError(
                    f"shrinking phase {self.phase.name!r}: no subnet has {target:,.0f} MACs; the smallest, "
                    f"{self.smallest().digest()}, has {low:,.0f} and the largest {high:,.0f}; ask for MACs in between"
                )

    def outer(self, inner: SubnetConfig) -> SubnetConfig:
        """The configuration of the whole space that has the same values."""
        return SubnetConfig(
            self.space.family,
            tuple(
                (
                    axis.name,
                    tuple(
                        INACTIVE if index == INACTIVE else self.space.axis(axis.name).values.index(axis.values[index])
                        for index in inner[axis.name]
                    ),
                )
                for axis in self._allowed.axes
            ),
        )


def _restricted(space: SearchSpace, elastic: Mapping[str, Sequence[float]]) -> SearchSpace:
    """The space in which every axis has only the values that may be drawn."""
    return SearchSpace(
        space.family, [_restricted_axis(axis, elastic.get(axis.name, axis.values[-1:])) for axis in space.axes]
    )


def _restricted_axis(axis: Axis, values: Sequence[float]) -> Axis:
    """The axis with only these values; a position all of whose values are smaller keeps its own largest."""
    allowed = sorted(values)
    if not axis.limits:
        return replace(axis, values=tuple(allowed))
    largest = [axis.choices(position)[-1] for position in range(len(axis.controls))]
    below = sorted({value for value in largest if value < allowed[0]})
    starts = [below.index(value) if value in below else len(below) for value in largest]
    counts = [1 if value in below else sum(item <= value for item in allowed) for value in largest]
    limits = tuple(start + count for start, count in zip(starts, counts, strict=True))
    return replace(axis, values=(*below, *allowed), limits=limits, starts=tuple(starts) if below else ())
