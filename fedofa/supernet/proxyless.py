"""The ProxylessNAS family: inverted bottlenecks with ReLU6 and without squeeze-excite, the last stage of one block."""

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
from fedofa.types.spaces import DEPTHS, EXPANDS, KERNELS, PROXYLESS, RESOLUTIONS, mbconv_space

_ACTIVATION = "relu6"
_LAST_STAGE = StageSpec(320, 1, _ACTIVATION, False)


@final
@dataclass(frozen=True, slots=True)
class ProxylessSpec(ElasticSpec):
    """Sizes of one ProxylessNAS space. The defaults are the published ImageNet network at width 1.

    Args:
        in_channels, num_classes: of the images and the labels.
        stem_width, stem_stride: of the first convolution (3 x 3).
        first_width, first_stride: of the static first block (expand ratio 1, kernel 3).
        stages: the stages of elastic depth.
        last_stage: the stage after them, of one block with elastic kernel and expand ratio.
        feature_width: channels of the last 1x1 convolution before global pooling.
        kernels, expands, depths, resolutions: the allowed values of the four axes.
        norm: "batch" or "group" (8 channels a group).
        norm_eps, dropout: of the norms and of the classifier.
        lite_residual: whether every elastic block has a lite residual branch (see `MBConvSpec.lite`).
    """

    in_channels: int = 3
    num_classes: int = 1000
    stem_width: int = 32
    stem_stride: int = 2
    first_width: int = 16
    first_stride: int = 1
    stages: tuple[StageSpec, ...] = (
        StageSpec(24, 2, _ACTIVATION, False),
        StageSpec(40, 2, _ACTIVATION, False),
        StageSpec(80, 2, _ACTIVATION, False),
        StageSpec(96, 1, _ACTIVATION, False),
        StageSpec(192, 2, _ACTIVATION, False),
    )
    last_stage: StageSpec = _LAST_STAGE
    feature_width: int = 1280
    kernels: tuple[int, ...] = KERNELS
    expands: tuple[float, ...] = EXPANDS
    depths: tuple[int, ...] = DEPTHS
    resolutions: tuple[int, ...] = RESOLUTIONS
    norm: str = "batch"
    norm_eps: float = 1e-3
    dropout: float = 0.1
    lite_residual: bool = False

    family: ClassVar[str] = PROXYLESS
    nested: ClassVar[Mapping[str, type]] = {"stages": StageSpec, "last_stage": StageSpec}

    def __post_init__(self) -> None:
        check_sizes(self, ("stem_width", "first_width", "stages", "last_stage", "feature_width"))
        inputs = block_inputs(self.first_width, self.stages, max(self.depths)) | {self.stages[-1].width}
        check_expands(self.expands, inputs)

    @property
    def elastic_kernels(self) -> tuple[int, ...]:
        return self.kernels

    def search_space(self) -> SearchSpace:
        return mbconv_space(
            self.family, len(self.stages), self.kernels, self.expands, self.depths, self.resolutions, tail_blocks=1
        )

    def network(self, space: SearchSpace, subnet: SubnetConfig) -> NetworkSpec:
        first = static_block(self.stem_width, self.first_width, self.first_stride, _ACTIVATION)
        blocks = tuple(
            elastic_blocks(space, subnet, (*self.stages, self.last_stage), self.first_width, lite=self.lite_residual)
        )
        parts = (
            ConvSpec("stem", self.in_channels, self.stem_width, 3, self.stem_stride, activation=_ACTIVATION),
            first,
            *blocks,
            ConvSpec("mix", self.last_stage.width, self.feature_width, activation=_ACTIVATION),
            PoolSpec("pool", "mean"),
        )
        return self._with_classifier(space, subnet, parts, self.feature_width)

    def scaled(self, width: float) -> ProxylessSpec:
        """The spec with every width multiplied and rounded to a multiple of 8."""
        scale = {
            name: make_divisible(getattr(self, name) * width) for name in ("stem_width", "first_width", "feature_width")
        }
        stages = tuple(stage.scaled(width) for stage in self.stages)
        return replace(self, **scale, stages=stages, last_stage=self.last_stage.scaled(width))


@final
class ProxylessSupernet(ElasticSupernet):
    """Elastic kernel (with transform matrices), depth, expand ratio and resolution over one `ProxylessSpec`."""

    @classmethod
    def published(cls, width: float = 1.3, generator: torch.Generator | None = None) -> ProxylessSupernet:
        """The ImageNet space of Once-for-All, `ofa_proxyless_d234_e346_k357_w1.3`: 9 * 7371^5 subnets."""
        return cls(ProxylessSpec().scaled(width), generator)
