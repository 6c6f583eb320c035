"""What every supernet is: shared weights, a search space, and subnets that are functions of both."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NoReturn, final

import numpy as np
import torch
from torch import Tensor, nn

from fedofa.supernet.costs import BlockCost
from fedofa.supernet.network import ParameterSpec
from fedofa.supernet.parametrised import parametrise, parametrised_costs, parametrised_slices
from fedofa.supernet.slices import SliceMap, TensorSlice, slice_tensor
from fedofa.supernet.views import view_arrays
from fedofa.supernet.weights_file import checked_normalisation, listed
from fedofa.types.errors import CheckpointError, SpaceError
from fedofa.types.space import SearchSpace, SubnetConfig
from fedofa.types.state import SharedState

_ALIGNMENT_BYTES = 64
_KEPT_SLICE_MAPS = 256
"""Maps of the last so many subnets are kept: training meets a new one every step, a fleet the same ones every round."""

_SHOWN = 5
"""Tensors that an error describes of those that are wrong."""


def refuse_tensors(shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> NoReturn:
    """Say with a `SpaceError` how tensors differ from those of a subnet, whose names and shapes are given."""
    missing, left = sorted(shapes.keys() - set(tensors)), sorted(set(tensors) - shapes.keys())
    if missing:
        raise SpaceError(f"the subnet needs the tensor {missing[0]!r}, which was not given")
    if left:
        raise SpaceError(f"the subnet has no tensors {left[:_SHOWN]} ({len(left)} in all)")
    wrong = [
        f"{name}: expected shape {shape}, found {tuple(tensors[name].shape)}"
        for name, shape in shapes.items()
        if tensors[name].shape != shape
    ]
    raise SpaceError(f"the tensors are another subnet's: {listed(wrong, _SHOWN)}; give those cut out for this one")


def fill_skeleton(skeleton: nn.Module, tensors: Mapping[str, Tensor], *, frozen: bool = False) -> nn.Module:
    """Put tensors into a skeleton, which becomes an ordinary module that owns them.

    Args:
        skeleton: any subnet's, on the meta device.
        tensors: its parameters and buffers by name.
        frozen: evaluation mode, and parameters that ask for no gradients.

    Raises:
        SpaceError: when the names and shapes are not exactly the skeleton's.
    """
    homes = [
        (f"{prefix}.{name}" if prefix else name, own, name, current)
        for prefix, module in skeleton.named_modules()
        for own in (module._parameters, module._buffers)
        for name, current in own.items()
        if current is not None
    ]
    shapes = {full: tuple(current.shape) for full, _, _, current in homes}
    if shapes != {name: tuple(tensor.shape) for name, tensor in tensors.items()}:
        refuse_tensors(shapes, tensors)
    for full, own, name, current in homes:
        held: dict[str, Any] = own
        held[name] = nn.Parameter(tensors[full], not frozen) if isinstance(current, nn.Parameter) else tensors[full]
    return skeleton.eval() if frozen else skeleton


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python's garbage collector rests: a module is thousands of new objects, none of them garbage.

    Making a large one would set off the collector several times, each time over objects that stay.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _side_by_side(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """The arrays copied into one piece of memory, in order and C order, each aligned as torch aligns its own.

    One piece costs one allocation, and numpy asks the system for huge pages where it is large.
    """
    offsets, end = [], 0
    for array in arrays.values():
        offsets.append(end)
        end += -(-array.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    memory = np.empty(end + _ALIGNMENT_BYTES, np.uint8)
    start = -memory.__array_interface__["data"][0] % _ALIGNMENT_BYTES
    tensors = {}
    for (name, array), offset in zip(arrays.items(), offsets, strict=True):
        own = np.ndarray(array.shape, array.dtype, memory, start + offset)
        own[...] = array
        tensors[name] = torch.from_numpy(own)
    return tensors


def _as_array(value: np.ndarray | Tensor) -> np.ndarray:
    """A tensor as numpy sees it, without a copy where it lies in the CPU's memory."""
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else value


def _normalisation(value: Any) -> dict[str, list[float]] | None:
    return None if value is None else checked_normalisation(value, "a supernet's normalisation")


def _as_permutation(order: Any, size: int) -> np.ndarray | None:
    """A copy of the order, int64 in C order; None where it is no permutation of that many channels."""
    try:
        found = np.asarray(order)
    except ValueError:  # rows of unlike lengths
        return None
    if found.dtype.kind not in "iu" or found.shape != (size,) or not np.array_equal(np.sort(found), np.arange(size)):
        return None
    return found.astype(np.int64, order="C")


def _shape(shape: tuple[int, ...] | None) -> str:
    return "no such tensor" if shape is None else f"shape {shape}"


class Supernet(nn.Module, ABC):
    """Shared weights from which any subnet of `space` can be cut.

    There are no elastic layers: a subnet is a plain skeleton, fed with tensors that its slice map extracts.

    Args:
        space: the search space.
        network: the largest network, which holds the shared weights under their shared names.
        kernels: the elastic depthwise kernel sizes, empty where kernels are not elastic.

    Attributes:
        normalisation: per-channel "mean" and "std" (of pixels scaled to [0, 1]) that the weights were trained with and
            inputs must be normalised by; None where the data's own serve.
    """

    def __init__(self, space: SearchSpace, network: nn.Module, kernels: Sequence[int] = ()) -> None:
        super().__init__()
        self.space = space
        self.network = network
        self.kernels = tuple(kernels)
        self.ordering: dict[str, np.ndarray] = {}
        self.normalisation: dict[str, list[float]] | None = None
        self._slice_maps: dict[tuple[SubnetConfig, bool], SliceMap] = {}
        self._slices: dict[tuple[str, tuple[int, ...]], TensorSlice] = {}  # by name and shape: subnets have many alike

    @cached_property
    def _largest(self) -> dict[str, ParameterSpec]:
        return {item.name: item for item in self.parameter_table(self.space.largest())}

    @abstractmethod
    def skeleton(self, subnet: SubnetConfig) -> nn.Module:
        """Plain torch layers on the meta device: shapes and names, no weights."""

    @abstractmethod
    def assemble(self, subnet: SubnetConfig, tensors: Mapping[str, Tensor], *, frozen: bool = False) -> nn.Module:
        """The subnet as an ordinary module that owns these tensors.

        Args:
            subnet: of this space.
            tensors: its parameters and buffers by name.
            frozen: evaluation mode, and parameters that ask for no gradients.

        Raises:
            SpaceError: when the names and shapes are not exactly the subnet's.
        """

    @abstractmethod
    def parameter_table(self, subnet: SubnetConfig) -> tuple[ParameterSpec, ...]:
        """The subnet's tensors, in the order of its forward pass."""

    @abstractmethod
    def block_costs(self, subnet: SubnetConfig) -> tuple[BlockCost, ...]:
        """What each block of the subnet costs for one example at the subnet's resolution, in forward order."""

    @abstractmethod
    def resolution(self, subnet: SubnetConfig) -> int | None:
        """Side in pixels of the square input, or None where the images are taken as they are."""

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """A JSON object from which `families.build_supernet` makes a supernet of the same space."""

    @final
    def shared(self) -> dict[str, Tensor]:
        """The shared tensors by name: parameters, kernel matrices and batch-norm statistics (not copies)."""
        return {name: owner[leaf] for name, owner, leaf in self._homes}

    @cached_property
    def _homes(self) -> list[tuple[str, dict[str, Any], str]]:
        """Where the network's modules keep each shared tensor: name, dictionary, key; parameters first."""
        modules = list(self.network.named_modules())
        return [
            (f"{prefix}.{leaf}" if prefix else leaf, owner, leaf)
            for kind in ("_parameters", "_buffers")
            for prefix, module in modules
            for owner in (getattr(module, kind),)
            for leaf, tensor in owner.items()
            if tensor is not None
        ]

    @final
    def slice_map(self, subnet: SubnetConfig, parametrised: bool = False) -> SliceMap:
        """The linear map from the shared weights to this subnet's.

        Args:
            parametrised: with what small kernels are composed of in their place (see `parametrised`).

        Raises:
            SpaceError: when the subnet is not of this space.
        """
        key = (subnet, parametrised)
        if key not in self._slice_maps:
            made = parametrised_slices(self.slice_map(subnet)) if parametrised else self._plain_slice_map(subnet)
            if len(self._slice_maps) >= _KEPT_SLICE_MAPS:
                self._slice_maps.pop(next(iter(self._slice_maps)))
            self._slice_maps[key] = made
        return self._slice_maps[key]

    def _plain_slice_map(self, subnet: SubnetConfig) -> SliceMap:
        self.space.check(subnet)
        return SliceMap([self._slice(item) for item in self.parameter_table(subnet)])

    @final
    def structure(self, subnet: SubnetConfig, parametrised: bool = False) -> nn.Module:
        """The skeleton of what `slice_map` with the same arguments extracts."""
        skeleton = self.skeleton(subnet)
        return parametrise(skeleton, self.slice_map(subnet)) if parametrised else skeleton

    @final
    def costs(self, subnet: SubnetConfig, parametrised: bool = False) -> tuple[BlockCost, ...]:
        """What each block of `structure` with the same arguments costs for one example, in forward order."""
        blocks = self.block_costs(subnet)
        return parametrised_costs(blocks, self._slice) if parametrised else blocks

    def _slice(self, item: ParameterSpec) -> TensorSlice:
        key = (item.name, item.shape)
        if key not in self._slices:
            self._slices[key] = slice_tensor(item, self._largest[item.name], self.ordering, self.kernels)
        return self._slices[key]

    @final
    def cut(self, subnet: SubnetConfig, shared: Mapping[str, np.ndarray | Tensor] | None = None) -> dict[str, Tensor]:
        """The subnet's tensors as copies in the CPU's memory, one after the other in one piece of it.

        Args:
            subnet: what to cut out.
            shared: shared tensors by name, as numpy arrays or torch tensors; by default this supernet's own.

        Raises:
            CheckpointError: when this supernet is structure only and no shared tensors are given.
        """
        slices = self.slice_map(subnet)
        source = self.require_weights() if shared is None else shared
        return _side_by_side(slices.extract({name: _as_array(source[name]) for name in slices.sources}))

    @final
    def build(self, subnet: SubnetConfig, shared: Mapping[str, np.ndarray | Tensor] | None = None) -> nn.Module:
        """The subnet as a module with weights of its own (see `cut`)."""
        tensors = self.cut(subnet, shared)  # checks the subnet
        with _no_collection():
            return self.assemble(subnet, tensors)

    @final
    def attach(self, subnet: SubnetConfig, arrays: Mapping[str, np.ndarray]) -> nn.Module:
        """The subnet as a module in evaluation mode that runs on arrays as they lie: nothing is copied.

        For what runs and is not trained: its parameters ask for no gradients, and whoever writes to them writes to the
        arrays, also to read-only ones (a packed buffer's, the server's state).

        Args:
            subnet: whose tensors the arrays are.
            arrays: the subnet's tensors by name.

        Raises:
            SpaceError: when the subnet is not of this space, or the names and shapes are not exactly its own.
        """
        self.space.check(subnet)
        with _no_collection():
            return self.assemble(subnet, view_arrays(arrays), frozen=True)

    @final
    def forward(self, x: Tensor, subnet: SubnetConfig) -> Tensor:
        """Logits of one subnet, `(batch, num_classes)`, differentiable with respect to the shared weights.

        Batch-norm statistics are read, never written: training mode uses the batch's own and leaves the shared ones.
        Structure only gives the shape of the logits for images on the meta device, and takes no others.
        """
        slices = self.slice_map(subnet)
        tensors = slices.extract(self.shared() if x.is_meta else self.require_weights())
        own = {name: tensor.clone() if slices[name].role == "statistic" else tensor for name, tensor in tensors.items()}
        skeleton = self.skeleton(subnet).train(self.training)
        return torch.func.functional_call(skeleton, own, (x,))

    @final
    def set_ordering(self, ordering: Mapping[str, np.ndarray]) -> None:
        """Choose the channel ordering that narrower subnets gather by; the arrays are copied.

        Raises:
            SpaceError: for an unknown group, or an array that is not a permutation of its channels.
        """
        self.ordering = self._checked_ordering(ordering)
        self._slice_maps.clear()
        self._slices.clear()

    def _checked_ordering(self, ordering: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The ordering as arrays of its own, int64 in C order."""
        sizes, checked = self.channel_groups(), {}
        for group, given in ordering.items():
            if group not in sizes:
                raise SpaceError(f"ordering of unknown channel group {group!r}; known: {sorted(sizes)[:8]} ...")
            order = _as_permutation(given, sizes[group])
            if order is None:
                found = " ".join(repr(given).split())
                raise SpaceError(
                    f"ordering of {group!r}: expected a permutation of 0..{sizes[group] - 1}, found {found:.80}"
                )
            run = self.run_length(group)
            starts = order.reshape(-1, run)[:, :1]
            if (starts % run).any() or not np.array_equal(order, (starts + np.arange(run)).ravel()):
                raise SpaceError(f"ordering of {group!r}: group norm needs channels to move in whole groups of {run}")
            checked[group] = order
        return checked

    @abstractmethod
    def run_length(self, group: str) -> int:
        """Channels of a group that an ordering must keep together: 8 under group norm, else 1."""

    @final
    def channel_groups(self) -> dict[str, int]:
        """Elastic channel group -> number of channels in the largest network."""
        return {
            group: size
            for item in self._largest.values()
            for group, size in zip(item.groups, item.shape, strict=True)
            if group is not None
        }

    @final
    def state(self) -> SharedState:
        """The shared tensors and the ordering as numpy copies, version 0.

        Raises:
            CheckpointError: when this supernet is structure only.
        """
        tensors = {name: tensor.detach().cpu().numpy().copy() for name, tensor in self.require_weights().items()}
        return SharedState(0, tensors, {group: order.copy() for group, order in self.ordering.items()})

    @final
    def get_extra_state(self) -> dict[str, Any]:
        """What `state_dict` has beside the tensors: the channel ordering and the normalisation.

        Raises:
            CheckpointError: when `normalisation` is none.
        """
        ordering = {group: torch.from_numpy(order.copy()) for group, order in self.ordering.items()}
        return {"ordering": ordering, "normalisation": _normalisation(self.normalisation)}

    @final
    def set_extra_state(self, state: Any) -> None:
        """Take over the channel ordering and the normalisation of a `state_dict`.

        Raises:
            CheckpointError: for anything but what `get_extra_state` gives.
            SpaceError: for an ordering of other channels.
        """
        if not (isinstance(state, Mapping) and isinstance(state.get("ordering"), Mapping) and "normalisation" in state):
            raise CheckpointError(
                "a supernet's state_dict: expected {'ordering': {group: permutation}, 'normalisation': ...} as its "
                f"extra state, found {state!r:.200}; use the state_dict as it was saved"
            )
        normalisation = _normalisation(state["normalisation"])
        self.set_ordering({group: _as_array(order) for group, order in state["ordering"].items()})
        self.normalisation = normalisation

    @final
    def require_weights(self) -> dict[str, Tensor]:
        """The shared tensors by name, which a supernet that is structure only does not have.

        Raises:
            CheckpointError: saying how to build it with weights.
        """
        shared = self.shared()
        if any(tensor.is_meta for tensor in shared.values()):
            raise CheckpointError(
                f"this supernet ({self.space.family}) is structure only, without weights; build it with a generator, "
                "build_supernet(description, torch.Generator())"
            )
        return shared

    @final
    def load_state(self, state: SharedState) -> None:
        """Take over the tensors and the ordering of a state of the same space.

        Raises:
            CheckpointError: counting tensors that are missing, unknown or of another shape, with the first few shapes;
                or where this supernet is structure only.
        """
        shared = self.require_weights()
        expected = {name: tuple(tensor.shape) for name, tensor in shared.items()}
        found = {name: array.shape for name, array in state.tensors.items()}
        wrong = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
        if wrong:
            said = [f"{n}: expected {_shape(expected.get(n))}, found {_shape(found.get(n))}" for n in wrong]
            raise CheckpointError(
                f"the state does not belong to this supernet ({self.space.family}): {len(wrong)} tensors are missing, "
                f"unknown or of another shape: {listed(said, _SHOWN)}. Use the supernet settings it was saved with"
            )
        self._checked_ordering(state.ordering)
        with torch.no_grad():
            for name, tensor in shared.items():
                tensor.copy_(torch.from_numpy(np.array(state.tensors[name])))  # 0-d arrays stay 0-d
        self.set_ordering(state.ordering)
