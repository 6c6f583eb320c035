"""The search space of a supernet and the configurations in it: which values each axis may take, and where."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from fedofa.types.errors import SpaceError

INACTIVE = -1
"""The normalised index of a position that the subnet does not have (a block beyond its stage's depth)."""


@dataclass(frozen=True, slots=True)
class SubnetConfig:
    """One architecture: for every axis the index of the chosen value at each position.

    A value, never the state of a supernet. Canonical: positions that the subnet does not have hold `INACTIVE`, so that
    equal networks are equal configurations. Made by a `SearchSpace`, which knows the axes.
    """

    family: str
    choices: tuple[tuple[str, tuple[int, ...]], ...]

    def __getitem__(self, axis: str) -> tuple[int, ...]:
        for name, indices in self.choices:
            if name == axis:
                return indices
        raise SpaceError(f"subnet of family {self.family!r} has no axis {axis!r}; its axes: {self._axis_names()}")

    def _axis_names(self) -> str:
        return ", ".join(name for name, _ in self.choices)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` turns back into an equal configuration."""
        return {"family": self.family, "choices": {name: list(indices) for name, indices in self.choices}}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> SubnetConfig:
        """Rebuild a configuration from `to_json`; a `SearchSpace` still has to accept it (`SearchSpace.check`).

        Raises:
            SpaceError: when it is none.
        """
        known = value if isinstance(value, Mapping) else {}
        family, choices = known.get("family"), known.get("choices")
        if (
            not isinstance(family, str)
            or not isinstance(choices, Mapping)
            or not all(isinstance(name, str) and _are_indices(row) for name, row in choices.items())
        ):
            raise SpaceError(
                "not a subnet configuration: expected an object with 'family', a string, and 'choices', an object of "
                f"lists of whole numbers, found {value!r:.200}"
            )
        return cls(family, tuple((name, tuple(row)) for name, row in choices.items()))

    @classmethod
    def from_ofa(cls, architecture: Mapping[str, Any], family: str) -> SubnetConfig:
        """The configuration that a dictionary of the package `ofa` describes, `{"ks": [...], "e": [...], "d": [...]}`.

        See `fedofa.types.ofa`, which has the keys of each family.
        """
        from fedofa.types.ofa import from_ofa

        return from_ofa(architecture, family)

    def to_ofa(self) -> dict[str, list[float]]:
        """The inverse of `from_ofa`, for a configuration of a published space."""
        from fedofa.types.ofa import to_ofa

        return to_ofa(self)

    def digest(self) -> str:
        """16 hex digits over the normalised indices: the same on every machine."""
        text = json.dumps([self.family, self.choices], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _are_indices(row: Any) -> bool:
    return isinstance(row, list | tuple) and all(type(index) is int for index in row)


@dataclass(frozen=True, slots=True)
class Control:
    """A position exists only where `axis` at `position` chose a value of at least `minimum`."""

    axis: str
    position: int
    minimum: float


@dataclass(frozen=True, slots=True)
class Axis:
    """One kind of choice.

    Args:
        name: what is chosen ("kernel", "depth", ...).
        values: the allowed values in ascending order.
        controls: one entry a position; None where the position always exists.
        is_input: True for what changes the input rather than the network (resolution); not counted as a subnet.
        limits: for each position how many of the values, from the smallest on, it may take (a stage of two blocks is
            never deeper); empty where every position may take all.
        starts: for each position the number of the first value that it may take; empty where it is 0 everywhere.
    """

    name: str
    values: tuple[float, ...]
    controls: tuple[Control | None, ...]
    is_input: bool = False
    limits: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()

    @classmethod
    def free(cls, name: str, values: Sequence[float], positions: int, *, is_input: bool = False) -> Axis:
        """An axis all of whose positions always exist."""
        return cls(name, tuple(values), (None,) * positions, is_input)

    def __post_init__(self) -> None:
        if not self.values or list(self.values) != sorted(set(self.values)):
            raise SpaceError(f"axis {self.name!r}: values must be distinct and ascending, found {list(self.values)}")
        most = len(self.values)
        if self.limits and not (len(self.limits) == len(self.controls) and all(1 <= n <= most for n in self.limits)):
            raise SpaceError(
                f"axis {self.name!r}: expected {len(self.controls)} limits from 1 to {most}, found {list(self.limits)}"
            )
        if self.starts and not (len(self.starts) == len(self.controls) and all(map(self.indices, self._positions))):
            raise SpaceError(
                f"axis {self.name!r}: expected {len(self.controls)} starts below the limits, found {list(self.starts)}"
            )

    @property
    def _positions(self) -> range:
        return range(len(self.controls))

    def indices(self, position: int) -> range:
        """The numbers of the values that the position may take."""
        start = self.starts[position] if self.starts else 0
        return range(start, self.limits[position] if self.limits else len(self.values))

    def choices(self, position: int) -> tuple[float, ...]:
        """The values that the position may take, ascending."""
        allowed = self.indices(position)
        return self.values[allowed.start : allowed.stop]

    def nearest(self, value: float, position: int) -> float:
        """An allowed value of the axis, or the nearest that the position may take."""
        choices = self.choices(position)
        return min(max(value, choices[0]), choices[-1]) if value in self.values else value


class SearchSpace:
    """All subnets of one family: axes, their values, and which positions exist when.

    Args:
        family: the name every configuration of this space carries.
        axes: in order; the axis that controls a position comes before the axis of that position.
    """

    def __init__(self, family: str, axes: Sequence[Axis]) -> None:
        self.family = family
        self.axes = tuple(axes)
        self._by_name = {axis.name: axis for axis in self.axes}

    def axis(self, name: str) -> Axis:
        """The axis of that name, or a `SpaceError` that lists the names."""
        if name not in self._by_name:
            close = difflib.get_close_matches(name, self._by_name, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise SpaceError(f"space {self.family!r} has no axis {name!r}; it has {', '.join(self._by_name)}{hint}")
        return self._by_name[name]

    # -- making configurations ---------------------------------------------------------------------------------------

    def subnet(self, **values: float | Sequence[float] | np.ndarray) -> SubnetConfig:
        """The subnet with these values; a scalar stands for every position, an axis left out takes its largest value.

        A position that may not take a scalar, since it has fewer values, takes its own largest.

        Raises:
            SpaceError: naming axis, position and allowed values.
        """
        indices: dict[str, list[int]] = {}
        for name in values:
            self.axis(name)
        for axis in self.axes:
            given = values.get(axis.name, axis.values[-1])
            given = given.tolist() if isinstance(given, np.ndarray) else given
            positions = range(len(axis.controls))
            row = list(given) if isinstance(given, Sequence) else [axis.nearest(given, p) for p in positions]
            if len(row) != len(axis.controls):
                raise SpaceError(
                    f"space {self.family!r}, axis {axis.name!r}: expected {len(axis.controls)} values "
                    f"(one a position) or a single one, found {len(row)}"
                )
            indices[axis.name] = [self._index(axis, position, value) for position, value in enumerate(row)]
        return self._normalised(indices)

    def _index(self, axis: Axis, position: int, value: float) -> int:
        if getattr(value, "ndim", 0) or value not in axis.choices(position):
            raise SpaceError(
                f"space {self.family!r}, axis {axis.name!r}, position {position}: {value!r} is not allowed; "
                f"allowed values: {list(axis.choices(position))}"
            )
        return axis.values.index(value)

    def _normalised(self, indices: Mapping[str, Sequence[int]]) -> SubnetConfig:
        rows: dict[str, tuple[int, ...]] = {}
        for axis in self.axes:
            rows[axis.name] = tuple(
                index if self._is_active(control, rows) else INACTIVE
                for index, control in zip(indices[axis.name], axis.controls, strict=True)
            )
        return SubnetConfig(self.family, tuple(rows.items()))

    def _is_active(self, control: Control | None, rows: Mapping[str, Sequence[int]]) -> bool:
        if control is None:
            return True
        index = rows[control.axis][control.position]
        return index != INACTIVE and self.axis(control.axis).values[index] >= control.minimum

    def largest(self) -> SubnetConfig:
        """Every axis at its largest value."""
        return self.subnet()

    def smallest(self) -> SubnetConfig:
        """Every axis at its smallest value."""
        return self.subnet(**{axis.name: axis.values[0] for axis in self.axes})

    def sample(self, rng: np.random.Generator) -> SubnetConfig:
        """Every position drawn uniformly and independently, as Once-for-All samples subnets."""
        return self._normalised(
            {
                axis.name: rng.integers(
                    axis.starts or 0, axis.limits or len(axis.values), size=len(axis.controls)
                ).tolist()
                for axis in self.axes
            }
        )

    def neighbours(self, subnet: SubnetConfig, rng: np.random.Generator) -> Iterator[SubnetConfig]:
        """Every subnet one step of one position away, in random order; positions that appear start at the smallest."""
        self.check(subnet)
        moves = [
            (axis, position, index + step)
            for axis in self.axes
            for position, index in enumerate(subnet[axis.name])
            for step in (-1, 1)
            if index != INACTIVE and index + step in axis.indices(position)
        ]
        for move in rng.permutation(len(moves)):
            axis, position, index = moves[move]
            rows = {item.name: [max(i, item.indices(p).start) for p, i in enumerate(subnet[item.name])]
                    for item in self.axes}  # fmt: skip
            rows[axis.name][position] = index
            yield self._normalised(rows)

    # -- reading configurations --------------------------------------------------------------------------------------

    def values(self, subnet: SubnetConfig, axis: str) -> tuple[float | None, ...]:
        """The chosen value at each position of `axis`; None where the subnet has no such position."""
        values = self.axis(axis).values
        return tuple(None if index == INACTIVE else values[index] for index in subnet[axis])

    def contains(self, subnet: SubnetConfig) -> bool:
        """Whether `check` would accept the configuration."""
        try:
            self.check(subnet)
        except SpaceError:
            return False
        return True

    def check(self, subnet: SubnetConfig) -> None:
        """Refuse a configuration that is not of this space or not canonical.

        Raises:
            SpaceError: naming axis, position, what was found and what is allowed.
        """
        if subnet.family != self.family:
            raise SpaceError(f"subnet of family {subnet.family!r} used with the space of {self.family!r}")
        expected = [axis.name for axis in self.axes]
        if [name for name, _ in subnet.choices] != expected:
            found = subnet._axis_names()
            raise SpaceError(f"space {self.family!r}: expected the axes {expected} in this order, found [{found}]")
        rows = dict(subnet.choices)
        for axis in self.axes:
            self._check_row(axis, rows)

    def _check_row(self, axis: Axis, rows: Mapping[str, tuple[int, ...]]) -> None:
        where = f"space {self.family!r}, axis {axis.name!r}"
        row = rows[axis.name]
        if len(row) != len(axis.controls):
            raise SpaceError(f"{where}: expected {len(axis.controls)} positions, found {len(row)}")
        for position, (index, control) in enumerate(zip(row, axis.controls, strict=True)):
            active = self._is_active(control, rows)
            allowed = axis.indices(position)
            if active and index not in allowed:
                raise SpaceError(
                    f"{where}, position {position}: index {index} is not allowed; "
                    f"allowed are {allowed.start} to {allowed.stop - 1}, the values {list(axis.choices(position))}"
                )
            if not active and index != INACTIVE:
                raise SpaceError(
                    f"{where}, position {position}: the subnet does not have this position, so its index must be "
                    f"{INACTIVE}, found {index}"
                )

    def encode(self, subnet: SubnetConfig) -> np.ndarray:
        """One-hot features, float32 `(num_features,)`; an absent position is all zeros. For predictors."""
        self.check(subnet)
        parts = []
        for axis in self.axes:
            one_hot = np.zeros((len(axis.controls), len(axis.values)), np.float32)
            for position, index in enumerate(subnet[axis.name]):
                if index != INACTIVE:
                    one_hot[position, index] = 1.0
            parts.append(one_hot.ravel())
        return np.concatenate(parts)

    # -- counting ----------------------------------------------------------------------------------------------------

    def count(self) -> int:
        """The exact number of distinct subnets; input axes are not counted."""
        total = 1
        for axis in self.axes:
            for position, control in enumerate(axis.controls):
                if control is None and not axis.is_input:
                    total *= self._count_below(axis, position)
        return total

    def _count_below(self, axis: Axis, position: int) -> int:
        """Choices at one position times those at the positions that it controls, summed over its values."""
        children = self._children.get((axis.name, position), ())
        total = 0
        for value in axis.choices(position):
            product = 1
            for child, child_position, minimum in children:
                if value >= minimum:
                    product *= self._count_below(child, child_position)
            total += product
        return total

    @cached_property
    def _children(self) -> dict[tuple[str, int], list[tuple[Axis, int, float]]]:
        children: dict[tuple[str, int], list[tuple[Axis, int, float]]] = {}
        for axis in self.axes:
            for position, control in enumerate(axis.controls):
                if control is not None:
                    key = (control.axis, control.position)
                    children.setdefault(key, []).append((axis, position, control.minimum))
        return children
