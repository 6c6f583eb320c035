"""What a network costs, block by block and counted, not measured: MACs, parameters, what autograd keeps. No torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from fedofa.supernet.network import (
    GROUP_NORM_CHANNELS,
    LITE_NORM,
    BottleneckSpec,
    ConvSpec,
    MBConvSpec,
    NetworkSpec,
    ParameterSpec,
    PartSpec,
    PoolSpec,
    same_padding,
)

CLASSIFIER = "classifier"
"""The name of the linear layer that every network ends with."""


@dataclass(frozen=True, slots=True)
class BlockCost:
    """One block of a network, for one example.

    Args:
        name: the block's name in the skeleton ("stem", "stages.1.0", "classifier").
        macs: multiply-accumulates of a forward pass.
        saved_elements: fp32 values that stock autograd keeps for the backward pass when the block is in the graph. A
            result that the next block keeps as its input is counted there.
        input_elements, output_elements: size of its input and output.
        widest_elements: size of the largest tensor inside.
        parameters: its trainable tensors.
        num_statistics: values of its batch-norm statistics, which travel to the client but do not train.
        step_elements: fp32 values that a step keeps whatever its batch is: kernels that are composed in the forward
            pass.
    """

    name: str
    macs: int
    saved_elements: int
    input_elements: int
    output_elements: int
    widest_elements: int
    parameters: tuple[ParameterSpec, ...]
    num_statistics: int = 0
    step_elements: int = 0

    @property
    def num_parameters(self) -> int:
        """Trainable values in the block."""
        return sum(item.numel for item in self.parameters)


@dataclass(slots=True)
class _Tape:
    """Follows one example through a block's operations and notes which tensors stock autograd keeps.

    A convolution keeps its input (padded, where that is done before it), a norm its input and its statistics, ReLU its
    result, hard swish and hard sigmoid their input, a product both factors. A tensor kept twice counts once.
    """

    norm: str
    macs: int = 0
    widest: int = 0
    sizes: list[int] = field(default_factory=list)
    kept: set[int] = field(default_factory=set)

    def tensor(self, elements: int) -> int:
        """Note a new tensor; returns its number."""
        self.sizes.append(elements)
        self.widest = max(self.widest, elements)
        return len(self.sizes) - 1

    def conv(self, x: int, spec: ConvSpec, side: int, norm: str | None = None) -> tuple[int, int]:
        """Convolution, norm (the network's, or the one given), activation on a square map; the result and its side."""
        out_side = -(-side // spec.stride)
        zeros = sum(same_padding(side, spec.kernel, spec.stride)) if spec.pads else 0
        self.kept.add(self.tensor(spec.in_channels * (side + zeros) ** 2) if zeros else x)
        fan_in = 1 if spec.depthwise else spec.in_channels
        self.macs += out_side**2 * spec.out_channels * fan_in * spec.kernel**2
        y = self.tensor(spec.out_channels * out_side**2)
        if spec.norm:
            self.kept.add(y)
            if (norm or self.norm) == "group":
                self.kept.add(self.tensor(2 * spec.out_channels // GROUP_NORM_CHANNELS))
            y = self.tensor(self.sizes[y])
        if spec.activation is not None:
            y = self.activation(y, spec.activation)
        return y, out_side

    def activation(self, x: int, name: str) -> int:
        """The activation's result; ReLU keeps it, the others their input."""
        result = self.tensor(self.sizes[x])
        self.kept.add(result if name == "relu" else x)
        return result

    def cost(self, name: str, x: int, y: int, parameters: Iterable[ParameterSpec], *, own_output: bool) -> BlockCost:
        """Close the tape; `x` is the block's input, `y` its output, which counts here where no other block keeps it."""
        table = tuple(parameters)
        trainable = tuple(item for item in table if item.role != "statistic")
        statistics = sum(item.numel for item in table if item.role == "statistic")
        saved = sum(self.sizes[number] for number in self.kept if own_output or number != y)
        return BlockCost(name, self.macs, saved, self.sizes[x], self.sizes[y], self.widest, trainable, statistics)


def _mbconv(tape: _Tape, block: MBConvSpec, x: int, side: int) -> tuple[int, int]:
    y, in_side = x, side
    if block.expand is not None:
        y, _ = tape.conv(y, block.expand, side)
    y, side = tape.conv(y, block.depthwise, side)
    if block.squeeze_excite is not None:
        reduce, expand = block.squeeze_excite
        gate, _ = tape.conv(tape.tensor(block.mid_channels), reduce, 1)
        gate, _ = tape.conv(gate, expand, 1)
        tape.kept |= {y, gate}
        y = tape.tensor(tape.sizes[y])
    y, side = tape.conv(y, block.project, side)
    if block.lite is not None:
        _lite(tape, block.lite, x, in_side)
        y = tape.tensor(tape.sizes[y])
    return y, side


def _lite(tape: _Tape, branch: tuple[ConvSpec, ConvSpec], x: int, side: int) -> None:
    """A lite residual branch; stock average pooling keeps its input, interpolation and sums keep nothing."""
    tape.kept.add(x)
    y, side = tape.tensor(branch[0].in_channels * (-(-side // 2)) ** 2), -(-side // 2)
    for conv in branch:
        y, side = tape.conv(y, conv, side, LITE_NORM)


def _bottleneck(tape: _Tape, block: BottleneckSpec, x: int, side: int) -> tuple[int, int]:
    y, _ = tape.conv(x, block.reduce, side)
    y, out_side = tape.conv(y, block.spatial, side)
    y, _ = tape.conv(y, block.project, out_side)
    if block.downsample is not None:
        if block.averages and block.stride > 1:
            x, side = tape.tensor(block.in_channels * out_side**2), out_side
        tape.conv(x, block.downsample, side)
    return tape.activation(tape.tensor(tape.sizes[y]), block.activation), out_side


def _conv(tape: _Tape, spec: ConvSpec, x: int, side: int) -> tuple[int, int]:
    y, side = tape.conv(x, spec, side)
    return (tape.tensor(tape.sizes[y]) if spec.residual else y), side


def _max_pool(tape: _Tape, channels: int, x: int, side: int) -> tuple[int, int]:
    side = -(-side // 2)
    y = tape.tensor(channels * side**2)
    indices = tape.tensor(2 * channels * side**2)  # of 64 bits
    tape.kept |= {x, indices}
    return y, side


@lru_cache(maxsize=65536)
def _part_cost(part: PartSpec, norm: str, channels: int, side: int, own_output: bool) -> tuple[BlockCost, int]:
    tape = _Tape(norm)
    x = tape.tensor(channels * side**2)
    match part:
        case MBConvSpec():
            y, side = _mbconv(tape, part, x, side)
        case BottleneckSpec():
            y, side = _bottleneck(tape, part, x, side)
        case ConvSpec():
            y, side = _conv(tape, part, x, side)
        case PoolSpec():
            y, side = _max_pool(tape, channels, x, side)
    return tape.cost(part.name, x, y, part.parameters(norm), own_output=own_output), side


@dataclass(frozen=True, slots=True)
class PlacedPart:
    """A part of a network where it stands.

    Args:
        part: the part; the linear classifier is a 1 x 1 convolution with a bias and without a norm.
        in_channels, in_side: of its input.
        out_channels, out_side: of its result.
        cost: what it costs; None for pooling to 1 x 1.
    """

    part: PartSpec
    in_channels: int
    in_side: int
    out_channels: int
    out_side: int
    cost: BlockCost | None


def place_parts(spec: NetworkSpec) -> Iterator[PlacedPart]:
    """Every part of a network at its resolution, in forward order, the classifier last."""
    channels, side = spec.in_channels, spec.resolution
    for part, following in zip(spec.parts, (*spec.parts[1:], None), strict=True):
        if _is_mean(part):
            yield PlacedPart(part, channels, side, channels, 1, None)
            side = 1
            continue
        own_output = spec.dropout > 0 if following is None else _is_mean(following) or _pads(following)
        cost, out_side = _part_cost(part, spec.norm, channels, side, own_output)
        out_channels = part.out_channels if not isinstance(part, PoolSpec) else channels
        yield PlacedPart(part, channels, side, out_channels, out_side, cost)
        channels, side = out_channels, out_side
    kept = spec.features if spec.dropout == 0 else 2 * spec.features
    macs, head = spec.features * spec.num_classes, tuple(spec.classifier_parameters())
    cost = BlockCost(CLASSIFIER, macs, kept, spec.features, spec.num_classes, spec.features, head)
    part = ConvSpec(CLASSIFIER, spec.features, spec.num_classes, bias=True, norm=False)
    yield PlacedPart(part, spec.features, 1, spec.num_classes, 1, cost)


def block_costs(spec: NetworkSpec) -> tuple[BlockCost, ...]:
    """The costs of every block of a network at its resolution, in order; pooling to 1 x 1 is not among them."""
    return tuple(placed.cost for placed in place_parts(spec) if placed.cost is not None)


def _is_mean(part: PartSpec) -> bool:
    return isinstance(part, PoolSpec) and part.kind == "mean"


def _pads(part: PartSpec) -> bool:
    """Whether the part keeps a padded copy of its input, not the input."""
    first = part.depthwise if isinstance(part, MBConvSpec) and not part.expands else part
    return isinstance(first, ConvSpec) and first.pads


def in_backward(blocks: Sequence[BlockCost], trainable: Collection[str]) -> Sequence[BlockCost]:
    """The blocks that gradients pass through: from the first that trains any of the named parameters to the end."""
    for start, block in enumerate(blocks):
        if any(item.name in trainable for item in block.parameters):
            return blocks[start:]
    return ()
