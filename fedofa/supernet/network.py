"""A network as a value: a chain of parts, and the table of its parameters and channel groups. No torch.

One description feeds everything: the torch skeleton (`layers`), the slice map (`slices`) and the cost model (`costs`).
Families differ in which parts they chain and in their sizes; a new kind of part is a dataclass here, a layer there and
a walk in the cost model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

NORMS = ("group", "batch")
ACTIVATIONS = ("relu", "relu6", "h_swish", "h_sigmoid")
PADDINGS = ("symmetric", "tensorflow")
GROUP_NORM_CHANNELS = 8
"""Channels a group: fixed, so that a subnet's groups are the first groups of the supernet (the norm nests)."""

CLASSIFIER_PREFIX = "classifier."
"""What the names of the classifier's tensors begin with."""

LITE_KERNEL, LITE_NORM = 5, "group"
"""Kernel size and norm of lite residual branches."""


def make_divisible(channels: float, divisor: int = 8) -> int:
    """Round to a multiple of `divisor`, but never down by more than a tenth (the MobileNet convention)."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * channels else rounded + divisor


def same_padding(side: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after a side with which a convolution gives `ceil(side / stride)` values, as TensorFlow does it.

    Where their number is odd, the one more is after; at stride 1 an odd kernel has `kernel // 2` on both sides.
    """
    total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
    return total // 2, total - total // 2


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
    """Convolution with "same" padding, then optionally a norm and an activation, and its input added with `residual`.

    `in_group` and `out_group` name the channel groups that the channels belong to where they are elastic. `padding`
    says where the zeros lie: "symmetric", `kernel // 2` on every side, or "tensorflow" (see `same_padding`).
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
    residual: bool = False
    padding: str = "symmetric"

    @property
    def pads(self) -> bool:
        """Whether its input is padded before it, since a convolution's own padding is the same on every side."""
        return self.padding == "tensorflow" and self.stride > 1

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
    (expand ratio 1); `has_lite` adds the result of a lite residual branch (see `lite`).
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
    padding: str = "symmetric"
    has_lite: bool = False

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
            padding=self.padding,
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

    @property
    def lite(self) -> tuple[ConvSpec, ConvSpec] | None:
        """The lite residual branch of TinyTL (arXiv 2007.11622, section 3.2): two convolutions on half the resolution.

        The first is depthwise, the cheapest of grouped convolutions and one of which a slice of channels is a slice.
        Both have group norm whatever norm the network has, since they are made to train on single examples.
        """
        if not self.has_lite:
            return None
        spatial = ConvSpec(
            f"{self.name}.lite.spatial",
            self.in_channels,
            self.in_channels,
            kernel=LITE_KERNEL,
            depthwise=True,
            activation=self.activation,
        )
        return spatial, ConvSpec(f"{self.name}.lite.project", self.in_channels, self.out_channels)

    @property
    def readers(self) -> Iterator[tuple[str, str]]:
        """Each inner channel group, and the name of the weight that reads it (see `importance`)."""
        if self.mid_group is not None:
            yield self.mid_group, f"{self.project.name}.conv.weight"
        if self.squeeze_excite is not None:
            yield f"{self.name}.squeeze", f"{self.squeeze_excite[1].name}.conv.weight"

    def parameters(self, norm: str) -> Iterator[ParameterSpec]:
        """The block's tensors in the order of its forward pass."""
        for conv in (self.expand, self.depthwise, *(self.squeeze_excite or ()), self.project):
            if conv is not None:
                yield from conv.parameters(norm)
        for conv in self.lite or ():
            yield from conv.parameters(LITE_NORM)


@dataclass(frozen=True, slots=True)
class BottleneckSpec:
    """Residual bottleneck: 1x1 reduce, k x k, 1x1 project, plus the input, then the activation.

    With `downsamples` the input is averaged over `stride` x `stride` windows and sent through a 1x1 convolution before
    it is added (ResNet-D, arXiv 1812.01187, section 4.2), or with `averages` False through a 1x1 convolution of that
    stride (arXiv 1512.03385, option B); without, input and output have the same shape.
    """

    name: str
    in_channels: int
    mid_channels: int
    out_channels: int
    kernel: int
    stride: int
    activation: str
    downsamples: bool
    in_group: str | None = None
    out_group: str | None = None
    averages: bool = True
    padding: str = "symmetric"

    @property
    def residual(self) -> bool:
        """Whether the input is added as it is."""
        return not self.downsamples

    @property
    def reduce(self) -> ConvSpec:
        """The 1x1 convolution that narrows."""
        return ConvSpec(
            f"{self.name}.reduce",
            self.in_channels,
            self.mid_channels,
            activation=self.activation,
            in_group=self.in_group,
            out_group=f"{self.name}.mid",
        )

    @property
    def spatial(self) -> ConvSpec:
        """The k x k convolution."""
        return ConvSpec(
            f"{self.name}.spatial",
            self.mid_channels,
            self.mid_channels,
            kernel=self.kernel,
            stride=self.stride,
            activation=self.activation,
            in_group=f"{self.name}.mid",
            out_group=f"{self.name}.inner",
            padding=self.padding,
        )

    @property
    def project(self) -> ConvSpec:
        """The linear 1x1 convolution that widens."""
        return ConvSpec(
            f"{self.name}.project",
            self.mid_channels,
            self.out_channels,
            in_group=f"{self.name}.inner",
            out_group=self.out_group,
        )

    @property
    def downsample(self) -> ConvSpec | None:
        """The linear 1x1 convolution of the input, averaged or not."""
        if not self.downsamples:
            return None
        return ConvSpec(
            f"{self.name}.downsample",
            self.in_channels,
            self.out_channels,
            stride=1 if self.averages else self.stride,
            in_group=self.in_group,
            out_group=self.out_group,
        )

    @property
    def readers(self) -> Iterator[tuple[str, str]]:
        """Each inner channel group, and the name of the weight that reads it (see `importance`)."""
        yield f"{self.name}.mid", f"{self.spatial.name}.conv.weight"
        yield f"{self.name}.inner", f"{self.project.name}.conv.weight"

    def parameters(self, norm: str) -> Iterator[ParameterSpec]:
        """The block's tensors in the order of its forward pass."""
        for conv in (self.reduce, self.spatial, self.project, self.downsample):
            if conv is not None:
                yield from conv.parameters(norm)


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """Pooling without weights: "max" over 3 x 3 with stride 2, or "mean" over the whole map to 1 x 1."""

    name: str
    kind: str

    def parameters(self, norm: str) -> Iterator[ParameterSpec]:
        """None."""
        return iter(())


def is_lite(name: str) -> bool:
    """Whether a tensor belongs to a lite residual branch, which networks trained elsewhere do not have."""
    return ".lite." in name


BlockSpec = MBConvSpec | BottleneckSpec
PartSpec = ConvSpec | BlockSpec | PoolSpec


@lru_cache(maxsize=4096)
def part_parameters(part: PartSpec, norm: str) -> tuple[ParameterSpec, ...]:
    """The tensors of one part, kept: a space has few distinct parts, of which all its subnets are chained."""
    return tuple(part.parameters(norm))


@dataclass(frozen=True, slots=True)
class NetworkSpec:
    """A whole classifier: a chain of parts, dropout, a linear classifier.

    Args:
        parts: in forward order, each fed with the result of the one before; the last leaves a 1 x 1 map. Names are
            dotted paths in the skeleton and follow its tree ("stem", "stages.0.0", "stages.0.1", "mix").
        features: channels that reach the classifier; `feature_group` is their channel group where they are elastic.
        num_classes: of the classifier.
        norm: "group" (8 channels a group; nests and needs no calibration) or "batch".
        norm_eps: of every norm.
        dropout: probability before the classifier.
        in_channels, resolution: of the square input.
    """

    in_channels: int
    parts: tuple[PartSpec, ...]
    features: int
    num_classes: int
    norm: str
    norm_eps: float
    dropout: float
    resolution: int
    feature_group: str | None = None

    @property
    def blocks(self) -> tuple[BlockSpec, ...]:
        """The repeated blocks, in order."""
        return tuple(part for part in self.parts if isinstance(part, BlockSpec))

    @property
    def normed_groups(self) -> frozenset[str]:
        """The channel groups that a norm runs over."""
        return frozenset(group for item in self.parameters() if item.role == "norm" for group in item.groups if group)

    def parameters(self) -> Iterator[ParameterSpec]:
        """Every tensor of the network, in the order of its forward pass."""
        for part in self.parts:
            yield from part_parameters(part, self.norm)
        yield from self.classifier_parameters()

    def classifier_parameters(self) -> Iterator[ParameterSpec]:
        """The linear classifier's weight and bias."""
        shape = (self.num_classes, self.features)
        yield ParameterSpec("classifier.weight", shape, (None, self.feature_group), "weight")
        yield ParameterSpec("classifier.bias", (self.num_classes,), (None,), "bias")
