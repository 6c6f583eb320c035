"""Any torch module as a supernet of one subnet: plain federated learning is the special case without choices."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fedofa.supernet.base import Supernet, fill_skeleton
from fedofa.supernet.costs import BlockCost
from fedofa.supernet.network import ParameterSpec
from fedofa.types.errors import ConfigError
from fedofa.types.space import SearchSpace, SubnetConfig

FAMILY = "fixed"
_SHOWN = 5


@final
class FixedSupernet(Supernet):
    """Wraps a module whose every tensor all clients share whole.

    Args:
        module: the network; its direct children count as its blocks.
        input_shape: `(channels, height, width)` of one example, for the costs.
        origin: a JSON object that tells `families.build_supernet` how to make the module again on another machine;
            without one the supernet serves in one process only.

    Raises:
        ConfigError: for a module that has one tensor under two names.
    """

    def __init__(self, module: nn.Module, input_shape: Sequence[int], origin: Mapping[str, Any] | None = None) -> None:
        _refuse_tied(module)
        super().__init__(SearchSpace(FAMILY, ()), module)
        self._input_shape = tuple(input_shape)
        self._origin = dict(origin or {})
        self._copy_skeleton = partial(copy.deepcopy, copy.deepcopy(module).to("meta"))  # partial: not a submodule
        self._table = tuple(_parameter_table(module))

    def skeleton(self, subnet: SubnetConfig) -> nn.Module:
        self.space.check(subnet)
        return self._copy_skeleton()

    def assemble(self, subnet: SubnetConfig, tensors: Mapping[str, Tensor], *, frozen: bool = False) -> nn.Module:
        return fill_skeleton(self.skeleton(subnet), tensors, frozen=frozen)

    def parameter_table(self, subnet: SubnetConfig) -> tuple[ParameterSpec, ...]:
        return self._table

    def block_costs(self, subnet: SubnetConfig) -> tuple[BlockCost, ...]:
        return self._costs

    def run_length(self, group: str) -> int:
        return 1

    def resolution(self, subnet: SubnetConfig) -> int | None:
        return None

    def description(self) -> dict[str, Any]:
        return {"family": FAMILY, "input_shape": list(self._input_shape), **self._origin}

    @cached_property
    def _costs(self) -> tuple[BlockCost, ...]:
        """From two runs on the meta device, with two and three examples: the difference is one example's share."""
        fewer, more = (self._trace(batch) for batch in (2, 3))
        costs = []
        for name, trace in more.items():
            one = [b - a for a, b in zip(fewer[name].counts(), trace.counts(), strict=True)]
            flops, kept_bytes, inputs, outputs = one
            own = [item for item in self._table if item.name.startswith(f"{name}.")]
            trainable = tuple(item for item in own if item.role != "statistic")
            statistics = sum(item.numel for item in own if item.role == "statistic")
            kept = -(-kept_bytes // 4)
            costs.append(
                BlockCost(name, flops // 2, kept, inputs, outputs, max(inputs, outputs), trainable, statistics)
            )
        return tuple(costs)

    def _trace(self, batch: int) -> dict[str, _Trace]:
        """Run the module once, counting each child's operations."""
        skeleton = self._copy_skeleton().train()
        seen = {_storage(tensor) for tensor in (*skeleton.parameters(), *skeleton.buffers())}
        traces = {name: _Trace(child, seen) for name, child in skeleton.named_children()}
        with torch.device("meta"):
            skeleton(torch.empty(batch, *self._input_shape))
        return {name: trace for name, trace in traces.items() if trace.ran}


class _Trace:
    """Counts FLOPs, bytes that autograd keeps and sizes of one child module through forward hooks.

    `seen` holds the memory that is counted already: the module's own tensors, and what an earlier child keeps.
    """

    def __init__(self, child: nn.Module, seen: set[int]) -> None:
        self.ran = False
        self.flops = self.kept_bytes = 0
        self.sizes = (0, 0)
        self.seen = seen
        self.kept: list[Tensor] = []  # alive, so that no other tensor takes over an identity
        self.counter = FlopCounterMode(display=False)
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        child.register_forward_pre_hook(self._enter)
        child.register_forward_hook(self._leave)

    def counts(self) -> tuple[int, int, int, int]:
        """FLOPs, kept bytes, input and output elements of the whole batch."""
        return self.flops, self.kept_bytes, self.sizes[0], self.sizes[1]

    def _pack(self, tensor: Tensor) -> Tensor:
        if _storage(tensor) not in self.seen:
            self.seen.add(_storage(tensor))
            self.kept.append(tensor)
            self.kept_bytes += tensor.untyped_storage().nbytes()
        return tensor

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.counter.__enter__()
        self.hooks.__enter__()

    def _leave(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.hooks.__exit__(None, None, None)
        self.counter.__exit__(None, None, None)
        self.ran = True
        self.flops += self.counter.get_total_flops()
        self.sizes = (inputs[0].numel(), output.numel())


def _storage(tensor: Tensor) -> int:
    """Identity of a tensor's memory, which views share; meta tensors have no address."""
    return tensor.untyped_storage()._cdata


def _refuse_tied(module: nn.Module) -> None:
    """Refuse tensors that several submodules have: they would part as soon as a subnet is built.

    A submodule that several others have is one, and serves.
    """
    names: dict[int, list[str]] = {}
    for prefix, child in module.named_modules():
        for name, tensor in (*child._parameters.items(), *child._buffers.items()):
            if tensor is not None:
                names.setdefault(id(tensor), []).append(f"{prefix}.{name}" if prefix else name)
    tied = [" = ".join(same) for same in names.values() if len(same) > 1]
    if tied:
        raise ConfigError(
            f"FixedSupernet: expected every tensor under one name, found tied ones: {'; '.join(tied[:_SHOWN])}; let "
            "the submodules share the submodule that has the tensor, or give each a tensor of its own"
        )


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
