"""Exact weighted sums of deltas: int64 fixed point, so that neither order nor grouping can change a bit."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fedofa.types.errors import FoldError

FRACTION_BITS = 30
"""Binary digits behind the point. A sum of n examples times a delta is kept to 2^-31; the mean to 2^-31 / n."""
MAX_DELTAS = 4096
"""Deltas that one sum may hold; each may use the same share of the 63 bits, whatever the others are."""
MAX_TERM = 2.0 ** (63 - FRACTION_BITS) / MAX_DELTAS
"""Bound of examples * |delta| for one delta: below 2,097,152."""

_SCALE = float(2**FRACTION_BITS)
_CHUNK = 1 << 16


Index = tuple[slice | np.ndarray, ...]
"""Where a subnet's tensor lies in the shared one: for each dimension a slice, or an array of distinct positions."""


def add_scaled(total: np.ndarray, index: Index, values: np.ndarray, weight: int) -> None:
    """`total[index] += round(values * weight * 2^30)`, in place; `total` int64, `values` in the indexed shape."""
    factor = np.float64(weight * _SCALE)
    if any(isinstance(item, np.ndarray) for item in index) or values.ndim == 0:
        total[_orthogonal(index, total.shape)] += np.rint(values * factor).astype(np.int64)
        return
    target = total[index]  # a view: large tensors go through in rows that stay in the cache
    rows = max(1, _CHUNK * len(values) // max(values.size, 1))
    for start in range(0, len(values), rows):
        part = slice(start, start + rows)
        scaled = values[part] * factor
        np.rint(scaled, out=scaled)
        np.add(target[part], scaled, out=target[part], dtype=np.int64, casting="unsafe")


def _orthogonal(index: Index, shape: tuple[int, ...]) -> tuple[slice | np.ndarray, ...]:
    """The index in numpy's terms: two or more arrays select the grid of their positions, not pairs."""
    if sum(isinstance(item, np.ndarray) for item in index) < 2:
        return index
    return np.ix_(*(np.arange(size)[item] for item, size in zip(index, shape, strict=True)))


@dataclass(slots=True)
class TensorSums:
    """Weighted sums for one shared tensor.

    A tensor is summed in one or more *views*: "weight" for plain slices, and one a kernel size ("3", "5") for elastic
    depthwise kernels, whose small sizes are linear images of the large kernel and not slices of it.

    Args:
        totals: view -> int64, examples * delta in fixed point, in the view's full shape.
        counts: view -> int64 examples that cover each element; 1 along every dimension that no subnet narrows.
    """

    totals: dict[str, np.ndarray] = field(default_factory=dict)
    counts: dict[str, np.ndarray] = field(default_factory=dict)

    def add(
        self,
        view: str,
        shape: tuple[int, ...],
        index: Index,
        values: np.ndarray,
        weight: int,
    ) -> None:
        """Add `weight * values` at `index` of the view of that full shape, and `weight` to what it covers."""
        if view not in self.totals:
            self.totals[view] = np.zeros(shape, np.int64)
            self.counts[view] = np.zeros((1,) * len(shape), np.int64)
        add_scaled(self.totals[view], index, values, weight)
        self._cover(view, shape, index, weight)

    def _cover(self, view: str, shape: tuple[int, ...], index: Index, weight: int) -> None:
        """Add the weight to the counts, which grow to full length along a dimension once somebody narrows it."""
        counts = self.counts[view]
        narrowed = [size != 1 and not _is_whole(item, size) for item, size in zip(index, shape, strict=True)]
        wanted = tuple(
            size if narrow else have for size, narrow, have in zip(shape, narrowed, counts.shape, strict=True)
        )
        if wanted != counts.shape:
            counts = self.counts[view] = np.broadcast_to(counts, wanted).copy()
        covered = tuple(slice(None) if have == 1 else item for item, have in zip(index, wanted, strict=True))
        counts[_orthogonal(covered, wanted)] += weight

    def merge(self, other: TensorSums) -> None:
        """Add another part's sums, as if its deltas had been added here."""
        for view, total in other.totals.items():
            if view not in self.totals:
                self.totals[view], self.counts[view] = total.copy(), other.counts[view].copy()
            else:
                self.totals[view] += total
                self.counts[view] = self.counts[view] + other.counts[view]

    def mean(self, view: str) -> np.ndarray:
        """The weighted mean in float64, zero where nobody covers."""
        counts = np.maximum(self.counts[view], 1)
        return self.totals[view].astype(np.float64) / (counts * _SCALE)


def _is_whole(item: slice | np.ndarray, size: int) -> bool:
    """Whether an index takes every element (an index array that long is a permutation)."""
    return len(item) == size if isinstance(item, np.ndarray) else item == slice(None)


def check_term(name: str, values: np.ndarray, weight: int) -> None:
    """Refuse a contribution that could overflow the sum, before anything is added.

    Raises:
        FoldError: when the weight is below 1, or `weight * max|values|` is above `MAX_TERM` or not finite.
    """
    if weight < 1:
        raise FoldError(
            f"parameter {name!r}: a weight of {weight} examples; expected at least 1; the delta is left out"
        )
    largest = max(float(values.max(initial=0.0)), -float(values.min(initial=0.0))) * weight
    if not largest < MAX_TERM:
        raise FoldError(
            f"parameter {name!r}: examples * |delta| reaches {largest:.6g}, more than the fixed-point sum takes from a "
            f"client ({MAX_TERM:.6g}); the delta is left out. Clip the client's update or lower its example count"
        )
