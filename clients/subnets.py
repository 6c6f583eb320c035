"""Modules of the subnets that a client process has seen: built once, refilled for every task."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from fedofa.supernet.base import Supernet
from fedofa.supernet.families import build_supernet
from fedofa.types.errors import WireError
from fedofa.types.space import SubnetConfig
from fedofa.update.exchange import ClientTask

_MAX_MODULES = 8


class SubnetCache:
    """Keeps the structure of one supernet and the modules of its most recent subnets."""

    def __init__(self) -> None:
        self._description = ""
        self._supernet: Supernet | None = None
        self._modules: OrderedDict[SubnetConfig, nn.Module] = OrderedDict()

    def load(self, task: ClientTask, received: Mapping[str, np.ndarray]) -> tuple[nn.Module, Supernet]:
        """The task's subnet holding the received tensors, and the supernet's structure (no weights).

        Raises:
            WireError: when the received tensors are not the subnet's.
        """
        supernet = self._structure(task)
        table = {item.name: item.shape for item in supernet.parameter_table(task.subnet)}
        found = {name: values.shape for name, values in received.items()}
        if table != found:
            wrong = sorted(name for name in table.keys() | found.keys() if table.get(name) != found.get(name))
            raise WireError(f"the task's tensors are not the subnet's: {len(wrong)} differ, among them {wrong[:3]}")
        module = self._module(supernet, task.subnet)
        with torch.no_grad():
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                tensor.numpy()[...] = received[name]
        return module, supernet

    def _structure(self, task: ClientTask) -> Supernet:
        description = json.dumps(dict(task.supernet), sort_keys=True)
        if self._supernet is None or description != self._description:
            self._supernet, self._description = build_supernet(task.supernet), description
            self._modules.clear()
        return self._supernet

    def _module(self, supernet: Supernet, subnet: SubnetConfig) -> nn.Module:
        if subnet not in self._modules:
            supernet.space.check(subnet)
            empty = {item.name: torch.empty(item.shape) for item in supernet.parameter_table(subnet)}
            self._modules[subnet] = supernet.assemble(subnet, empty)
            if len(self._modules) > _MAX_MODULES:
                self._modules.popitem(last=False)
        self._modules.move_to_end(subnet)
        return self._modules[subnet]
