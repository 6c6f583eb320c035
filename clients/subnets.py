"""Modules of the subnets that a client process has seen: built once, refilled for every task."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from fedofa.finetune.holding import hold
from fedofa.supernet.base import Supernet
from fedofa.supernet.families import build_supernet
from fedofa.supernet.slices import SliceMap
from fedofa.types.errors import WireError
from fedofa.types.space import SubnetConfig
from fedofa.update.exchange import ClientTask, Teaching

_MAX_MODULES = 8


class SubnetCache:
    """Keeps the structure of one supernet and the modules of its most recent subnets."""

    def __init__(self) -> None:
        self._description = ""
        self._supernet: Supernet | None = None
        self._modules: OrderedDict[tuple[SubnetConfig, bool], nn.Module] = OrderedDict()

    def load(self, task: ClientTask, received: Mapping[str, np.ndarray]) -> tuple[nn.Module, Supernet]:
        """The task's subnet holding the received tensors, and the supernet's structure (no weights).

        Frozen tensors are those that were received, until the next task with the subnet.

        Raises:
            WireError: when the received tensors are not the subnet's.
        """
        supernet = self.structure(task)
        slices = supernet.slice_map(task.subnet, task.plan.parametrised)
        _check_tensors("task", slices, received)
        return hold(self._module(supernet, task), received, task.plan), supernet

    def structure(self, task: ClientTask) -> Supernet:
        """The supernet that a task belongs to, without weights."""
        description = json.dumps(dict(task.supernet), sort_keys=True)
        if self._supernet is None or description != self._description:
            self._supernet, self._description = build_supernet(task.supernet), description
            self._modules.clear()
        return self._supernet

    def _module(self, supernet: Supernet, task: ClientTask) -> nn.Module:
        key = (task.subnet, task.plan.parametrised)
        if key not in self._modules:
            self._modules[key] = supernet.structure(*key)
            if len(self._modules) > _MAX_MODULES:
                self._modules.popitem(last=False)
        self._modules.move_to_end(key)
        return self._modules[key]


def build_teacher(supernet: Supernet, teaching: Teaching) -> nn.Module:
    """A task's teacher as a module of its own, in evaluation mode; nothing keeps it once it has taught.

    Raises:
        WireError: when its tensors are not the subnet's.
    """
    _check_tensors("teacher", supernet.slice_map(teaching.subnet), teaching.tensors)
    tensors = {name: torch.from_numpy(np.array(values)) for name, values in teaching.tensors.items()}
    return supernet.assemble(teaching.subnet, tensors, frozen=True)


def _check_tensors(what: str, slices: SliceMap, received: Mapping[str, np.ndarray]) -> None:
    table = {item.name: item.shape for item in slices}
    found = {name: values.shape for name, values in received.items()}
    if table != found:
        wrong = sorted(name for name in table.keys() | found.keys() if table.get(name) != found.get(name))
        raise WireError(f"the {what}'s tensors are not the subnet's: {len(wrong)} differ, among them {wrong[:3]}")
