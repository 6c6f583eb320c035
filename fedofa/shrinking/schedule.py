"""Shrinking schedules as values: which subnets of a supernet are trained when, and what they learn from. No torch.

Progressive shrinking: Once-for-All (arXiv 1908.09791, section 3.3). Sandwich rule and in-place distillation:
universally slimmable networks (1903.05134) and BigNAS (2003.11142). Attentive sampling: AttentiveNAS (2011.09011).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

from fedofa.types.errors import ConfigError, SpaceError
from fedofa.types.space import SearchSpace

T = TypeVar("T")

TEACHERS = ("none", "trained", "in_place")
LOSSES = ("soft_cross_entropy", "alpha_divergence")
PREFERENCES = ("best", "worst")

CHANNEL_AXES = ("expand", "width")
"""Axes that say how many channels blocks have inside."""

_FIRST_EPOCHS, _SHORT_EPOCHS, _LONG_EPOCHS = 180, 25, 120
_STAGES = (
    ("kernel", ("kernel",), False, 1),
    ("depth", ("stem_depth", "depth"), True, 2),
    ("expand", ("expand",), True, 4),
    ("width", ("width",), True, 4),
)
"""Name, axes that become elastic, whether a short phase with one more value precedes the long one, subnets a step."""
_ROUNDS_BETWEEN = 4
"""Rounds of turns after which the next turn learns from images that the largest has answered: enough that the momentum
of SGD, some ten steps, does not hold the same images twice."""
_SHORT_RATE, _LONG_RATE = 0.1, 0.4
"""Learning rates of short and long phases as fractions of the first one's: what is trained already is only adapted."""


@dataclass(frozen=True, slots=True)
class TeacherLoss:
    """How far a subnet is from its teacher.

    Args:
        kind: "soft_cross_entropy", or "alpha_divergence" (AlphaNet, arXiv 2102.07954).
        temperature: both sides' logits are divided by it (soft cross-entropy only).
        alpha_low, alpha_high: the two divergences of which the larger counts, example by example.
        max_ratio: upper bound of the importance weight (teacher / student)^alpha.
    """

    kind: str = "soft_cross_entropy"
    temperature: float = 1.0
    alpha_low: float = -1.0
    alpha_high: float = 1.0
    max_ratio: float = 5.0

    def __post_init__(self) -> None:
        if self.kind not in LOSSES:
            raise ConfigError(f"shrinking, loss of the teacher: expected one of {list(LOSSES)}, found {self.kind!r}")
        for name, least in (("temperature", 0.0), ("max_ratio", 1.0)):
            value = getattr(self, name)
            if not least < value < math.inf:
                raise ConfigError(f"shrinking, {name}: expected a finite number above {least:g}, found {value!r}")
        if not -math.inf < self.alpha_low <= self.alpha_high < math.inf:
            found = f"found {self.alpha_low!r} and {self.alpha_high!r}"
            raise ConfigError(f"shrinking: expected alpha_low to be at most alpha_high, both finite; {found}")


@dataclass(frozen=True, slots=True)
class ShrinkPhase:
    """A stretch of training under one rule.

    In every step some subnets see the same examples, and their gradients add up. They are, with `sandwich`, the largest
    and the smallest that the phase allows, and `num_random` drawn ones. With `turns` one of these learns in each step.

    Args:
        name: for people.
        steps: optimiser steps.
        elastic: axis -> the values that may be drawn; an axis left out stays at its largest value.
        num_random: subnets drawn a step.
        sandwich: whether the largest and the smallest train in every step.
        turns: whether only one of the step's subnets learns: the largest in the first step, then the drawn ones, the
            smallest, the largest again. The same compute then takes several times the steps, on other examples each.
            With a teacher in place the turns after the largest's learn on examples that it has answered: see
            `batch_of`.
        order_channels: whether channels are ordered by importance before the phase's first step; narrower subnets of
            earlier phases stay the networks they are.
        candidates: k; each drawn subnet is the best or worst of k that cost about the same. 1: it is drawn uniformly.
        prefer: "best" or "worst" of the candidates.
        macs_targets: MACs that drawn subnets should have, one picked at random for each. None given and k above 1: the
            target is what a uniformly drawn subnet costs, so that every size is met as often as it occurs.
        macs_tolerance: how far from the target a candidate may be, as a fraction of it.
        teacher: "none"; "trained": the largest network as it was when the first such phase began; "in_place": the
            phase's largest subnet in the same step, or in its latest turn on the same examples, which itself learns
            from the labels.
        loss: distance to the teacher.
        label_weight, teacher_weight: of the two losses of a subnet that has a teacher.
        learning_rate: of the phase's first steps, as a multiple of the recipe's.
        warmup_fraction: of the steps, in which the rate rises linearly; then it falls by a cosine to 0.
    """

    name: str
    steps: int
    elastic: Mapping[str, tuple[float, ...]]
    num_random: int = 1
    sandwich: bool = False
    turns: bool = False
    order_channels: bool = False
    candidates: int = 1
    prefer: str = "best"
    macs_targets: tuple[float, ...] = ()
    macs_tolerance: float = 0.05
    teacher: str = "none"
    loss: TeacherLoss = TeacherLoss()
    label_weight: float = 1.0
    teacher_weight: float = 1.0
    learning_rate: float = 1.0
    warmup_fraction: float = 0.05

    def __post_init__(self) -> None:
        self._expect("steps", self.steps >= 1, "at least 1")
        self._expect("num_random", self.num_random >= (0 if self.sandwich else 1), "at least 1, or 0 with sandwich")
        self._expect("candidates", self.candidates >= 1, "at least 1")
        self._expect("prefer", self.prefer in PREFERENCES, f"one of {list(PREFERENCES)}")
        self._expect("teacher", self.teacher in TEACHERS, f"one of {list(TEACHERS)}")
        self._expect("macs_targets", all(target > 0 for target in self.macs_targets), "positive numbers")
        self._expect("macs_tolerance", 0 < self.macs_tolerance < 1, "a number in (0, 1)")
        self._expect("learning_rate", 0 < self.learning_rate < math.inf, "a positive number")
        self._expect("warmup_fraction", 0 <= self.warmup_fraction < 1, "a number in [0, 1)")
        for name in ("label_weight", "teacher_weight"):
            self._expect(name, 0 <= getattr(self, name) < math.inf, "a number of at least 0")
        if self.teacher != "none" and self.label_weight + self.teacher_weight == 0:
            raise ConfigError(f"shrinking phase {self.name!r}: label_weight and teacher_weight are 0: nothing to learn")

    def _expect(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            found = getattr(self, name)
            raise ConfigError(f"shrinking phase {self.name!r}, {name}: expected {wanted}, found {found!r}")

    @property
    def leads(self) -> bool:
        """Whether the largest subnet is one of every step's, or of every round of turns."""
        return self.sandwich or self.teacher == "in_place"

    @property
    def num_turns(self) -> int:
        """Subnets of a step, or of a round of turns."""
        return self.num_random + self.leads + self.sandwich

    @property
    def keeps_answers(self) -> bool:
        """Whether the largest subnet's logits in its turn teach later turns."""
        return self.turns and self.teacher == "in_place"

    @property
    def num_kept(self) -> int:
        """Batches whose answers later turns still need: the last turn learns from the oldest."""
        return 1 + _ROUNDS_BETWEEN * (self.num_turns - 1)

    def batch_of(self, step: int) -> int:
        """The number, within the phase, of the batch of examples that one of its steps learns from.

        Every step has its own, but for turns with a teacher in place: there the largest takes a new one in each round,
        and the turn t places after it the one that the largest answered `_ROUNDS_BETWEEN` t rounds ago (in the phase's
        first rounds this round's), so that no two turns near each other learn on the same examples.
        """
        if not self.keeps_answers:
            return step
        number, turn = divmod(step, self.num_turns)
        earlier = number - _ROUNDS_BETWEEN * turn
        return earlier if earlier >= 0 else number

    def rate(self, step: int) -> float:
        """The learning rate's multiple in one of the phase's steps, counted from 0."""
        warmup = round(self.warmup_fraction * self.steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / (warmup + 1)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (self.steps - warmup)))

    def check(self, space: SearchSpace) -> None:
        """Refuse what lies outside the space.

        Raises:
            SpaceError: naming phase, axis, the value and what is allowed.
        """
        for name, values in self.elastic.items():
            try:
                allowed = space.axis(name).values
            except SpaceError as error:
                raise SpaceError(f"shrinking phase {self.name!r}: {error}") from None
            outside = [value for value in values if value not in allowed]
            if outside or not values:
                found = f"found {outside}" if values else "found none"
                where = f"shrinking phase {self.name!r}, axis {name!r}"
                raise SpaceError(f"{where}: expected values out of {list(allowed)}, {found}")


@dataclass(frozen=True, slots=True)
class ShrinkSchedule:
    """Phases, one after the other. Whichever runtime trains asks `phase_at` what a step is about."""

    phases: tuple[ShrinkPhase, ...]

    def __post_init__(self) -> None:
        if not self.phases:
            raise ConfigError("shrinking: expected at least one phase, found none")

    @property
    def num_steps(self) -> int:
        """Steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    def phase_at(self, step: int) -> tuple[int, int]:
        """The phase of a step (counted from 0) and the step's number within it.

        Raises:
            ConfigError: when there is no such step.
        """
        if not 0 <= step < self.num_steps:
            raise ConfigError(f"shrinking: step {step} is beyond the schedule's {self.num_steps}")
        starts = list(itertools.accumulate((phase.steps for phase in self.phases), initial=0))
        index = max(number for number, start in enumerate(starts) if start <= step)
        return index, step - starts[index]

    def check(self, space: SearchSpace) -> None:
        """Refuse a schedule that is not of this space; see `ShrinkPhase.check`."""
        for phase in self.phases:
            phase.check(space)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` turns back into an equal schedule."""
        listed = [{**asdict(phase), "elastic": dict(phase.elastic)} for phase in self.phases]
        for phase in listed:
            phase["elastic"] = {name: list(values) for name, values in phase["elastic"].items()}
            phase["macs_targets"] = list(phase["macs_targets"])
        return {"phases": listed}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ShrinkSchedule:
        """The inverse of `to_json`; a `ConfigError` names what is not known or malformed."""
        if not isinstance(value, Mapping) or not isinstance(value.get("phases"), Sequence):
            raise ConfigError(f'shrinking: expected an object with a list of "phases", found {value!r}')
        return cls(tuple(_phase_from_json(number, item) for number, item in enumerate(value["phases"], 1)))

    @classmethod
    def progressive(cls, space: SearchSpace, num_steps: int, loss: TeacherLoss | None = None) -> ShrinkSchedule:
        """Once-for-All's stages: the largest network, then elastic kernel, depth, expand ratio (and width).

        The stages have the published proportions: 180 epochs, 120, then 25 and 120 each; 1, 1, 2 and 4 subnets a step;
        from the second stage on a subnet learns from the labels and from the trained largest network alike. Axes that
        the space lacks, or that have one value, drop out; the resolution is elastic throughout. Channels are ordered by
        importance before each phase that makes blocks narrower.
        """
        elastic = {axis.name: axis.values for axis in space.axes if axis.is_input}
        loss = loss or TeacherLoss()
        phases = [ShrinkPhase("largest", _FIRST_EPOCHS, dict(elastic), loss=loss)]
        for name, axes, has_short, num_subnets in _STAGES:
            widened = {axis.name: axis.values for axis in space.axes if axis.name in axes and len(axis.values) > 1}
            if not widened:
                continue
            rule: dict[str, Any] = {"num_random": num_subnets, "teacher": "trained", "loss": loss}
            rule["order_channels"] = not widened.keys().isdisjoint(CHANNEL_AXES)
            if has_short and any(len(values) > 2 for values in widened.values()):
                values = elastic | {axis: values[-2:] for axis, values in widened.items()}
                short = ShrinkPhase(f"{name}, first phase", _SHORT_EPOCHS, values, learning_rate=_SHORT_RATE, **rule)
                phases.append(short)
            elastic |= widened
            phases.append(ShrinkPhase(name, _LONG_EPOCHS, dict(elastic), learning_rate=_LONG_RATE, **rule))
        lengths = _apportion([phase.steps for phase in phases], num_steps)
        return cls(tuple(replace(phase, steps=steps) for phase, steps in zip(phases, lengths, strict=True)))

    @classmethod
    def sandwich(
        cls, space: SearchSpace, num_steps: int, *, num_random: int = 2, loss: TeacherLoss | None = None
    ) -> ShrinkSchedule:
        """A single stage: the largest learns from the labels, the smallest and some random ones from the largest."""
        return cls((_single_stage("sandwich", space, num_steps, num_random, loss),))

    @classmethod
    def turns(
        cls,
        space: SearchSpace,
        num_steps: int,
        *,
        num_random: int = 3,
        teacher_share: float = 0.0,
        loss: TeacherLoss | None = None,
    ) -> ShrinkSchedule:
        """A single stage: the sandwich's subnets learn one in each step.

        Args:
            teacher_share: of the loss of all but the largest, what the distance to the largest's answers counts; the
                labels have the rest. 0: no teacher.
            loss: that distance.

        Raises:
            ConfigError: for a share outside [0, 1].
        """
        if not 0 <= teacher_share <= 1:
            raise ConfigError(f"shrinking.teacher_share: expected a number in [0, 1], found {teacher_share!r}")
        rule: dict[str, Any] = {"num_random": num_random, "sandwich": True, "turns": True}
        if teacher_share:
            rule |= {"teacher": "in_place", "loss": loss or TeacherLoss()}
            rule |= {"teacher_weight": teacher_share, "label_weight": 1 - teacher_share}
        elastic = {axis.name: axis.values for axis in space.axes}
        return cls((ShrinkPhase("turns", num_steps, elastic, **rule),))

    @classmethod
    def attentive(
        cls,
        space: SearchSpace,
        num_steps: int,
        *,
        num_random: int = 2,
        candidates: int = 3,
        prefer: str = "best",
        macs_targets: Sequence[float] = (),
        loss: TeacherLoss | None = None,
    ) -> ShrinkSchedule:
        """The sandwich, with each random subnet the best or worst of k candidates of about the same MACs."""
        more = {"candidates": candidates, "prefer": prefer, "macs_targets": tuple(macs_targets)}
        return cls((_single_stage("attentive", space, num_steps, num_random, loss, **more),))


def _single_stage(
    name: str, space: SearchSpace, steps: int, num_random: int, loss: TeacherLoss | None, **more: Any
) -> ShrinkPhase:
    elastic = {axis.name: axis.values for axis in space.axes}
    rule = {"num_random": num_random, "sandwich": True, "teacher": "in_place", "label_weight": 0.0}
    return ShrinkPhase(name, steps, elastic, loss=loss or TeacherLoss(), **rule, **more)


def _apportion(shares: Sequence[int], total: int) -> list[int]:
    """Whole steps in proportion to `shares`, at least one each, that add up to `total`."""
    if total < len(shares):
        raise ConfigError(
            f"shrinking.steps (of a federation: rounds): expected at least {len(shares)}, one a phase, found {total}"
        )
    free = total - len(shares)
    ends = [round(free * end / sum(shares)) for end in itertools.accumulate(shares, initial=0)]
    return [1 + after - before for before, after in itertools.pairwise(ends)]


def _phase_from_json(number: int, value: Any) -> ShrinkPhase:
    """One phase; `number` says in messages which."""
    where = f"shrinking.phases, phase {number}"
    kinds, needed = {item.name: str(item.type) for item in fields(ShrinkPhase)}, {"name", "steps", "elastic"}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected an object with {sorted(needed)}, found {value!r}")
    unknown, missing = sorted(set(value) - set(kinds)), sorted(needed - set(value))
    if unknown or missing:
        raise ConfigError(f"{where}: unknown settings {unknown}, missing ones {missing}; known: {list(kinds)}")
    settings = dict(value)
    settings["elastic"] = _read(where, "elastic", value, "an object of lists: axis -> values", _elastic)
    settings["macs_targets"] = _read(where, "macs_targets", value, "a list of numbers", _numbers)
    settings["loss"] = _read(where, "loss", value, "an object with fields of TeacherLoss", _teacher_loss)
    for name in sorted(value.keys() - {"elastic", "macs_targets", "loss"}):
        _check_kind(where, name, value[name], kinds[name])
    return ShrinkPhase(**settings)


def _read(where: str, name: str, value: Mapping[str, Any], wanted: str, read: Callable[[Any], T]) -> T:
    found = value.get(name, {})
    try:
        return read(found)
    except ConfigError as error:
        raise ConfigError(f"{where}, {name}: {error}") from None
    except (TypeError, AttributeError, ValueError):
        raise ConfigError(f"{where}, {name}: expected {wanted}, found {found!r}") from None


def _elastic(found: Any) -> dict[str, tuple[float, ...]]:
    return {str(name): _numbers(values) for name, values in found.items()}


def _numbers(found: Any) -> tuple[float, ...]:
    if isinstance(found, str) or not all(isinstance(item, int | float) for item in found):
        raise TypeError
    return tuple(found)


def _teacher_loss(found: Any) -> TeacherLoss:
    settings: dict[str, Any] = {name: value if name == "kind" else float(value) for name, value in found.items()}
    return TeacherLoss(**settings)


def _check_kind(where: str, name: str, found: Any, kind: str) -> None:
    """Refuse a setting of another type than the phase's field has."""
    accepted = {"int": int, "float": (int, float), "bool": bool, "str": str}[kind]
    if not isinstance(found, accepted) or (isinstance(found, bool) and kind != "bool"):
        wanted = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a word"}[kind]
        raise ConfigError(f"{where}, {name}: expected {wanted}, found {found!r}")
