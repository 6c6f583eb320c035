"""The convolutions inside an operator, with their maps: what memory on the chip and energy are counted from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fedofa.device.operators import Operator
from fedofa.supernet.network import BottleneckSpec, ConvSpec, MBConvSpec, PoolSpec


@dataclass(frozen=True, slots=True)
class Layer:
    """One convolution with its norm and activation, which a deployed network computes in one go.

    Args:
        conv: the convolution; the classifier is a 1 x 1 one.
        in_side, out_side: of its maps.
        held_elements: values that later layers need and that are neither its input nor its result.
    """

    conv: ConvSpec
    in_side: int
    out_side: int
    held_elements: int = 0

    @property
    def input_elements(self) -> int:
        """Values of the input."""
        return self.conv.in_channels * self.in_side**2

    @property
    def output_elements(self) -> int:
        """Values of the result."""
        return self.conv.out_channels * self.out_side**2

    @property
    def live_elements(self) -> int:
        """Values that have to be there while it runs."""
        return self.input_elements + self.output_elements + self.held_elements

    @property
    def fan_in(self) -> int:
        """Input channels that one output channel sees."""
        return 1 if self.conv.depthwise else self.conv.in_channels

    @property
    def weight_elements(self) -> int:
        """Values of the kernel."""
        return self.conv.out_channels * self.fan_in * self.conv.kernel**2

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return self.weight_elements * self.out_side**2


def layers_of(operator: Operator) -> Iterator[Layer]:
    """The convolutions of an operator, in forward order; pooling has none."""
    part, side, out_side = operator.part, operator.in_side, operator.out_side
    match part:
        case ConvSpec():
            yield Layer(part, side, out_side)
        case MBConvSpec():
            yield from _mbconv(part, operator, side, out_side)
        case BottleneckSpec():
            yield from _bottleneck(part, operator, side, out_side)
        case PoolSpec():
            return


def _mbconv(part: MBConvSpec, operator: Operator, side: int, out_side: int) -> Iterator[Layer]:
    held = operator.input_elements if part.residual else 0
    if part.expand is not None:
        yield Layer(part.expand, side, side)
    yield Layer(part.depthwise, side, out_side, held if part.expands else 0)
    if part.squeeze_excite is not None:
        gated = part.mid_channels * out_side**2
        for conv in part.squeeze_excite:
            yield Layer(conv, 1, 1, held + gated)
    yield Layer(part.project, out_side, out_side, held)
    if part.lite is not None:
        pooled = -(-side // 2)
        for conv in part.lite:
            yield Layer(conv, pooled, pooled, operator.output_elements)


def _bottleneck(part: BottleneckSpec, operator: Operator, side: int, out_side: int) -> Iterator[Layer]:
    yield Layer(part.reduce, side, side)
    yield Layer(part.spatial, side, out_side, operator.input_elements)
    yield Layer(part.project, out_side, out_side, operator.input_elements)
    if part.downsample is not None:
        averaged = part.averages and part.stride > 1
        yield Layer(part.downsample, out_side if averaged else side, out_side, operator.output_elements)
