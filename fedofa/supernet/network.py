"""A network as a value: its blocks, and the table of its parameters and channel groups. No torch.

One description feeds everything: the torch skeleton (`layers`), the slice map (`slices`) and the cost model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

NORMS = ("group", "batch")
ACTIVATIONS = ("relu", "relu6", "h_swish", "h_sigmoid")
GROUP_NORM_CHANNELS = 8
"""Channels a group: fixed, so that a subnet's groups are the first groups of the supernet (the norm nests)."""


def make_divisible(channels: float, divisor: int = 8) -> int:
    """Round to a multiple of `divisor`, but never down by more than a tenth (the MobileNet convention)."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * channels else rounded + divisor


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One tensor of a network.

    Args:
        name: its name in the skeleton's state dict, the same in every subnet that has it.
        shape: its shape here.
        groups: for each dimension the channel group it runs over, or None where no subnet is narrower.
        role: "weight", "bias", "norm" (affine of a norm) or "statistic" (running mean or variance: not trained).
    """

    name: str
    shape: tuple[int, ...]
    groups: tuple[str | None, ...]
    role: str

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class ConvSpec:
    """Convolution with "same" padding, then optionally a norm and an activation.

    `in_group` and `out_group` name the channel groups that the channels belong to where they are elastic.
    """

    name: str
    in_channels: int
    out_channels: int
    kernel: int = 1
    stride: int = 1
    depthwise: bool = False
    bias: bool = False
    norm: bool = True
    activation: str | None = None
    in_group: str | None = None
    out_group: str | None = None

    def parameters(self, norm: str) -> Iterator[ParameterSpec]:
        """The convolution's weight and bias, then the norm's tensors."""
        fan_in, in_group = (1, None) if self.depthwise else (self.in_channels, self.in_group)
        shape = (self.out_channels, fan_in, self.kernel, self.kernel)
        yield ParameterSpec(f"{self.name}.conv.weight", shape, (self.out_group, in_group, None, None), "weight")
        channels, groups = (self.out_channels,), (self.out_group,)
        if self.bias:
            yield ParameterSpec(f"{self.name}.conv.bias", channels, groups, "bias")
        if self.norm:
            yield ParameterSpec(f"{self.name}.norm.weight", channels, groups, "norm")
            yield ParameterSpec(f"{self.name}.norm.bias", channels, groups, "norm")
        if self.norm and norm == "batch":
            yield ParameterSpec(f"{self.name}.norm.running_mean", channels, groups, "statistic")
            yield ParameterSpec(f"{self.name}.norm.running_var", channels, groups, "statistic")


@dataclass(frozen=True, slots=True)
class MBConvSpec:
    """Mobile inverted bottleneck: expand, depthwise, optional squeeze-excite, project, optional residual.

    `squeeze_channels` is the squeeze-excite's width, None without one; `expands` is False where the first 1x1 is absent
    (expand ratio 1).
    """

    name: str
    in_channels: int
    mid_channels: int
    out_channels: int
    kernel: int
    stride: int
    activation: str
    squeeze_channels: int | None = None
    expands: bool = True

    @property
    def residual(self) -> bool:
        """Whether the input is added to the output."""
        return self.stride == 1 and self.in_channels == self.out_channels

    @property
    def mid_group(self) -> str | None:
        """The channel group of the block's inner channels; None where they are its input's."""
        return f"{self.name}.mid" if self.expands else None

    @property
    def expand(self) -> ConvSpec | None:
        """The 1x1 convolution that widens."""
        if not self.expands:
            return None
        return ConvSpec(
            f"{self.name}.expand",
            self.in_channels,
            self.mid_channels,
            activation=self.activation,
            out_group=self.mid_group,
        )

    @property
    def depthwise(self) -> ConvSpec:
        """The depthwise convolution, whose kernel may be elastic."""
        return ConvSpec(
            f"{self.name}.depthwise",
            self.mid_channels,
            self.mid_channels,
            kernel=self.kernel,
            stride=self.stride,
            depthwise=True,
            activation=self.activation,
            in_group=self.mid_group,
            out_group=self.mid_group,
        )

    @property
    def squeeze_excite(self) -> tuple[ConvSpec, ConvSpec] | None:
        """The two 1x1 convolutions of the squeeze-excite, on pooled 1 x 1 maps."""
        if self.squeeze_channels is None:
            return None
        mid, squeeze, squeeze_group = self.mid_channels, self.squeeze_channels, f"{self.name}.squeeze"
        reduce = ConvSpec(
            f"{self.name}.squeeze_excite.reduce",
            mid,
            squeeze,
            bias=True,
            norm=False,
            activation="relu",
            in_group=self.mid_group,
            out_group=squeeze_group,
        )
        expand = ConvSpec(
            f"{self.name}.squeeze_excite.expand",
            squeeze,
            mid,
            bias=True,
            norm=False,
            activation="h_sigmoid",
            in_group=squeeze_group,
            out_group=self.mid_group,
        )
        return reduce, expand

    @property
    def project(self) -> ConvSpec:
        """The linear 1x1 convolution that narrows."""
        return ConvSpec(f"{self.name}.project", self.mid_channels, self.out_channels, in_group=self.mid_group)

    def parameters(self, norm: str) -> Iterator[ParameterSpec]:
        """The block's tensors in the order of its forward pass."""
        for conv in (self.expand, self.depthwise, *(self.squeeze_excite or ()), self.project):
            if conv is not None:
                yield from conv.parameters(norm)


@dataclass(frozen=True, slots=True)
class NetworkSpec:
    """A whole classifier: stem, stages of blocks, final 1x1, global pooling, feature mix, linear classifier.

    `norm` is "group" (8 channels a group) or "batch"; `resolution` is the side of the square input in pixels.
    """

    stem: ConvSpec
    stages: tuple[tuple[MBConvSpec, ...], ...]
    final: ConvSpec
    mix: ConvSpec
    num_classes: int
    norm: str
    norm_eps: float
    dropout: float
    resolution: int

    @property
    def blocks(self) -> tuple[MBConvSpec, ...]:
        """All blocks, in order."""
        return tuple(block for stage in self.stages for block in stage)

    def parameters(self) -> Iterator[ParameterSpec]:
        """Every tensor of the network, in the order of its forward pass."""
        for part in (self.stem, *self.blocks, self.final, self.mix):
            yield from part.parameters(self.norm)
        yield from self.classifier_parameters()

    def classifier_parameters(self) -> Iterator[ParameterSpec]:
        """The linear classifier's weight and bias."""
        features = self.mix.out_channels
        yield ParameterSpec("classifier.weight", (self.num_classes, features), (None, None), "weight")
        yield ParameterSpec("classifier.bias", (self.num_classes,), (None,), "bias")
