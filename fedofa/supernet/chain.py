"""The family of described chains: any network of inverted or residual bottlenecks, elastic below its own sizes.

Each block is described by its kernel, expand ratio, width and stride; the largest subnet is exactly the network
described, which is how a pretrained network becomes a supernet (see `pretrained`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, final

import torch

from fedofa.supernet.elastic import ElasticSpec, ElasticSupernet
from fedofa.supernet.network import (
    ACTIVATIONS,
    PADDINGS,
    BlockSpec,
    BottleneckSpec,
    ConvSpec,
    MBConvSpec,
    NetworkSpec,
    PartSpec,
    PoolSpec,
    make_divisible,
)
from fedofa.supernet.sizes import check_numbers, check_sizes
from fedofa.supernet.weights_file import is_normalisation
from fedofa.types.errors import ConfigError
from fedofa.types.space import Axis, Control, SearchSpace, SubnetConfig
from fedofa.types.spaces import RESOLUTIONS

KINDS = ("mbconv", "residual")
FRACTIONS = (0.5, 0.75, 1.0)


@final
@dataclass(frozen=True, slots=True)
class BlockSize:
    """One block of a described chain.

    Args:
        width: output channels.
        kernel: of the depthwise ("mbconv") or the inner ("residual") convolution.
        expand: inner channels as a multiple of the block's input ("mbconv"; 1 means no first convolution and no choice
            of kernel and inner width) or of its output ("residual").
        stride: of that convolution, and of the shortcut's where there is one.
        kind: "mbconv" or "residual".
    """

    width: int
    kernel: int = 3
    expand: float = 1.0
    stride: int = 1
    kind: str = "mbconv"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"supernet.blocks: expected a kind of {list(KINDS)}, found {self.kind!r}")
        check_numbers(self, "supernet.blocks: ")


@final
@dataclass(frozen=True, slots=True)
class ChainSpec(ElasticSpec):
    """A chain of blocks and what is elastic in it.

    A stage is a run of blocks of which each but the first keeps its input's shape; a stage is made shallower by leaving
    out its last blocks. Without `mean` and `std` inputs are normalised as the data are.

    Args:
        blocks: in forward order.
        in_channels, num_classes: of the images and the labels.
        stem_width, stem_kernel, stem_stride: of the first convolution.
        stem_pool: whether 3 x 3 max pooling of stride 2 follows it.
        feature_width: channels of the last 1x1 convolution before global pooling; 0 for none.
        activation: of all layers that have one.
        padding: "symmetric" or "tensorflow" (see `network.ConvSpec`).
        kernels: an inverted bottleneck whose kernel is one of them may take any that is not larger.
        fractions: of a block's inner channels that a subnet may keep, rounded to multiples of 8; the last is 1.
        min_depth: blocks that every subnet keeps of a stage, if it has so many.
        resolutions: sides of the input.
        norm: "batch" or "group" (8 channels a group).
        norm_eps, dropout: of the norms and of the classifier.
        mean, std: per channel, of pixels scaled to [0, 1], that inputs are normalised by.
    """

    blocks: tuple[BlockSize, ...]
    in_channels: int = 3
    num_classes: int = 1000
    stem_width: int = 32
    stem_kernel: int = 3
    stem_stride: int = 2
    stem_pool: bool = False
    feature_width: int = 1280
    activation: str = "relu6"
    padding: str = "symmetric"
    kernels: tuple[int, ...] = (3, 5)
    fractions: tuple[float, ...] = FRACTIONS
    min_depth: int = 1
    resolutions: tuple[int, ...] = RESOLUTIONS
    norm: str = "batch"
    norm_eps: float = 1e-5
    dropout: float = 0.2
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    lite_residual: bool = False

    family: ClassVar[str] = "chain"
    nested: ClassVar[Mapping[str, type]] = {"blocks": BlockSize}

    def __post_init__(self) -> None:
        check_sizes(self, ("stem_width", "blocks", "feature_width"), least={"feature_width": 0})
        for name, known in (("activation", ACTIVATIONS), ("padding", PADDINGS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"supernet.{name}: expected one of {list(known)}, found {getattr(self, name)!r}")
        if not (all(0 < item <= 1 for item in self.fractions) and self.fractions[-1] == 1):
            raise ConfigError(f"supernet.fractions: expected numbers in (0, 1], 1 last, found {list(self.fractions)}")
        _check_normalisation(self)
        _check_inner_widths(self)

    @property
    def elastic_kernels(self) -> tuple[int, ...]:
        return self.kernels if any(place.kernel is not None for place in places(self)) else ()

    @property
    def normalisation(self) -> dict[str, list[float]] | None:
        """Per-channel "mean" and "std" of pixels scaled to [0, 1]; None where the data's own serve."""
        return {"mean": list(self.mean), "std": list(self.std)} if self.mean else None

    def search_space(self) -> SearchSpace:
        """Axes depth (each stage that has a choice), kernel and expand (each block that has one), resolution.

        The values of expand are the fractions.
        """
        found = places(self)
        lengths = [len(stage) for stage in _stages(self.blocks) if len(stage) > self.min_depth]
        depths = range(self.min_depth, max(lengths, default=self.min_depth) + 1)
        kernels = [place for place in found if place.kernel is not None]
        axes = (
            Axis("depth", tuple(depths), (None,) * len(lengths), limits=tuple(n + 1 - depths[0] for n in lengths)),
            Axis(
                "kernel",
                self.kernels,
                tuple(place.control for place in kernels),
                limits=tuple(self.kernels.index(place.size.kernel) + 1 for place in kernels),
            ),
            Axis("expand", self.fractions, tuple(place.control for place in found if place.expand is not None)),
            Axis.free("resolution", self.resolutions, 1, is_input=True),
        )
        return SearchSpace(self.family, [axis for axis in axes if axis.controls])

    def network(self, space: SearchSpace, subnet: SubnetConfig) -> NetworkSpec:
        blocks = tuple(self._blocks(space, subnet))
        last = blocks[-1].out_channels
        parts: list[PartSpec] = [
            ConvSpec(
                "stem",
                self.in_channels,
                self.stem_width,
                self.stem_kernel,
                self.stem_stride,
                activation=self.activation,
                padding=self.padding,
            )
        ]
        if self.stem_pool:
            parts.append(PoolSpec("stem_pool", "max"))
        parts += blocks
        if self.feature_width:
            parts.append(ConvSpec("mix", last, self.feature_width, activation=self.activation))
        parts.append(PoolSpec("pool", "mean"))
        return self._with_classifier(space, subnet, parts, self.feature_width or last)

    def _blocks(self, space: SearchSpace, subnet: SubnetConfig) -> Iterator[BlockSpec]:
        chosen = {axis.name: space.values(subnet, axis.name) for axis in space.axes}
        for place in places(self):
            if place.control is not None and not _exists(place.control, chosen["depth"]):
                continue
            kernel = place.size.kernel if place.kernel is None else int(chosen["kernel"][place.kernel] or 0)
            fraction = 1.0 if place.expand is None else float(chosen["expand"][place.expand] or 0)
            yield self._block(place, kernel, inner_width(place.mid_channels, fraction))

    def _block(self, place: Place, kernel: int, mid_channels: int) -> BlockSpec:
        size = place.size
        sizes = (place.name, place.in_channels, mid_channels, size.width, kernel, size.stride, self.activation)
        if size.kind == "residual":
            changes = size.stride != 1 or place.in_channels != size.width
            return BottleneckSpec(*sizes, downsamples=changes, averages=False, padding=self.padding)
        expands = size.expand != 1
        return MBConvSpec(*sizes, expands=expands, padding=self.padding, has_lite=self.lite_residual and expands)


@final
@dataclass(frozen=True, slots=True)
class Place:
    """A block of the whole chain.

    Args:
        name: of the block in the skeleton, "stages.<stage>.<block>".
        size: as described.
        in_channels, mid_channels: of the whole block.
        control: when it exists; None for always.
        kernel, expand: its position on these axes; None where it has no choice.
    """

    name: str
    size: BlockSize
    in_channels: int
    mid_channels: int
    control: Control | None
    kernel: int | None
    expand: int | None


@lru_cache(maxsize=64)
def places(spec: ChainSpec) -> tuple[Place, ...]:
    """Every block of the chain, in order, with its positions on the axes."""
    found, channels = [], spec.stem_width
    depths, kernels, expands = itertools.count(), itertools.count(), itertools.count()
    for stage, blocks in enumerate(_stages(spec.blocks)):
        depth = next(depths) if len(blocks) > spec.min_depth else 0
        for number, size in enumerate(blocks):
            residual = size.kind == "residual"
            elastic = residual or size.expand != 1
            smaller = size.kernel in spec.kernels and size.kernel > min(spec.kernels)
            place = Place(
                f"stages.{stage}.{number}",
                size,
                channels,
                round(size.expand * (size.width if residual else channels)),
                Control("depth", depth, number + 1) if number >= spec.min_depth else None,
                next(kernels) if elastic and smaller and not residual else None,
                next(expands) if elastic and len(spec.fractions) > 1 else None,
            )
            found.append(place)
            channels = size.width
    return tuple(found)


def inner_width(channels: int, fraction: float) -> int:
    """The inner channels that a fraction keeps: a multiple of 8, or all."""
    return channels if fraction == 1 else min(channels, make_divisible(channels * fraction))


def _stages(blocks: tuple[BlockSize, ...]) -> list[list[BlockSize]]:
    """The blocks in runs; a run starts with each block that changes stride, width or kind."""
    stages: list[list[BlockSize]] = []
    for block in blocks:
        last = stages[-1][-1] if stages else None
        if last is None or block.stride != 1 or (block.width, block.kind) != (last.width, last.kind):
            stages.append([])
        stages[-1].append(block)
    return stages


def _exists(control: Control, depths: tuple[float | None, ...]) -> bool:
    return (depths[control.position] or 0) >= control.minimum


def _check_normalisation(spec: ChainSpec) -> None:
    """Refuse a mean and a std of a spec that is being made unless they are one, and make plain floats of them."""
    given = {"mean": spec.mean, "std": spec.std}
    for name, values in given.items():
        if not isinstance(values, tuple):
            raise ConfigError(f"supernet.{name}: expected a list, found {values!r:.80}")
    for name, values in given.items():
        if len(values) not in (0, spec.in_channels) or len(spec.mean) != len(spec.std):
            raise ConfigError(
                f"supernet.{name}: expected one value for each of {spec.in_channels} channels, in both mean and "
                f"std or in neither for the data's own, found {list(values)!r:.200}"
            )
    if spec.mean and not is_normalisation(given):
        raise ConfigError(
            f"supernet.mean and supernet.std: expected finite numbers, those of std positive, found {given!r:.200}"
        )
    for name, values in given.items():
        object.__setattr__(spec, name, tuple(map(float, values)))


def _check_inner_widths(spec: ChainSpec) -> None:
    for place in places(spec):
        if place.mid_channels < 1:
            raise ConfigError(
                f"supernet.blocks: expand: {place.size.expand} leaves {place.name!r} without inner channels; expected "
                "at least one"
            )
        kept = [inner_width(place.mid_channels, fraction) for fraction in spec.fractions]
        if place.expand is not None and len(set(kept)) < len(kept):
            raise ConfigError(
                f"supernet.fractions: {list(spec.fractions)} of the {place.mid_channels} inner channels of "
                f"{place.name!r} are {kept}, rounded to multiples of 8; every fraction must give another width"
            )
        if spec.norm == "group" and place.mid_channels % 8:
            raise ConfigError(
                f"supernet.blocks: group norm needs inner channels in multiples of 8, found {place.mid_channels} in "
                f"{place.name!r}"
            )


@final
class ChainSupernet(ElasticSupernet):
    """Elastic depth, inner width, depthwise kernel (with transform matrices) and resolution over one `ChainSpec`."""

    def __init__(self, spec: ChainSpec, generator: torch.Generator | None = None) -> None:
        super().__init__(spec, generator)
        self.spec: ChainSpec = spec
        self.normalisation = spec.normalisation
