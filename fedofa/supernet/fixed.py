"""Any torch module as a supernet of one subnet: plain federated learning is the special case without choices."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fedofa.supernet.base import Supernet
from fedofa.supernet.costs import BlockCost
from fedofa.supernet.network import ParameterSpec
from fedofa.types.space import SearchSpace, SubnetConfig

FAMILY = "fixed"


@final
class FixedSupernet(Supernet):
    """Wraps a module whose every tensor all clients share whole.

    Args:
        module: the network; its direct children count as its blocks.
        input_shape: `(channels, height, width)` of one example, for the costs.
        origin: a JSON object that tells `families.build_supernet` how to make the module again on another machine;
            without one the supernet serves in one process only.
    """

    def __init__(self, module: nn.Module, input_shape: Sequence[int], origin: Mapping[str, Any] | None = None) -> None:
        super().__init__(SearchSpace(FAMILY, ()), module)
        self._input_shape = tuple(input_shape)
        self._origin = dict(origin or {})
        self._copy_skeleton = partial(copy.deepcopy, copy.deepcopy(module).to("meta"))  # partial: not a submodule
        self._table = tuple(_parameter_table(module))

    def skeleton(self, subnet: SubnetConfig) -> nn.Module:
        self.space.check(subnet)
        return self._copy_skeleton()

    def parameter_table(self, subnet: SubnetConfig) -> tuple[ParameterSpec, ...]:
        return self._table

    def block_costs(self, subnet: SubnetConfig) -> tuple[BlockCost, ...]:
        return self._costs

    def resolution(self, subnet: SubnetConfig) -> int | None:
        return None

    def description(self) -> dict[str, Any]:
        return {"family": FAMILY, "input_shape": list(self._input_shape), **self._origin}

    @cached_property
    def _costs(self) -> tuple[BlockCost, ...]:
        """From one run of the module on the meta device with two examples, counting each child's operations."""
        skeleton = self._copy_skeleton().train()
        traces = {name: _Trace(child) for name, child in skeleton.named_children()}
        with torch.device("meta"):
            skeleton(torch.empty(2, *self._input_shape))
        return tuple(trace.cost(name, self._table) for name, trace in traces.items() if trace.ran)


class _Trace:
    """Counts MACs, autograd's saved tensors and sizes of one child module through forward hooks."""

    def __init__(self, child: nn.Module) -> None:
        self.ran = False
        self.flops = 0
        self.sizes = (0, 0)
        self.kept: list[Tensor] = []
        self.own = {_storage(tensor) for tensor in (*child.parameters(), *child.buffers())}
        self.counter = FlopCounterMode(display=False)
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        child.register_forward_pre_hook(self._enter)
        child.register_forward_hook(self._leave)

    def _pack(self, tensor: Tensor) -> Tensor:
        if _storage(tensor) not in self.own:
            self.kept.append(tensor)
        return tensor

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.counter.__enter__()
        self.hooks.__enter__()

    def _leave(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.hooks.__exit__(None, None, None)
        self.counter.__exit__(None, None, None)
        self.ran = True
        self.flops += self.counter.get_total_flops()
        self.sizes = (inputs[0].numel() // 2, output.numel() // 2)

    def cost(self, name: str, table: Sequence[ParameterSpec]) -> BlockCost:
        """Per example; a tensor kept by two operations counts once."""
        distinct = {_storage(tensor): tensor for tensor in self.kept}
        saved = sum(tensor.numel() for tensor in distinct.values()) // 2
        own = tuple(item for item in table if item.name.startswith(f"{name}.") and item.role != "statistic")
        return BlockCost(name, self.flops // 4, saved, *self.sizes, max(self.sizes), own)


def _storage(tensor: Tensor) -> int:
    """Identity of a tensor's memory, which views share; meta tensors have no address."""
    return tensor.untyped_storage()._cdata


def _parameter_table(module: nn.Module) -> list[ParameterSpec]:
    norms = {
        name
        for name, child in module.named_modules()
        if isinstance(child, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm)
    }
    table = []
    for name, tensor in module.named_parameters():
        owner, _, leaf = name.rpartition(".")
        role = "norm" if owner in norms else "bias" if leaf == "bias" else "weight"
        table.append(ParameterSpec(name, tuple(tensor.shape), (None,) * tensor.dim(), role))
    for name, tensor in module.named_buffers():
        table.append(ParameterSpec(name, tuple(tensor.shape), (None,) * tensor.dim(), "statistic"))
    return table
