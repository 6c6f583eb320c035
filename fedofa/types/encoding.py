"""Many subnets as one integer matrix, a row each: what searches and predictors compute on. No torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedofa.types.space import INACTIVE, Axis, Control, SearchSpace, SubnetConfig


class Encoding:
    """The columns of a space: one a position of every axis, in the order of `SubnetConfig.choices`.

    A row holds indices into the axes' values, `INACTIVE` where the subnet has no such position. Rows are int16,
    `(num_subnets, num_columns)`.

    Attributes:
        choices: `(num_columns,)`, how many values each column may take.
        names: of the columns, for people ("kernel[3]").
        feature_starts: the first one-hot feature of every column, `(num_columns,)`.
    """

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        columns = [(axis, position) for axis in space.axes for position in range(len(axis.controls))]
        self.names = tuple(f"{axis.name}[{position}]" for axis, position in columns)
        self.choices = np.array([len(axis.choices(position)) for axis, position in columns], np.int16)
        self._starts = _starts(space.axes)
        self._controls = [
            (column, *self._parent(control))
            for column, (axis, position) in enumerate(columns)
            if (control := axis.controls[position]) is not None
        ]
        self.feature_starts = _feature_starts(columns)
        self.num_features = sum(len(axis.values) * len(axis.controls) for axis in space.axes)

    def _parent(self, control: Control) -> tuple[int, int]:
        """The column that controls a position, and the smallest index at which the position exists."""
        values = np.array(self.space.axis(control.axis).values)
        return self._starts[control.axis] + control.position, int(np.searchsorted(values, control.minimum))

    @property
    def num_columns(self) -> int:
        """Positions of all axes."""
        return len(self.choices)

    def rows(self, subnets: Sequence[SubnetConfig]) -> np.ndarray:
        """The rows of subnets, each of which is checked.

        Raises:
            SpaceError: when a subnet is not of this space.
        """
        for subnet in subnets:
            self.space.check(subnet)
        flat = [[index for _, row in subnet.choices for index in row] for subnet in subnets]
        return np.array(flat, np.int16).reshape(len(subnets), self.num_columns)

    def subnet(self, row: np.ndarray) -> SubnetConfig:
        """The configuration of one row, which must be normalised."""
        indices = [int(index) for index in row]
        rows = tuple(
            (axis.name, tuple(indices[start : start + len(axis.controls)]))
            for axis, start in zip(self.space.axes, self._starts.values(), strict=True)
        )
        return SubnetConfig(self.space.family, rows)

    def normalised(self, rows: np.ndarray) -> np.ndarray:
        """A copy with `INACTIVE` where the subnet has no position; a position that appears takes its smallest value."""
        rows = np.maximum(rows, 0).astype(np.int16)
        for column, parent, minimum in self._controls:
            rows[rows[:, parent] < minimum, column] = INACTIVE
        return rows

    def control_of(self, column: int) -> tuple[int, int] | None:
        """The column that says whether a subnet has this one, and from which value on it does; None: it always has."""
        return next(((parent, minimum) for own, parent, minimum in self._controls if own == column), None)

    def sample(self, rng: np.random.Generator, num_subnets: int) -> np.ndarray:
        """Rows with every position drawn uniformly and independently, as `SearchSpace.sample` does."""
        return self.normalised(rng.integers(self.choices, size=(num_subnets, self.num_columns)))

    def one_hot(self, rows: np.ndarray) -> np.ndarray:
        """What `SearchSpace.encode` gives, a row a subnet: float32 `(num_subnets, num_features)`."""
        width = self.num_features + 1  # the last takes what has no position
        places = np.where(rows != INACTIVE, self.feature_starts + rows, self.num_features)
        features = np.zeros((len(rows), width), np.float32)
        features.ravel()[np.arange(len(rows))[:, None] * width + places] = 1.0
        return features[:, :-1]


def _starts(axes: Sequence[Axis]) -> dict[str, int]:
    """Axis name -> its first column."""
    starts, start = {}, 0
    for axis in axes:
        starts[axis.name] = start
        start += len(axis.controls)
    return starts


def _feature_starts(columns: Sequence[tuple[Axis, int]]) -> np.ndarray:
    """The first one-hot feature of every column."""
    widths = [len(axis.values) for axis, _ in columns]
    return np.concatenate([[0], np.cumsum(widths)[:-1]]).astype(np.int64) if widths else np.zeros(0, np.int64)
