"""Stages of mobile inverted bottlenecks: what MobileNetV3 and ProxylessNAS have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from fedofa.supernet.network import ACTIVATIONS, MBConvSpec, make_divisible
from fedofa.supernet.sizes import check_numbers
from fedofa.types.errors import ConfigError
from fedofa.types.space import SearchSpace, SubnetConfig

SQUEEZE_RATIO = 4


@dataclass(frozen=True, slots=True)
class StageSpec:
    """One stage: its output width, the stride of its first block, its activation, squeeze-excite or not."""

    width: int
    stride: int
    activation: str
    squeeze_excite: bool

    def __post_init__(self) -> None:
        check_numbers(self, "supernet.stages: ")
        if self.activation not in ACTIVATIONS:
            raise ConfigError(
                f"supernet.stages: expected an activation of {list(ACTIVATIONS)}, found {self.activation!r}"
            )

    def scaled(self, width: float) -> StageSpec:
        """The stage with its output width multiplied."""
        return StageSpec(make_divisible(self.width * width), self.stride, self.activation, self.squeeze_excite)


def inner_width(channels: int, expand: float) -> int:
    """The inner channels of a block: its input's times the expand ratio, a multiple of 8."""
    return make_divisible(round(channels * expand))


def check_expands(expands: Sequence[float], inputs: Iterable[int]) -> None:
    """Refuse expand ratios that give a block the same inner width twice.

    Args:
        expands: the ratios.
        inputs: channels that a block may get.

    Raises:
        ConfigError: naming the ratios and the widths.
    """
    for channels in inputs:
        widths = [inner_width(channels, expand) for expand in expands]
        if len(set(widths)) < len(widths):
            raise ConfigError(
                f"supernet.expands: {list(expands)} times the {channels} channels of a block's input are {widths}, "
                "rounded to multiples of 8; every ratio must give another width"
            )


def block_inputs(first_width: int, stages: Sequence[StageSpec], depth: int) -> set[int]:
    """Channels that an elastic block may get: those before its stage or, in a stage of several blocks, its own."""
    widths = [first_width, *(stage.width for stage in stages)]
    return {*widths[:-1], *(widths[1:] if depth > 1 else ())}


def static_block(in_channels: int, out_channels: int, stride: int, activation: str) -> MBConvSpec:
    """The first block, the same in every subnet: "stages.0.0", kernel 3, no expansion."""
    return MBConvSpec(
        "stages.0.0",
        in_channels,
        in_channels,
        out_channels,
        kernel=3,
        stride=stride,
        activation=activation,
        expands=False,
    )


def elastic_blocks(
    space: SearchSpace, subnet: SubnetConfig, stages: Sequence[StageSpec], channels: int, *, lite: bool
) -> Iterator[MBConvSpec]:
    """The blocks of all stages after the static one, "stages.1.0" and on.

    Args:
        space, subnet: a `mbconv_space` and one of its configurations.
        stages: those of elastic depth, then those that have one block in every subnet.
        channels: that the first of them gets.
        lite: whether every block has a lite residual branch.
    """
    depths = space.values(subnet, "depth")
    kernels, expands = space.values(subnet, "kernel"), space.values(subnet, "expand")
    position = 0
    for number, stage in enumerate(stages):
        longest = int(space.axis("depth").values[-1]) if number < len(depths) else 1
        for block in range(int(depths[number] or 0) if number < len(depths) else 1):
            kernel, expand = int(kernels[position + block] or 0), float(expands[position + block] or 0)
            mid = inner_width(channels, expand)
            yield MBConvSpec(
                f"stages.{number + 1}.{block}",
                channels,
                mid,
                stage.width,
                kernel=kernel,
                stride=stage.stride if block == 0 else 1,
                activation=stage.activation,
                squeeze_channels=make_divisible(mid // SQUEEZE_RATIO) if stage.squeeze_excite else None,
                has_lite=lite,
            )
            channels = stage.width
        position += longest
