"""The features of a client's examples where the frozen part of a network ends: computed once, kept, used again.

A plan that trains only the last layers computes the same for an example in every epoch, and in every round in which
nobody trained what lies before. Features are known by a digest of exactly what they depend on.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from fedofa.finetune.inputs import Inputs
from fedofa.finetune.plans import FEATURE_CACHE_REFUSAL
from fedofa.types.errors import ConfigError
from fedofa.types.plan import FineTunePlan

_MEMORY_BYTES = 64 << 20
_DISK_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Cut:
    """A chain of layers in two: what computes the same for an example every time, and the rest."""

    prefix: nn.Sequential
    suffix: nn.Sequential


def cut_of(model: nn.Module, plan: FineTunePlan) -> Cut:
    """The longest frozen prefix of a chain that draws nothing at random and ends where no recomputed segment runs.

    Args:
        model: a `Sequential`, of `Sequential`s too, whose norms are in the plan's mode; plan: what trains.

    Raises:
        ConfigError: when nothing lies before the first layer that trains, or the prefix's batch norms take statistics
            of the batch: an example's features would depend on the others.
    """
    chain = list(_chain(model, ""))
    names = [name for name, _ in chain]
    trains = [
        any(name == item or item.startswith(f"{name}.") for item in plan.changes) or _draws(layer)
        for name, layer in chain
    ]
    end = trains.index(True) if True in trains else len(chain)
    for segment in plan.recompute:
        inside = [place for place, name in enumerate(names) if f"{name}.".startswith(tuple(f"{s}." for s in segment))]
        end = inside[0] if inside and inside[0] < end <= inside[-1] else end
    if not end:
        raise ConfigError(
            f"plan {plan.name!r} caches the features of a frozen prefix, but there is none: the first layer trains, is "
            "recomputed with one that does, or the model is no chain; set feature_cache=false or train later layers"
        )
    layers = [layer for _, layer in chain]
    norms = (module for layer in layers[:end] for module in layer.modules() if isinstance(module, _BatchNorm))
    if any(norm.training for norm in norms):
        raise ConfigError(f"plan {plan.name!r}: {FEATURE_CACHE_REFUSAL}")
    return Cut(nn.Sequential(*layers[:end]), nn.Sequential(*layers[end:]))


def feature_bytes(model: nn.Module, plan: FineTunePlan, input_shape: tuple[int, ...]) -> int:
    """What the features of one example take, in bytes; 0 where the plan keeps none. Norms are in the plan's mode."""
    if not plan.feature_cache:
        return 0
    with torch.no_grad():
        device = next(model.parameters()).device
        return cut_of(model, plan).prefix(torch.zeros(1, *input_shape, device=device)).nbytes


class FeatureCache:
    """Features of the clients that a process trains, the longest unused ones dropped.

    Those of a client that take more than `memory_bytes` lie in a memory-mapped file without a name, which the system
    removes with the process, whatever ends it.

    Args:
        memory_bytes: of all features in memory.
        disk_bytes: of all features in files; larger ones are not kept from one training to the next.
        directory: of those files; None for the system's directory of temporary files.
    """

    def __init__(
        self, memory_bytes: int = _MEMORY_BYTES, disk_bytes: int = _DISK_BYTES, directory: Path | None = None
    ) -> None:
        self._bounds = {False: memory_bytes, True: disk_bytes}
        self._directory = directory
        self._entries: OrderedDict[str, tuple[bool, Tensor]] = OrderedDict()

    def features(self, prefix: nn.Module, inputs: Inputs, batch_size: int, form: str) -> Tensor:
        """The prefix's results for all inputs, from the cache where they are known.

        Args:
            prefix: computes each example alone; its weights and settings, the inputs, `batch_size` and `form` are what
                the results are known by.
            inputs: `(num_examples, channels, height, width)`; where they are shapes alone, so are the results.
            batch_size: examples that go through at a time.
            form: what else decides how results are rounded.
        """
        if inputs.is_meta:
            with torch.no_grad():
                return prefix(inputs[:])
        key = _digest(prefix, inputs, f"{form}/{batch_size}")
        if key not in self._entries:
            on_disk, found = self._compute(prefix, inputs, batch_size)
            self._make_room(on_disk, found.nbytes)
            if found.nbytes > self._bounds[on_disk]:
                return found
            self._entries[key] = on_disk, found
        self._entries.move_to_end(key)
        return self._entries[key][1]

    def _compute(self, prefix: nn.Module, inputs: Inputs, batch_size: int) -> tuple[bool, Tensor]:
        """The results, written one batch after the other to where they stay; whether that is a file."""
        result, on_disk = None, False
        with torch.no_grad():
            for start in range(0, len(inputs), batch_size):
                part = prefix(inputs[start : start + batch_size])
                if result is None:
                    on_disk = part[0].nbytes * len(inputs) > self._bounds[False]
                    result = self._empty((len(inputs), *part.shape[1:]), part.dtype, on_disk)
                result[start : start + batch_size] = part
        if result is None:
            raise ConfigError("features: expected at least 1 example, found none")
        return on_disk, result

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype, on_disk: bool) -> Tensor:
        """A tensor in memory or in a file; maps lie in it with channels innermost."""
        is_map = len(shape) == 4
        lies = (shape[0], *shape[2:], shape[1]) if is_map else shape
        if on_disk:
            with tempfile.TemporaryFile(dir=self._directory) as file:
                stored = np.memmap(file, torch.empty(0, dtype=dtype).numpy().dtype, "w+", shape=lies)
            values = torch.from_numpy(stored)
        else:
            values = torch.empty(lies, dtype=dtype)
        return values.permute(0, 3, 1, 2) if is_map else values

    def _make_room(self, on_disk: bool, size: int) -> None:
        """Drop the longest unused features of that kind until so many bytes more are within the bound."""
        while True:
            same = [key for key, entry in self._entries.items() if entry[0] == on_disk]
            if not same or sum(self._entries[key][1].nbytes for key in same) + size <= self._bounds[on_disk]:
                return
            del self._entries[same[0]]


def _chain(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The layers of nested `Sequential`s in order, by name; nothing for another module."""
    if type(module).forward is not nn.Sequential.forward:
        return
    for name, child in module.named_children():
        layers = list(_chain(child, f"{prefix}{name}."))
        yield from layers or [(f"{prefix}{name}", child)]


def _draws(layer: nn.Module) -> bool:
    return any(isinstance(module, _DropoutNd) and module.p > 0 for module in layer.modules())


def _digest(prefix: nn.Module, inputs: Inputs, form: str) -> str:
    """16 bytes as hex digits over the prefix's layers, parameters and buffers, the inputs and the form."""
    side = None if isinstance(inputs, Tensor) else inputs.resolution
    digest = hashlib.blake2b(f"{form}\n{side}\n{prefix!r}".encode(), digest_size=16)
    given = {"inputs": inputs} if isinstance(inputs, Tensor) else inputs.tensors
    for name, tensor in (*given.items(), *prefix.state_dict().items()):
        lies = tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor
        digest.update(f"\n{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        digest.update(np.ascontiguousarray(lies.detach().numpy()).data)
    return digest.hexdigest()
