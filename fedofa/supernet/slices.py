"""The slice map: the linear map A from shared weights to a subnet's, and its way back.

Most tensors of a subnet are slices of the shared ones (leading or gathered channels). A small depthwise kernel is not:
it is the large one's centre, sent through the learned transform matrices (Once-for-All, arXiv 1908.09791, section 3.2).
Both are linear, so one map serves extraction, folding and lifting.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch

from fedofa.supernet.network import ParameterSpec
from fedofa.supernet.sums import Index, TensorSums, check_term
from fedofa.types.errors import FoldError

T = TypeVar("T", bound=Any)  # numpy.ndarray or torch.Tensor

MAX_CONDITION = 1e3
"""Singular values of a kernel transform below 1/1000 of its largest are truncated on the way back."""

PLAIN_VIEW = "weight"


def matrix_name(depthwise: str, source: int, target: int) -> str:
    """Name of the `(target^2, target^2)` transform of one block, e.g. "stages.1.0.depthwise.matrix_7to5"."""
    return f"{depthwise}.matrix_{source}to{target}"


def centre(kernel: T, size: int) -> T:
    """The middle `(..., size, size)` of `(..., k, k)`."""
    start = (kernel.shape[-1] - size) // 2
    return kernel[..., start : start + size, start : start + size]


def gathered(tensor: Any, dim: int, positions: np.ndarray) -> Any:
    """The tensor's entries at these positions along a dimension, a copy; numpy and torch alike, differentiable."""
    if isinstance(tensor, np.ndarray):
        return tensor.take(positions, axis=dim)
    return tensor.index_select(dim, torch.from_numpy(positions).to(tensor.device))


@dataclass(frozen=True, slots=True)
class KernelTransform:
    """From the shared k x k depthwise kernel to a smaller one, step by step: centre, then times the step's matrix.

    Args:
        sizes: the kernel sizes passed through, largest first, e.g. (7, 5, 3).
        matrices: shared name of each step's matrix; one fewer than sizes.
    """

    sizes: tuple[int, ...]
    matrices: tuple[str, ...]

    @classmethod
    def between(cls, depthwise: str, sizes: Sequence[int], target: int) -> KernelTransform:
        """The steps from the largest of the elastic `sizes` down to `target`, for the block's depthwise convolution."""
        steps = tuple(size for size in sorted(sizes, reverse=True) if size >= target)
        names = tuple(matrix_name(depthwise, a, b) for a, b in itertools.pairwise(steps))
        return cls(steps, names)

    def apply(self, kernel: T, shared: Mapping[str, T]) -> T:
        """`(channels, 1, k, k)` to `(channels, 1, target, target)`; numpy and torch alike, differentiable."""
        for size, name in zip(self.sizes[1:], self.matrices, strict=True):
            flat = centre(kernel, size).reshape(-1, size * size)
            kernel = (flat @ shared[name].T).reshape(-1, 1, size, size)
        return kernel

    def operator(self, shared: Mapping[str, np.ndarray]) -> np.ndarray:
        """The transform as one float64 matrix K `(target^2, k^2)`: small = K @ large, on flattened kernels."""
        k = self.sizes[0]
        matrices = {name: shared[name].astype(np.float64) for name in self.matrices}
        basis = np.eye(k * k).reshape(-1, 1, k, k)
        return self.apply(basis, matrices).reshape(k * k, -1).T


def truncate(operator: np.ndarray) -> tuple[np.ndarray, int]:
    """The operator without its singular values below `1/MAX_CONDITION` of the largest, and how many those were."""
    u, s, vt = np.linalg.svd(operator, full_matrices=False)
    kept = s > s[0] / MAX_CONDITION
    if kept.all():
        return operator, 0
    return (u[:, kept] * s[kept]) @ vt[kept], int((~kept).sum())


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """Where one tensor of a subnet comes from: a shared tensor's index, then for small kernels a transform.

    `shape` is the subnet's, `shared_shape` the shared tensor's; the name is the same on both sides.
    """

    name: str
    shape: tuple[int, ...]
    shared_shape: tuple[int, ...]
    index: Index
    kernel: KernelTransform | None
    role: str
    _plain: tuple[slice, ...] | None = field(init=False, repr=False, compare=False)
    _gathers: tuple[tuple[int, np.ndarray], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Keep the index as extraction takes it: the slices at once, then the positions along each dimension."""
        plain = tuple(item if isinstance(item, slice) else slice(None) for item in self.index)
        gathers = tuple((dim, item) for dim, item in enumerate(self.index) if isinstance(item, np.ndarray))
        object.__setattr__(self, "_plain", plain if any(item != slice(None) for item in plain) else None)
        object.__setattr__(self, "_gathers", gathers)

    def extract(self, shared: Mapping[str, T]) -> T:
        """The subnet's tensor; a view of the shared one, or that itself, where the index and the transform allow it."""
        tensor = shared[self.name]
        if self._plain is not None:
            tensor = tensor[self._plain]
        for dim, positions in self._gathers:
            tensor = gathered(tensor, dim, positions)
        return tensor if self.kernel is None else self.kernel.apply(tensor, shared)

    @property
    def view(self) -> str:
        """The view of `TensorSums` that this tensor's deltas belong to."""
        return PLAIN_VIEW if self.kernel is None else str(self.shape[-1])

    def leading(self, shape: tuple[int, ...]) -> TensorSlice:
        """The slice of this tensor's first channels, as many along each dimension as the shape says; itself where all.

        Raises:
            FoldError: when the shape is no leading part of this tensor's.
        """
        if shape == self.shape:
            return self
        if (
            len(shape) != len(self.shape)
            or shape[2:] != self.shape[2:]
            or not all(0 < size <= whole for size, whole in zip(shape, self.shape, strict=True))
        ):
            raise FoldError(f"parameter {self.name!r}: expected a leading part of {self.shape}, found {shape}")
        index = tuple(
            item if size == whole else _first(item, size)
            for item, size, whole in zip(self.index, shape, self.shape, strict=True)
        )
        return replace(self, shape=shape, index=index)

    def accumulate(self, sums: TensorSums, delta: np.ndarray, weight: int) -> None:
        """Add `weight * delta` (in the subnet's shape) to the sums of the shared tensor, in place."""
        if self.kernel is None:
            sums.add(PLAIN_VIEW, self.shared_shape, self.index, delta, weight)
        else:
            channels, size = self.shared_shape[0], self.shape[-1]
            values = delta.reshape(len(delta), size * size)
            sums.add(self.view, (channels, size * size), (self.index[0], slice(None)), values, weight)

    def reach(self, shared: Mapping[str, np.ndarray]) -> np.ndarray:
        """Boolean mask over the shared tensor: the coordinates that a delta of this slice can change."""
        reached = np.zeros(self.shared_shape, bool)
        grid = np.ix_(*(np.arange(size)[item] for item, size in zip(self.index, self.shared_shape, strict=True)))
        seen = True
        if self.kernel is not None:
            seen = (np.abs(self.kernel.operator(shared)).max(axis=0) > 0).reshape(self.shared_shape[1:])
        reached[grid] = seen
        return reached

    def lift(self, delta: np.ndarray, shared: Mapping[str, np.ndarray]) -> np.ndarray:
        """The minimum-norm float64 change of the shared tensor of which this slice sees `delta`."""
        lifted = np.zeros(self.shared_shape)
        values = delta.astype(np.float64)
        if self.kernel is not None:
            operator, _ = truncate(self.kernel.operator(shared))
            values = values.reshape(len(delta), -1) @ np.linalg.pinv(operator).T
            values = values.reshape(len(delta), *self.shared_shape[1:])
        grid = np.ix_(*(np.arange(size)[item] for item, size in zip(self.index, self.shared_shape, strict=True)))
        lifted[grid] = values
        return lifted


class SliceMap:
    """All slices of one subnet, in the order of the subnet's parameter table."""

    def __init__(self, slices: Sequence[TensorSlice]) -> None:
        self.slices = {item.name: item for item in slices}

    def __iter__(self) -> Iterator[TensorSlice]:
        return iter(self.slices.values())

    def __getitem__(self, name: str) -> TensorSlice:
        return self.slices[name]

    def __contains__(self, name: str) -> bool:
        return name in self.slices

    @property
    def sources(self) -> Iterator[str]:
        """Names of the shared tensors that extraction reads."""
        for item in self:
            yield item.name
            if item.kernel is not None:
                yield from item.kernel.matrices

    @property
    def trainable(self) -> tuple[str, ...]:
        """Names of the subnet's parameters; batch-norm statistics are not among them."""
        return tuple(item.name for item in self if item.role != "statistic")

    def extract(self, shared: Mapping[str, T]) -> dict[str, T]:
        """A w: the subnet's tensors by name; numpy and torch alike, differentiable."""
        return {item.name: item.extract(shared) for item in self}

    def accumulate(self, sums: dict[str, TensorSums], delta: Mapping[str, np.ndarray], weight: int) -> None:
        """`sums += weight * A^T d` in place, kept apart by kernel size so that the fold can solve for w.

        Values in the shape of a tensor's leading part (see `TensorSlice.leading`) are added to that part alone. Nothing
        is added when any tensor is out of the fixed-point range.

        Raises:
            FoldError: naming the parameter.
        """
        places = {}
        for name, values in delta.items():
            check_term(name, values, weight)
            places[name] = self.slices[name].leading(values.shape)
        for name, values in delta.items():
            places[name].accumulate(sums.setdefault(name, TensorSums()), values, weight)

    def lift(self, delta: Mapping[str, np.ndarray], shared: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The minimum-norm w with A w = d for one client, by shared name, float64."""
        return {name: self.slices[name].lift(values, shared) for name, values in delta.items()}


def slice_tensor(
    item: ParameterSpec, shared: ParameterSpec, ordering: Mapping[str, np.ndarray], kernels: Sequence[int] = ()
) -> TensorSlice:
    """Where one tensor of a subnet lies in the shared one.

    Args:
        item: the subnet's tensor.
        shared: the largest network's tensor of the same name.
        ordering: channel group -> permutation, most important first; a group left out is in order.
        kernels: the elastic kernel sizes.
    """
    index = tuple(
        _dimension_index(ordering.get(group) if group else None, size, full)
        for group, size, full in zip(item.groups, item.shape, shared.shape, strict=True)
    )
    kernel = None
    if len(item.shape) == 4 and item.shape[-1] != shared.shape[-1]:
        sizes = [size for size in kernels if size <= shared.shape[-1]]
        kernel = KernelTransform.between(item.name.removesuffix(".conv.weight"), sizes, item.shape[-1])
        index = (*index[:2], slice(None), slice(None))
    return TensorSlice(item.name, item.shape, shared.shape, index, kernel, item.role)


def _first(item: slice | np.ndarray, count: int) -> slice | np.ndarray:
    """The first `count` positions of an index of consecutive or listed ones."""
    return item[:count] if isinstance(item, np.ndarray) else slice(item.start or 0, (item.start or 0) + count)


def _dimension_index(order: np.ndarray | None, size: int, full: int) -> slice | np.ndarray:
    if order is not None:
        return order[:size]
    return slice(None) if size == full else slice(0, size)
