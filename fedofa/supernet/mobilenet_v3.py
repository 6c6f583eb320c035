"""The MobileNetV3 family: the Once-for-All space (arXiv 1908.09791) with every size a parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch

from fedofa.supernet.elastic import ElasticSpec, ElasticSupernet
from fedofa.supernet.mbconv import StageSpec, block_inputs, check_expands, elastic_blocks, static_block
from fedofa.supernet.network import ConvSpec, NetworkSpec, PoolSpec, make_divisible
from fedofa.supernet.sizes import check_sizes
from fedofa.types.space import SearchSpace, SubnetConfig
from fedofa.types.spaces import DEPTHS, EXPANDS, KERNELS, MOBILENET_V3, RESOLUTIONS, mbconv_space

__all__ = ["MobileNetV3Spec", "MobileNetV3Supernet", "StageSpec"]


@final
@dataclass(frozen=True, slots=True)
class MobileNetV3Spec(ElasticSpec):
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
        lite_residual: whether every elastic block has a lite residual branch (see `MBConvSpec.lite`).
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
    kernels: tuple[int, ...] = KERNELS
    expands: tuple[float, ...] = EXPANDS
    depths: tuple[int, ...] = DEPTHS
    resolutions: tuple[int, ...] = RESOLUTIONS
    norm: str = "batch"
    norm_eps: float = 1e-5
    dropout: float = 0.1
    lite_residual: bool = False

    family: ClassVar[str] = MOBILENET_V3
    nested: ClassVar[Mapping[str, type]] = {"stages": StageSpec}

    def __post_init__(self) -> None:
        check_sizes(self, ("stem_width", "first_width", "stages", "final_width"))
        check_expands(self.expands, block_inputs(self.first_width, self.stages, max(self.depths)))

    @property
    def elastic_kernels(self) -> tuple[int, ...]:
        return self.kernels

    def search_space(self) -> SearchSpace:
        return mbconv_space(self.family, len(self.stages), self.kernels, self.expands, self.depths, self.resolutions)

    def network(self, space: SearchSpace, subnet: SubnetConfig) -> NetworkSpec:
        first = static_block(self.stem_width, self.first_width, self.first_stride, "relu")
        blocks = tuple(elastic_blocks(space, subnet, self.stages, self.first_width, lite=self.lite_residual))
        parts = (
            ConvSpec("stem", self.in_channels, self.stem_width, 3, self.stem_stride, activation="h_swish"),
            first,
            *blocks,
            ConvSpec("final", self.stages[-1].width, self.final_width, activation="h_swish"),
            PoolSpec("pool", "mean"),
            ConvSpec("mix", self.final_width, self.feature_width, norm=False, activation="h_swish"),
        )
        return self._with_classifier(space, subnet, parts, self.feature_width)

    def scaled(self, width: float) -> MobileNetV3Spec:
        """The spec with every width multiplied and rounded to a multiple of 8."""
        scale = {
            name: make_divisible(getattr(self, name) * width)
            for name in ("stem_width", "first_width", "final_width", "feature_width")
        }
        return replace(self, **scale, stages=tuple(stage.scaled(width) for stage in self.stages))


@final
class MobileNetV3Supernet(ElasticSupernet):
    """Elastic kernel (with transform matrices), depth, expand ratio and resolution over one `MobileNetV3Spec`."""

    @classmethod
    def published(cls, width: float = 1.0, generator: torch.Generator | None = None) -> MobileNetV3Supernet:
        """The ImageNet space of Once-for-All, `ofa_mbv3_d234_e346_k357_w1.0` (or `_w1.2`): 7371^5 subnets."""
        return cls(MobileNetV3Spec().scaled(width), generator)
