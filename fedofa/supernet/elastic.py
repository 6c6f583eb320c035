"""What the families of block networks share: a spec of sizes describes any subnet, and the supernet follows from it."""

from __future__ import annotations

import itertools
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fedofa.supernet.base import Supernet, refuse_tensors
from fedofa.supernet.costs import BlockCost, block_costs
from fedofa.supernet.layers import Filling, MisfillError, Network
from fedofa.supernet.network import (
    CLASSIFIER_PREFIX,
    GROUP_NORM_CHANNELS,
    MBConvSpec,
    NetworkSpec,
    ParameterSpec,
    PartSpec,
    is_lite,
)
from fedofa.supernet.slices import matrix_name
from fedofa.types.errors import ConfigError
from fedofa.types.space import SearchSpace, SubnetConfig


class ElasticSpec(ABC):
    """The sizes of one space, as a frozen dataclass: from them come the search space and each subnet's description.

    Attributes:
        family: the name that descriptions and configurations carry.
        nested: settings that are dataclasses themselves, or tuples of them.
        in_channels, num_classes: of the images and the labels.
        norm, norm_eps, dropout: see `NetworkSpec`.
    """

    __slots__ = ()
    family: ClassVar[str]
    nested: ClassVar[Mapping[str, type]]
    in_channels: int
    num_classes: int
    norm: str
    norm_eps: float
    dropout: float

    @property
    @abstractmethod
    def elastic_kernels(self) -> tuple[int, ...]:
        """The sizes of the elastic depthwise kernels; empty where no kernel is elastic."""

    @abstractmethod
    def search_space(self) -> SearchSpace:
        """The axes of the space."""

    @abstractmethod
    def network(self, space: SearchSpace, subnet: SubnetConfig) -> NetworkSpec:
        """The description of one subnet of `search_space`."""

    def _with_classifier(
        self,
        space: SearchSpace,
        subnet: SubnetConfig,
        parts: Iterable[PartSpec],
        features: int,
        feature_group: str | None = None,
    ) -> NetworkSpec:
        """A subnet's parts with the classifier and the settings that all subnets share."""
        (resolution,) = space.values(subnet, "resolution")
        return NetworkSpec(
            self.in_channels,
            tuple(parts),
            features,
            self.num_classes,
            self.norm,
            self.norm_eps,
            self.dropout,
            int(resolution or 0),
            feature_group,
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` turns back into an equal spec."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[call-overload]  # tuples become lists

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; a `ConfigError` names what is not known or malformed."""
        known = [item.name for item in fields(cls)]  # type: ignore[arg-type]
        unknown = sorted(set(value) - set(known))
        if unknown:
            raise ConfigError(f"supernet: unknown settings {unknown}; known: {known}")
        settings: dict[str, Any] = {}
        for key, item in value.items():
            kind = cls.nested.get(key)
            if isinstance(item, Sequence) and not isinstance(item, str):
                settings[key] = tuple(_built(kind, entry) for entry in item)
            else:
                settings[key] = _built(kind, item)
        return cls(**settings)


def _built(kind: type | None, item: Any) -> Any:
    return kind(**item) if kind is not None and isinstance(item, Mapping) else item


def differences(here: ElasticSpec, there: ElasticSpec, names: Sequence[str]) -> list[str]:
    """Those of the named settings of two specs of a family that differ, in words; blocks and stages by number."""
    ours, theirs = _flat(here, names), _flat(there, names)
    return [
        f"{name}: {theirs.get(name)!r} there, {ours.get(name)!r} here"
        for name in {**theirs, **ours}
        if theirs.get(name) != ours.get(name)
    ]


def _flat(spec: ElasticSpec, names: Sequence[str]) -> dict[str, Any]:
    values, flat = spec.to_json(), {}
    for name in names:
        rows = values[name] if name in spec.nested and isinstance(values[name], list) else None
        if rows is None:
            flat[name] = values[name]
            continue
        flat[f"number of {name}"] = len(rows)
        flat |= {f"{name}[{n}].{key}": size for n, row in enumerate(rows) for key, size in row.items()}
    return flat


class ElasticSupernet(Supernet, ABC):
    """The supernet of one `ElasticSpec`.

    Args:
        spec: the sizes.
        generator: draws the initial weights; None leaves them on the meta device (structure only, as a client needs).
    """

    def __init__(self, spec: ElasticSpec, generator: torch.Generator | None = None) -> None:
        space = spec.search_space()
        largest = spec.network(space, space.largest())
        network = Network(largest)
        _register_matrices(network, largest, spec.elastic_kernels)
        super().__init__(space, network, spec.elastic_kernels)
        self.spec = spec
        self._last_network: tuple[ElasticSpec, SubnetConfig, NetworkSpec] | None = None
        if generator is not None:
            network.to_empty(device=generator.device)
            initialise(network, generator)
            self._start_residuals_at_identity()
            start_lite_residuals(network, generator)

    def _start_residuals_at_identity(self) -> None:
        """Zero the last norm's scale of every residual block (arXiv 1706.02677, section 5.1).

        Subnets of different depth are then the same function at the start, and their deltas agree from the first round.
        """
        parameters = dict(self.network.named_parameters())
        with torch.no_grad():
            for block in self.network_spec(self.space.largest()).blocks:
                if block.residual:
                    parameters[f"{block.name}.project.norm.weight"].zero_()

    @cached_property
    def _normed_groups(self) -> frozenset[str]:
        return self.network_spec(self.space.largest()).normed_groups

    def network_spec(self, subnet: SubnetConfig) -> NetworkSpec:
        """The description of one subnet; the last is kept, since whoever cuts a subnet asks for it several times."""
        kept = self._last_network
        if kept is None or kept[0] is not self.spec or kept[1] != subnet:
            kept = self._last_network = (self.spec, subnet, self.spec.network(self.space, subnet))
        return kept[2]

    def skeleton(self, subnet: SubnetConfig) -> nn.Module:
        return Network(self.network_spec(subnet))

    def assemble(self, subnet: SubnetConfig, tensors: Mapping[str, Tensor], *, frozen: bool = False) -> nn.Module:
        filling = Filling(tensors, frozen)
        with suppress(MisfillError):
            network = Network(self.network_spec(subnet), filling)
            if filling.num_taken == len(tensors):
                return network
        refuse_tensors({item.name: item.shape for item in self.parameter_table(subnet)}, tensors)

    def parameter_table(self, subnet: SubnetConfig) -> tuple[ParameterSpec, ...]:
        return tuple(self.network_spec(subnet).parameters())

    def block_costs(self, subnet: SubnetConfig) -> tuple[BlockCost, ...]:
        return block_costs(self.network_spec(subnet))

    def run_length(self, group: str) -> int:
        grouped = self.network_spec(self.space.largest()).norm == "group"
        return GROUP_NORM_CHANNELS if grouped and group in self._normed_groups else 1

    def resolution(self, subnet: SubnetConfig) -> int | None:
        return self.network_spec(subnet).resolution

    def description(self) -> dict[str, Any]:
        return {"family": self.spec.family, **self.spec.to_json()}


def _register_matrices(network: nn.Module, spec: NetworkSpec, kernels: Sequence[int]) -> None:
    """Give every elastic depthwise convolution its transform matrices, on the meta device."""
    for block in spec.blocks:
        if isinstance(block, MBConvSpec) and block.expands and block.kernel in kernels:
            depthwise = network.get_submodule(block.depthwise.name)
            sizes = (size for size in sorted(kernels, reverse=True) if size <= block.kernel)
            for source, target in itertools.pairwise(sizes):
                matrix = nn.Parameter(torch.empty(target**2, target**2, device="meta", dtype=torch.float32))
                depthwise.register_parameter(matrix_name("", source, target).removeprefix("."), matrix)


def initialise(network: nn.Module, generator: torch.Generator) -> None:
    """He-normal convolutions (fan-out), normal classifier, unit norms, identity kernel matrices."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if not is_lite(name):
                _draw(name, parameter, generator)
        for name, buffer in network.named_buffers():
            buffer.fill_(1.0 if name.endswith("running_var") else 0.0)


def start_lite_residuals(network: nn.Module, generator: torch.Generator) -> None:
    """Draw the lite residual branches as all else is drawn, but for a last scale of zero: they add nothing at first."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if is_lite(name):
                _draw(name, parameter, generator)
                if name.endswith(".lite.project.norm.weight"):
                    parameter.zero_()


def start_classifier(network: nn.Module, generator: torch.Generator | None) -> None:
    """Draw a fresh classifier as all else is drawn; without a generator it is zero."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.startswith(CLASSIFIER_PREFIX) and generator is not None:
                _draw(name, parameter, generator)
            elif name.startswith(CLASSIFIER_PREFIX):
                parameter.zero_()


def _draw(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    if ".matrix_" in name:
        parameter.copy_(torch.eye(len(parameter)))
    elif parameter.dim() == 4:
        fan_out = parameter.shape[0] * parameter[0, 0].numel() if parameter.shape[1] > 1 else parameter[0].numel()
        parameter.normal_(0.0, math.sqrt(2.0 / fan_out), generator=generator)
    elif parameter.dim() == 2:
        parameter.normal_(0.0, 0.01, generator=generator)
    else:
        parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
