"""The blocks that the subnets of a space are made of: which operators there are, and which a subnet has.

A space of 10^19 subnets has under a thousand distinct operators (a block of given sizes at a given input side). Which
one stands in a place of a subnet depends on few columns of its encoding; `OperatorIndex` finds out on which, and from
then on thousands of subnets are one table look-up.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import numpy as np

from fedofa.supernet.costs import CLASSIFIER, BlockCost, PlacedPart, place_parts
from fedofa.supernet.elastic import ElasticSupernet
from fedofa.supernet.network import BottleneckSpec, ConvSpec, MBConvSpec, NetworkSpec, PartSpec, PoolSpec
from fedofa.types.encoding import Encoding
from fedofa.types.errors import ConfigError, SpaceError
from fedofa.types.space import SearchSpace, SubnetConfig

NetworkOf = Callable[[SubnetConfig], NetworkSpec]

_ABSENT, _UNKNOWN = -1, -2
_BASES, _CHECKED = 6, 32
"""Random subnets that the columns are varied from, and that the finished index is checked on."""

_MOST_ENTRIES = 10_000_000
"""Combinations of choices that the index may hold over all places."""


@dataclass(frozen=True, slots=True)
class Operator:
    """A block of given sizes, wherever it stands.

    Args:
        part: the block, without names.
        in_channels, in_side, out_channels, out_side: of its input and its result.
        norm: "batch" or "group".
        saved_elements: values that autograd keeps (see `BlockCost`), which depends on what follows.
        key: names it in latency tables; operators that differ only in what autograd keeps share it.
    """

    part: PartSpec
    in_channels: int
    in_side: int
    out_channels: int
    out_side: int
    norm: str
    saved_elements: int
    key: str

    @property
    def input_elements(self) -> int:
        """Values of one example's input."""
        return self.in_channels * self.in_side**2

    @property
    def output_elements(self) -> int:
        """Values of one example's result."""
        return self.out_channels * self.out_side**2

    @property
    def is_classifier(self) -> bool:
        """Whether it is the linear layer at the end."""
        return self.key.startswith("linear")


def operator_of(placed: PlacedPart, norm: str) -> Operator:
    """The operator of a part where it stands."""
    part = placed.part
    sizes = (placed.in_channels, placed.in_side, placed.out_channels, placed.out_side)
    saved = placed.cost.saved_elements if placed.cost is not None else 0
    if isinstance(part, MBConvSpec | PoolSpec):
        nameless: PartSpec = replace(part, name="")
    else:
        nameless = replace(part, name="", in_group=None, out_group=None)
    return Operator(nameless, *sizes, norm, saved, _key(placed, norm))


def _key(placed: PlacedPart, norm: str) -> str:
    """`kind in=channels,side out=channels,side setting=value ...`."""
    part = placed.part
    where = f"in={placed.in_channels},{placed.in_side} out={placed.out_channels},{placed.out_side}"
    match part:
        case ConvSpec() if part.name == CLASSIFIER:
            return f"linear {where}"
        case ConvSpec():
            flags = f"dw={part.depthwise:d} bias={part.bias:d} res={part.residual:d} act={part.activation or 'none'}"
            return f"conv {where} k={part.kernel} s={part.stride} {flags} norm={_norm(part, norm)} pad={part.padding}"
        case MBConvSpec():
            sizes = f"mid={part.mid_channels} k={part.kernel} s={part.stride} se={part.squeeze_channels or 0}"
            flags = f"exp={part.expands:d} act={part.activation} norm={norm} pad={part.padding}"
            flags += " lite=1" if part.has_lite else ""
            return f"mbconv {where} {sizes} {flags}"
        case BottleneckSpec():
            sizes = f"mid={part.mid_channels} k={part.kernel} s={part.stride}"
            flags = f"down={part.downsamples:d} avg={part.averages:d} act={part.activation} norm={norm}"
            return f"bottleneck {where} {sizes} {flags} pad={part.padding}"
        case PoolSpec():
            return f"pool {where} kind={part.kind}"


def _norm(part: ConvSpec, norm: str) -> str:
    return norm if part.norm else "none"


@final
class OperatorIndex:
    """Which operator each place of a space's subnets has.

    Places are the parts of the largest subnet, in forward order.

    Args:
        space: the search space.
        network: describes a subnet.

    Attributes:
        operators: all operators of the space; their positions are their numbers.

    Raises:
        SpaceError: when a subnet has a part that the largest one has not, or a part's sizes depend on too much.
    """

    def __init__(self, space: SearchSpace, network: NetworkOf) -> None:
        self.encoding = Encoding(space)
        self.network = network
        self.places = tuple(placed.part.name for placed in place_parts(network(space.largest())))
        self.operators: list[Operator] = []
        self._numbers: dict[Operator, int] = {}
        self._costs: list[dict[int, BlockCost]] = [{} for _ in self.places]
        self._columns = self._dependencies()
        self._radix, self._offsets, size = self._layout()
        self._table = np.full(size, _UNKNOWN, np.int64)
        self._fill()
        self._check()

    @classmethod
    def of(cls, supernet: object) -> OperatorIndex:
        """The index of a supernet of blocks.

        Raises:
            ConfigError: for a supernet that is not described block by block.
        """
        if not isinstance(supernet, ElasticSupernet):
            raise ConfigError(
                "supernet: costs of operators need a family that is described block by block, found "
                f"{type(supernet).__name__}; choose another supernet"
            )
        return cls(supernet.space, supernet.network_spec)

    @cached_property
    def column_groups(self) -> tuple[tuple[int, ...], ...]:
        """The columns, those together that set the same places; all of a group stand in a subnet, or none."""
        groups: dict[tuple[object, ...], list[int]] = {}
        for column in range(self.encoding.num_columns):
            places = tuple(place for place, columns in enumerate(self._columns) if column in columns)
            key = (places, self.encoding.control_of(column)) if len(places) == 1 else (column,)
            groups.setdefault(key, []).append(column)
        return tuple(tuple(columns) for columns in groups.values())

    @cached_property
    def form_columns(self) -> tuple[int, ...]:
        """The columns that set more than one place or say which other columns there are: a subnet's form."""
        columns = range(self.encoding.num_columns)
        controls = {control[0] for column in columns if (control := self.encoding.control_of(column)) is not None}
        places = np.bincount([column for own in self._columns for column in own], minlength=len(columns))
        return tuple(column for column in columns if places[column] > 1 or column in controls)

    def look_up(self, rows: np.ndarray) -> np.ndarray:
        """The operators of subnets: numbers `(num_subnets, num_places)`, -1 where the subnet has no such part."""
        codes = ((rows + 1.0) @ self._radix).astype(np.int64) + self._offsets  # whole numbers below 2^53: exact
        numbers = self._table[codes]
        while (missing := np.nonzero((numbers == _UNKNOWN).any(axis=1))[0]).size:
            self._learn(rows[missing[0]])
            numbers[missing] = self._table[codes[missing]]
        return numbers

    def batch(self, subnets: Sequence[SubnetConfig]) -> SubnetBatch:
        """Subnets as cost models and predictors take them."""
        return SubnetBatch(self, self.encoding.rows(subnets))

    def place_table(self, value: Callable[[BlockCost], int]) -> np.ndarray:
        """A value of the costs of every operator in every place, int64 `(num_places, num_operators)`, else 0."""
        table = np.zeros((len(self.places), len(self.operators)), np.int64)
        for place, costs in enumerate(self._costs):
            for operator, cost in costs.items():
                table[place, operator] = value(cost)
        return table

    def operator_table(self, value: Callable[[BlockCost], int]) -> np.ndarray:
        """A value of every operator's cost that is the same in every place, int64 `(num_operators,)`."""
        return self.place_table(value).max(axis=0)

    def operators_in(self, place: int) -> list[int]:
        """The operators that a place may have, by number."""
        end = self._offsets[place + 1] if place + 1 < len(self.places) else len(self._table)
        numbers = np.unique(self._table[self._offsets[place] : end])
        return [int(number) for number in numbers if number >= 0]

    def costs_in(self, place: int) -> Iterable[tuple[int, BlockCost]]:
        """The operators of a place by number, and what each costs there, its parameters under their names."""
        return self._costs[place].items()

    def parameter_names(self, place: int) -> frozenset[str]:
        """The names of all parameters that a place may have."""
        return frozenset(item.name for cost in self._costs[place].values() for item in cost.parameters)

    def block_costs(self, row: np.ndarray) -> list[BlockCost]:
        """The blocks of one subnet, in forward order."""
        return [cost for _, cost in self._parts(row).values() if cost is not None]

    # -- building ----------------------------------------------------------------------------------------------------

    def _parts(self, row: np.ndarray) -> dict[str, tuple[Operator, BlockCost | None]]:
        spec = self.network(self.encoding.subnet(row))
        return {placed.part.name: (operator_of(placed, spec.norm), placed.cost) for placed in place_parts(spec)}

    def _dependencies(self) -> list[list[int]]:
        """For each place the columns that its operator depends on: those that change it when they alone are varied."""
        space, encoding = self.encoding.space, self.encoding
        random = encoding.sample(np.random.default_rng(0), _BASES)
        found: list[set[int]] = [set() for _ in self.places]
        for base in (*encoding.rows([space.largest(), space.smallest()]), *random):
            before = self._operators(base)
            for column, row in _variations(encoding, base):
                after = self._operators(row)
                for place, (one, other) in enumerate(zip(before, after, strict=True)):
                    if one != other:
                        found[place].add(column)
        return [sorted(columns) for columns in found]

    def _operators(self, row: np.ndarray) -> list[Operator | None]:
        parts = self._parts(row)
        unknown = sorted(set(parts) - set(self.places))
        if unknown:
            raise SpaceError(f"space {self.encoding.space.family!r}: the largest subnet lacks the parts {unknown}")
        return [parts[name][0] if name in parts else None for name in self.places]

    def _layout(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Mixed-radix weights `(num_columns, num_places)`, each place's offset in the table, the table's size."""
        radix = np.zeros((self.encoding.num_columns, len(self.places)))
        offsets = np.zeros(len(self.places), np.int64)
        size = 0
        for place, columns in enumerate(self._columns):
            offsets[place], weight = size, 1
            for column in columns:
                radix[column, place] = weight
                weight *= int(self.encoding.choices[column]) + 1
            size += weight
            if size > _MOST_ENTRIES:
                raise SpaceError(
                    f"space {self.encoding.space.family!r}: the operator of {self.places[place]!r} depends on "
                    f"{len(columns)} columns, which is more than can be tabulated; costs of operators need blocks "
                    "whose sizes few choices set"
                )
        return radix, offsets, size

    def _learn(self, row: np.ndarray) -> None:
        """Enter the operators of one subnet."""
        parts = self._parts(row)
        codes = ((row + 1.0) @ self._radix).astype(np.int64) + self._offsets
        for place, (name, code) in enumerate(zip(self.places, codes, strict=True)):
            if name not in parts:
                self._table[code] = _ABSENT
                continue
            operator, cost = parts[name]
            number = self._numbers.setdefault(operator, len(self.operators))
            if number == len(self.operators):
                self.operators.append(operator)
            self._table[code] = number
            if cost is not None:
                self._costs[place][number] = cost

    def _fill(self) -> None:
        """Enter every operator: first those of the subnets with one value an axis, which are most of them."""
        axes = self.encoding.space.axes
        for indices in itertools.product(*(range(len(axis.values)) for axis in axes)):
            row = np.concatenate(
                [np.full(len(axis.controls), index) for axis, index in zip(axes, indices, strict=True)]
            )
            self.look_up(self.encoding.normalised(np.minimum(row, self.encoding.choices - 1)[None]))
        for place in range(len(self.places)):
            self.look_up(self._combinations(place))

    def _combinations(self, place: int) -> np.ndarray:
        """Rows that together have every combination of the columns that a place depends on."""
        columns = self._columns[place]
        largest = self.encoding.rows([self.encoding.space.largest()])[0]
        rows = np.repeat(largest[None], int(np.prod(self.encoding.choices[columns], dtype=np.int64)), axis=0)
        for row, values in zip(
            rows, itertools.product(*(range(n) for n in self.encoding.choices[columns])), strict=True
        ):
            row[columns] = values
        return self.encoding.normalised(rows)

    def _check(self) -> None:
        """Compare the index with direct descriptions of random subnets."""
        rows = self.encoding.sample(np.random.default_rng(1), _CHECKED)
        for row, numbers in zip(rows, self.look_up(rows), strict=True):
            indexed = [self.operators[number] if number >= 0 else None for number in numbers]
            if indexed != self._operators(row):
                raise SpaceError(
                    f"space {self.encoding.space.family!r}: the operators of {self.encoding.subnet(row)} depend on "
                    "more columns than varying one column at a time shows"
                )


def _variations(encoding: Encoding, base: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Every row that differs from `base` in one column that it has."""
    for column in np.nonzero(base >= 0)[0]:
        for index in range(int(encoding.choices[column])):
            if index != base[column]:
                row = base.copy()
                row[column] = index
                yield int(column), encoding.normalised(row[None])[0]


@final
class SubnetBatch:
    """Many subnets with their operators, which are looked up once for all cost models.

    Args:
        index: of the space.
        rows: encoded and normalised, `(num_subnets, num_columns)`.
    """

    def __init__(self, index: OperatorIndex, rows: np.ndarray) -> None:
        self.index = index
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def operators(self) -> np.ndarray:
        """Numbers of operators, `(num_subnets, num_places)`; -1 where there is none."""
        return self.index.look_up(self.rows)

    @cached_property
    def _in_padded(self) -> np.ndarray:
        """Positions in a table of all places with a column more, for no operator, `(num_subnets, num_places)`."""
        width = len(self.index.operators) + 1
        places = np.arange(len(self.index.places)) * width
        return places + np.where(self.present, self.operators, width - 1)

    def total(self, table: np.ndarray) -> np.ndarray:
        """The sum of a value an operator over each subnet's operators, `(num_subnets,)`.

        Args:
            table: `(num_operators,)`.
        """
        return np.append(table, 0)[self.operators].sum(axis=1)

    def distinct(self, table: np.ndarray) -> np.ndarray:
        """The same sum, an operator that a subnet has several times counted once, `(num_subnets,)`."""
        numbers = np.sort(self.operators, axis=1)
        repeated = np.diff(numbers, axis=1, prepend=-2) == 0
        return np.where(repeated, 0, np.append(table, 0)[numbers]).sum(axis=1)

    def greatest(self, table: np.ndarray) -> np.ndarray:
        """The greatest value of each subnet's operators, `(num_subnets,)`."""
        return np.append(table, 0)[self.operators].max(axis=1)

    def in_places(self, table: np.ndarray) -> np.ndarray:
        """The entry of each subnet's operator in each place, 0 where there is none, `(num_subnets, num_places)`.

        Args:
            table: `(num_places, num_operators)`.
        """
        padded = np.concatenate([table, np.zeros((len(table), 1), table.dtype)], axis=1)
        return padded.ravel().take(self._in_padded)

    @cached_property
    def present(self) -> np.ndarray:
        """Where a subnet has a part, bool `(num_subnets, num_places)`."""
        return self.operators >= 0

    def counts(self) -> np.ndarray:
        """How often each subnet has each operator, float32 `(num_subnets, num_operators)`.

        Times a matrix of tables, `(num_operators, num_devices)`, it is what every subnet costs on every device.
        """
        counts = np.zeros((len(self), len(self.index.operators) + 1), np.float32)
        subnets = np.repeat(np.arange(len(self)), self.operators.shape[1])
        np.add.at(counts, (subnets, self.operators.ravel()), 1.0)
        return counts[:, :-1]
