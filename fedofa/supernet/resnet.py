"""The ResNet-D family (arXiv 1812.01187): residual bottlenecks with elastic depth, expand ratio and width."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch

from fedofa.supernet.elastic import ElasticSpec, ElasticSupernet
from fedofa.supernet.network import BottleneckSpec, ConvSpec, NetworkSpec, PartSpec, PoolSpec, make_divisible
from fedofa.supernet.sizes import check_numbers, check_sizes
from fedofa.types.space import SearchSpace, SubnetConfig
from fedofa.types.spaces import (
    RESNET,
    RESNET_DEPTHS,
    RESNET_EXPANDS,
    RESNET_WIDTHS,
    RESOLUTIONS,
    STEM_WIDTHS,
    residual_space,
)

_ACTIVATION = "relu"


@dataclass(frozen=True, slots=True)
class ResidualStageSpec:
    """One stage: output width at width 1, blocks at depth 0, and the stride of its first block."""

    width: int
    blocks: int
    stride: int

    def __post_init__(self) -> None:
        check_numbers(self, "supernet.stages: ")


@final
@dataclass(frozen=True, slots=True)
class ResNetSpec(ElasticSpec):
    """Sizes of one ResNet-D space. The defaults are the published ImageNet network.

    Args:
        in_channels, num_classes: of the images and the labels.
        stem_width, stem_stride: of the stem at width 1: a 3 x 3 convolution with that stride to half the width, one
            that may be left out, and one to the whole width; max pooling follows.
        stages: the stages; the first block of each changes the width and, with its stride, the resolution.
        expands: inner channels of a block, as fractions of its output's.
        depths: blocks added to each stage; the stem's middle convolution exists at the largest of them.
        widths: multipliers of the stem's inner and outer width and of each stage's.
        resolutions: the allowed sides of the input.
        norm: "batch" or "group" (8 channels a group).
        norm_eps, dropout: of the norms and of the classifier.
    """

    in_channels: int = 3
    num_classes: int = 1000
    stem_width: int = 64
    stem_stride: int = 2
    stages: tuple[ResidualStageSpec, ...] = (
        ResidualStageSpec(256, 2, 1),
        ResidualStageSpec(512, 2, 2),
        ResidualStageSpec(1024, 4, 2),
        ResidualStageSpec(2048, 2, 2),
    )
    expands: tuple[float, ...] = RESNET_EXPANDS
    depths: tuple[int, ...] = RESNET_DEPTHS
    widths: tuple[float, ...] = RESNET_WIDTHS
    resolutions: tuple[int, ...] = RESOLUTIONS
    norm: str = "batch"
    norm_eps: float = 1e-5
    dropout: float = 0.0

    family: ClassVar[str] = RESNET
    nested: ClassVar[Mapping[str, type]] = {"stages": ResidualStageSpec}

    def __post_init__(self) -> None:
        check_sizes(self, ("stem_width", "stages"), least={"depths": 0})

    @property
    def elastic_kernels(self) -> tuple[int, ...]:
        return ()

    def search_space(self) -> SearchSpace:
        blocks = [stage.blocks for stage in self.stages]
        return residual_space(self.family, blocks, self.expands, self.depths, self.widths, self.resolutions)

    def network(self, space: SearchSpace, subnet: SubnetConfig) -> NetworkSpec:
        widths = [float(width or 0) for width in space.values(subnet, "width")]
        parts = (*self._stem(space, subnet, widths), *self._blocks(space, subnet, widths), PoolSpec("pool", "mean"))
        features = make_divisible(self.stages[-1].width * widths[-1])
        return self._with_classifier(space, subnet, parts, features, f"stages.{len(self.stages) - 1}.width")

    def _stem(self, space: SearchSpace, subnet: SubnetConfig, widths: list[float]) -> Iterator[PartSpec]:
        inner = make_divisible(make_divisible(self.stem_width * widths[0]) // 2)
        outer = make_divisible(self.stem_width * widths[1])
        act, mid = _ACTIVATION, "stem.mid"
        yield ConvSpec("stem.0", self.in_channels, inner, 3, self.stem_stride, activation=act, out_group=mid)
        if space.values(subnet, "stem_depth")[0] == self.depths[-1]:
            yield ConvSpec("stem.1", inner, inner, 3, activation=act, in_group=mid, out_group=mid, residual=True)
        yield ConvSpec("stem.2", inner, outer, 3, activation=act, in_group=mid, out_group="stem.width")
        yield PoolSpec("stem.pool", "max")

    def _blocks(self, space: SearchSpace, subnet: SubnetConfig, widths: list[float]) -> Iterator[BottleneckSpec]:
        depths, expands = space.values(subnet, "depth"), space.values(subnet, "expand")
        channels, group, position = make_divisible(self.stem_width * widths[1]), "stem.width", 0
        for number, (stage, added) in enumerate(zip(self.stages, depths, strict=True)):
            width, out_group = make_divisible(stage.width * widths[STEM_WIDTHS + number]), f"stages.{number}.width"
            for block in range(stage.blocks + int(added or 0)):
                yield BottleneckSpec(
                    f"stages.{number}.{block}",
                    channels,
                    make_divisible(round(width * float(expands[position + block] or 0))),
                    width,
                    kernel=3,
                    stride=stage.stride if block == 0 else 1,
                    activation=_ACTIVATION,
                    downsamples=block == 0,
                    in_group=group,
                    out_group=out_group,
                )
                channels, group = width, out_group
            position += stage.blocks + self.depths[-1]


@final
class ResNetSupernet(ElasticSupernet):
    """Elastic depth, expand ratio, width and resolution over one `ResNetSpec`."""

    @classmethod
    def published(cls, generator: torch.Generator | None = None) -> ResNetSupernet:
        """The ImageNet space of Once-for-All, `ofa_supernet_resnet50`: 18 * 351^3 * 3159 configurations."""
        return cls(ResNetSpec(), generator)
