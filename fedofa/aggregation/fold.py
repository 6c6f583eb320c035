"""The fold: deltas of unlike subnets become one change of the shared weights.

The folded change is the minimum-norm w that minimises sum_c n_c |A_c w - d_c|^2 over the clients c with n_c examples,
slice map A_c and delta d_c. For slices that is the mean over the clients that cover a coordinate, weighted by examples;
a client that trained the leading part of a weight covers no more than that part.
For elastic kernels, whose small sizes are linear images of the large one, it is one small least-squares problem a
channel and pattern of coverage. Sums are int64 fixed point: order and grouping of the deltas cannot change a bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from fedofa.aggregation.server_optimisers import ServerOptimiser
from fedofa.supernet.slices import PLAIN_VIEW, KernelTransform, SliceMap, truncate
from fedofa.supernet.sums import MAX_DELTAS, TensorSums
from fedofa.types.delta import SubnetDelta
from fedofa.types.errors import FoldError
from fedofa.types.space import SubnetConfig
from fedofa.types.state import SharedState

_RANK_TOLERANCE = 1e-12
"""Relative singular value below which a direction of a least-squares problem counts as unseen (float64 noise)."""


@dataclass(frozen=True, slots=True)
class FoldReport:
    """What a fold did.

    Args:
        num_deltas, num_examples: folded in total.
        covered_fraction: tensor name -> share of its coordinates that some client trained, where that is not 0.
        truncated: tensor name -> directions of badly conditioned kernel transforms that were not followed back.
        delta_norm: L2 norm of the folded change over all tensors.
    """

    num_deltas: int
    num_examples: int
    covered_fraction: Mapping[str, float]
    truncated: Mapping[str, int]
    delta_norm: float


@dataclass(slots=True)
class FoldSums:
    """Streaming sums of verified deltas; add each as it comes, drop it, and finish once.

    Args:
        slice_map: gives the slice map of a subnet, plain or parametrised, for the state that the deltas belong to.
    """

    slice_map: Callable[[SubnetConfig, bool], SliceMap]
    sums: dict[str, TensorSums] = field(default_factory=dict)
    transforms: dict[str, dict[str, KernelTransform]] = field(default_factory=dict)
    num_deltas: int = 0
    num_examples: int = 0

    def add(self, delta: SubnetDelta) -> None:
        """Add one client's delta, weighted by its examples; all of it or, on an error, nothing.

        A change of low rank is added as the product of its factors: what comes out is exactly the mean of the products,
        and not the product of the factors' means, which is another change. It may have a higher rank than each of them.

        Raises:
            FoldError: when it could overflow the fixed-point sums.
        """
        self._check_capacity(1)
        slices = self.slice_map(delta.subnet, delta.parametrised)
        products = {name: pair.product(slices[name].shape) for name, pair in delta.low_rank.items()}
        slices.accumulate(self.sums, {**delta.weights, **products}, delta.num_examples)
        for name in delta.weights:
            item = slices[name]
            if item.kernel is not None:
                self.transforms.setdefault(name, {})[item.view] = item.kernel
        self.num_deltas += 1
        self.num_examples += delta.num_examples

    def merge(self, other: FoldSums) -> None:
        """Add another part's sums, as if its deltas had been added here."""
        self._check_capacity(other.num_deltas)
        for name, sums in other.sums.items():
            self.sums.setdefault(name, TensorSums()).merge(sums)
        for name, transforms in other.transforms.items():
            self.transforms.setdefault(name, {}).update(transforms)
        self.num_deltas += other.num_deltas
        self.num_examples += other.num_examples

    def _check_capacity(self, more: int) -> None:
        if self.num_deltas + more > MAX_DELTAS:
            raise FoldError(
                f"a fold takes at most {MAX_DELTAS} deltas, found {self.num_deltas + more}; use smaller cohorts"
            )

    def finish(self, state: SharedState, optimiser: ServerOptimiser) -> tuple[SharedState, FoldReport]:
        """The next state and what was done; coordinates that no client trained keep every bit, moments included."""
        tensors = dict(state.tensors)
        moments = {kind: dict(arrays) for kind, arrays in state.moments.items()}
        covered_fraction: dict[str, float] = {}
        truncated: dict[str, int] = {}
        squared_norm = 0.0
        for name in sorted(self.sums):
            change, covered, lost = self._solve(name, state)
            tensors[name] = optimiser.step(name, state.tensors[name], change, covered, moments)
            covered_fraction[name] = float(np.broadcast_to(covered, change.shape).mean())
            squared_norm += float(np.square(change).sum())
            if lost:
                truncated[name] = lost
        report = FoldReport(
            self.num_deltas, self.num_examples, covered_fraction, truncated, float(np.sqrt(squared_norm))
        )
        return replace(state, version=state.version + 1, tensors=tensors, moments=moments), report

    def _solve(self, name: str, state: SharedState) -> tuple[np.ndarray, np.ndarray, int]:
        """The folded float64 change of one tensor, which coordinates it concerns, and truncated directions."""
        sums = self.sums[name]
        if set(sums.totals) == {PLAIN_VIEW}:
            covered = sums.counts[PLAIN_VIEW] > 0
            return sums.mean(PLAIN_VIEW), covered, 0
        operators = {view: item.operator(state.tensors) for view, item in self.transforms.get(name, {}).items()}
        return solve_kernels(sums, operators, state.tensors[name].shape)


def solve_kernels(
    sums: TensorSums, operators: Mapping[str, np.ndarray], shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, int]:
    """The minimum-norm least-squares change of an elastic depthwise kernel.

    Channels with the same example counts a kernel size share one pseudo-inverse. A parametrised delta is plain, but
    covers the centre of the kernel only.

    Args:
        sums: views "weight" `(channels, 1, k, k)` and one a small size `(channels, size^2)`.
        operators: view of a small size -> its transform `(size^2, k^2)`.
        shape: of the shared kernel, `(channels, 1, k, k)`.

    Returns:
        The change `(channels, 1, k, k)` in float64, a boolean mask of the coordinates it can move, and the number of
        directions that truncation left out.
    """
    channels, numel = shape[0], int(np.prod(shape[1:]))
    views = sorted(sums.totals)
    lost, blocks, spread = 0, {}, {}
    for view in views:
        if view == PLAIN_VIEW:
            blocks[view] = np.eye(numel)
        else:
            blocks[view], missing = truncate(operators[view])
            lost += missing
        counts = sums.counts[view].reshape(len(sums.counts[view]), -1)
        spread[view] = np.broadcast_to(counts, (channels, counts.shape[1]))
    means = {view: sums.mean(view).reshape(channels, -1) for view in views}
    change, covered = np.zeros((channels, numel)), np.zeros((channels, numel), bool)
    ends = np.cumsum([spread[view].shape[1] for view in views])[:-1]
    patterns, members = np.unique(np.concatenate([spread[view] for view in views], 1), axis=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        used = []
        for view, count in zip(views, np.split(pattern, ends), strict=True):
            counts = np.broadcast_to(count, len(blocks[view]))
            if (seen := np.flatnonzero(counts)).size:
                used.append((view, seen, np.sqrt(counts[seen].astype(np.float64))))
        if not used:
            continue
        rows = np.flatnonzero(members.ravel() == number)
        stacked = np.concatenate([root[:, None] * blocks[view][seen] for view, seen, root in used])
        target = np.concatenate([root * means[view][np.ix_(rows, seen)] for view, seen, root in used], axis=1)
        change[rows] = target @ np.linalg.pinv(stacked, rcond=_RANK_TOLERANCE).T
        covered[rows] = np.abs(stacked).max(axis=0) > 0
    return change.reshape(shape), covered.reshape(shape), lost
