"""The MobileNetV3 family: the Once-for-All space (arXiv 1908.09791) with every size a parameter."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, final

import torch
from torch import nn

from fedofa.supernet.base import Supernet
from fedofa.supernet.costs import BlockCost, block_costs
from fedofa.supernet.layers import Network, build_skeleton
from fedofa.supernet.network import (
    ACTIVATIONS,
    GROUP_NORM_CHANNELS,
    NORMS,
    ConvSpec,
    MBConvSpec,
    NetworkSpec,
    ParameterSpec,
    make_divisible,
)
from fedofa.supernet.slices import matrix_name
from fedofa.types.errors import ConfigError
from fedofa.types.space import Axis, Control, SearchSpace, SubnetConfig

FAMILY = "mobilenet_v3"
SQUEEZE_RATIO = 4


@dataclass(frozen=True, slots=True)
class StageSpec:
    """One elastic stage: its output width, the stride of its first block, its activation, squeeze-excite or not."""

    width: int
    stride: int
    activation: str
    squeeze_excite: bool

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ConfigError(
                f"supernet.stages: expected an activation of {list(ACTIVATIONS)}, found {self.activation!r}"
            )


@dataclass(frozen=True, slots=True)
class MobileNetV3Spec:
    """Sizes of one MobileNetV3 space. The defaults are the published ImageNet network.

    Args:
        in_channels, num_classes: of the images and the labels.
        stem_width, stem_stride: of the first convolution (3 x 3).
        first_width, first_stride: of the static first block (expand ratio 1, kernel 3).
        stages: the elastic stages.
        final_width: channels of the last 1x1 convolution before global pooling.
        feature_width: channels of the feature mix after it.
        kernels, expands, depths, resolutions: the allowed values of the four axes.
        norm: "batch" or "group" (8 channels a group).
        norm_eps, dropout: of the norms and of the classifier.
    """

    in_channels: int = 3
    num_classes: int = 1000
    stem_width: int = 16
    stem_stride: int = 2
    first_width: int = 16
    first_stride: int = 1
    stages: tuple[StageSpec, ...] = (
        StageSpec(24, 2, "relu", False),
        StageSpec(40, 2, "relu", True),
        StageSpec(80, 2, "h_swish", False),
        StageSpec(112, 1, "h_swish", True),
        StageSpec(160, 2, "h_swish", True),
    )
    final_width: int = 960
    feature_width: int = 1280
    kernels: tuple[int, ...] = (3, 5, 7)
    expands: tuple[float, ...] = (3, 4, 6)
    depths: tuple[int, ...] = (2, 3, 4)
    resolutions: tuple[int, ...] = (128, 144, 160, 176, 192, 208, 224)
    norm: str = "batch"
    norm_eps: float = 1e-5
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ConfigError(f"supernet.norm: expected one of {list(NORMS)}, found {self.norm!r}")
        even = [k for k in self.kernels if k % 2 == 0]
        if even:
            raise ConfigError(f"supernet.kernels: kernel sizes must be odd, found {even}")
        for name in ("kernels", "expands", "depths", "resolutions"):
            if not getattr(self, name):
                raise ConfigError(f"supernet.{name}: expected at least one value, found none")
        if not self.stages:
            raise ConfigError("supernet.stages: expected at least one elastic stage, found none")
        widths = (self.stem_width, self.first_width, *(stage.width for stage in self.stages), self.final_width)
        uneven = [width for width in widths if width % GROUP_NORM_CHANNELS]
        if uneven:
            raise ConfigError(f"supernet widths must be multiples of {GROUP_NORM_CHANNELS}, found {uneven}")

    def search_space(self) -> SearchSpace:
        """Axes depth (a stage), kernel and expand (a block, present where its stage is deep enough), resolution."""
        blocks = tuple(
            Control("depth", stage, block + 1) if block + 1 > self.depths[0] else None
            for stage in range(len(self.stages))
            for block in range(self.depths[-1])
        )
        return SearchSpace(
            FAMILY,
            (
                Axis.free("depth", self.depths, len(self.stages)),
                Axis("kernel", tuple(self.kernels), blocks),
                Axis("expand", tuple(self.expands), blocks),
                Axis.free("resolution", self.resolutions, 1, is_input=True),
            ),
        )

    def network(self, space: SearchSpace, subnet: SubnetConfig) -> NetworkSpec:
        """The description of one subnet."""
        depths, kernels = space.values(subnet, "depth"), space.values(subnet, "kernel")
        expands, (resolution,) = space.values(subnet, "expand"), space.values(subnet, "resolution")
        first = MBConvSpec(
            "stages.0.0",
            self.stem_width,
            self.stem_width,
            self.first_width,
            kernel=3,
            stride=self.first_stride,
            activation="relu",
            expands=False,
        )
        stages, channels = [(first,)], self.first_width
        for number, (stage, depth) in enumerate(zip(self.stages, depths, strict=True)):
            blocks = []
            for block in range(int(depth or 0)):
                position = number * self.depths[-1] + block
                size = (int(kernels[position] or 0), float(expands[position] or 0))
                blocks.append(self._block(stage, f"stages.{number + 1}.{block}", channels, size, first=block == 0))
                channels = stage.width
            stages.append(tuple(blocks))
        stem = ConvSpec("stem", self.in_channels, self.stem_width, 3, self.stem_stride, activation="h_swish")
        final_conv = ConvSpec("final", channels, self.final_width, activation="h_swish")
        mix = ConvSpec("mix", self.final_width, self.feature_width, norm=False, activation="h_swish")
        return NetworkSpec(
            stem,
            tuple(stages),
            final_conv,
            mix,
            self.num_classes,
            self.norm,
            self.norm_eps,
            self.dropout,
            int(resolution or 0),
        )

    def _block(self, stage: StageSpec, name: str, channels: int, size: tuple[int, float], *, first: bool) -> MBConvSpec:
        kernel, expand = size
        mid = make_divisible(round(channels * expand))
        return MBConvSpec(
            name,
            channels,
            mid,
            stage.width,
            kernel=kernel,
            stride=stage.stride if first else 1,
            activation=stage.activation,
            squeeze_channels=make_divisible(mid // SQUEEZE_RATIO) if stage.squeeze_excite else None,
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` turns back into an equal spec."""
        return json.loads(json.dumps(asdict(self)))  # tuples become lists

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> MobileNetV3Spec:
        """The inverse of `to_json`; a `ConfigError` names what is not known or malformed."""
        unknown = sorted(set(value) - {item.name for item in fields(cls)})
        if unknown:
            raise ConfigError(f"supernet: unknown settings {unknown}; known: {[item.name for item in fields(cls)]}")
        settings: dict[str, Any] = {
            key: tuple(item) if isinstance(item, Sequence) and not isinstance(item, str) else item
            for key, item in value.items()
        }
        if "stages" in settings:
            settings["stages"] = tuple(
                stage if isinstance(stage, StageSpec) else StageSpec(**stage) for stage in settings["stages"]
            )
        return cls(**settings)


@final
class MobileNetV3Supernet(Supernet):
    """Elastic kernel (with transform matrices), depth, expand ratio and resolution over one `MobileNetV3Spec`.

    Args:
        spec: the sizes.
        generator: draws the initial weights; None leaves them on the meta device (structure only, as a client needs).
    """

    def __init__(self, spec: MobileNetV3Spec, generator: torch.Generator | None = None) -> None:
        space = spec.search_space()
        network = build_skeleton(spec.network(space, space.largest()))
        _register_matrices(network, spec)
        super().__init__(space, network, spec.kernels)
        self.spec = spec
        if generator is not None:
            network.to_empty(device=generator.device)
            initialise(network, generator)
            self._start_residuals_at_identity()

    @classmethod
    def published(cls, width: float = 1.0, generator: torch.Generator | None = None) -> MobileNetV3Supernet:
        """The ImageNet space of Once-for-All, `ofa_mbv3_d234_e346_k357_w1.0` (or `_w1.2`): 7371^5 subnets."""
        spec = MobileNetV3Spec()
        scaled = MobileNetV3Spec(
            stem_width=make_divisible(spec.stem_width * width),
            first_width=make_divisible(spec.first_width * width),
            stages=tuple(
                StageSpec(make_divisible(s.width * width), s.stride, s.activation, s.squeeze_excite)
                for s in spec.stages
            ),
            final_width=make_divisible(spec.final_width * width),
            feature_width=make_divisible(spec.feature_width * width),
        )
        return cls(scaled, generator)

    def _start_residuals_at_identity(self) -> None:
        """Zero the last norm's scale of every residual block (arXiv 1706.02677, section 5.1).

        Subnets of different depth are then the same function at the start, and their deltas agree from the first round.
        """
        parameters = dict(self.network.named_parameters())
        with torch.no_grad():
            for block in self.network_spec(self.space.largest()).blocks:
                if block.residual:
                    parameters[f"{block.name}.project.norm.weight"].zero_()

    def network_spec(self, subnet: SubnetConfig) -> NetworkSpec:
        """The description of one subnet."""
        return self.spec.network(self.space, subnet)

    def skeleton(self, subnet: SubnetConfig) -> nn.Module:
        return build_skeleton(self.network_spec(subnet))

    def parameter_table(self, subnet: SubnetConfig) -> tuple[ParameterSpec, ...]:
        return tuple(self.network_spec(subnet).parameters())

    def block_costs(self, subnet: SubnetConfig) -> tuple[BlockCost, ...]:
        return block_costs(self.network_spec(subnet))

    def run_length(self, group: str) -> int:
        return GROUP_NORM_CHANNELS if self.spec.norm == "group" and group.endswith(".mid") else 1

    def resolution(self, subnet: SubnetConfig) -> int | None:
        return self.network_spec(subnet).resolution

    def description(self) -> dict[str, Any]:
        return {"family": FAMILY, **self.spec.to_json()}


def _register_matrices(network: Network, spec: MobileNetV3Spec) -> None:
    """Give every elastic depthwise convolution its transform matrices, on the meta device."""
    sizes = sorted(spec.kernels, reverse=True)
    for stage in list(network.stages)[1:]:
        for block in stage:  # type: ignore[union-attr]
            for source, target in itertools.pairwise(sizes):
                name = matrix_name("", source, target).removeprefix(".")
                matrix = nn.Parameter(torch.empty(target**2, target**2, device="meta"))
                block.depthwise.register_parameter(name, matrix)


def initialise(network: nn.Module, generator: torch.Generator) -> None:
    """He-normal convolutions (fan-out), normal classifier, unit norms, identity kernel matrices."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".matrix_" in name:
                parameter.copy_(torch.eye(len(parameter)))
            elif parameter.dim() == 4:
                fan_out = (
                    parameter.shape[0] * parameter[0, 0].numel() if parameter.shape[1] > 1 else parameter[0].numel()
                )
                parameter.normal_(0.0, math.sqrt(2.0 / fan_out), generator=generator)
            elif parameter.dim() == 2:
                parameter.normal_(0.0, 0.01, generator=generator)
            else:
                parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        for name, buffer in network.named_buffers():
            buffer.fill_(1.0 if name.endswith("running_var") else 0.0)
