"""What a network costs, block by block and counted, not measured: MACs, parameters, what autograd keeps. No torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from fedofa.supernet.network import GROUP_NORM_CHANNELS, ConvSpec, MBConvSpec, NetworkSpec, ParameterSpec


@dataclass(frozen=True, slots=True)
class BlockCost:
    """One block of a network, for one example.

    Args:
        name: the block's name in the skeleton ("stem", "stages.1.0", "classifier").
        macs: multiply-accumulates of a forward pass.
        saved_elements: fp32 values that stock autograd keeps for the backward pass when the block is in the graph.
        input_elements, output_elements: size of its input and output.
        widest_elements: size of the largest tensor inside.
        parameters: its trainable tensors.
        num_statistics: values of its batch-norm statistics, which travel to the client but do not train.
    """

    name: str
    macs: int
    saved_elements: int
    input_elements: int
    output_elements: int
    widest_elements: int
    parameters: tuple[ParameterSpec, ...]
    num_statistics: int = 0

    @property
    def num_parameters(self) -> int:
        """Trainable values in the block."""
        return sum(item.numel for item in self.parameters)


@dataclass(slots=True)
class _Tape:
    """Follows one example through a block's operations and notes which tensors stock autograd keeps.

    A convolution keeps its input, a norm its input and its statistics, ReLU its result, hard swish and hard sigmoid
    their input, a product both factors. A tensor kept twice counts once.
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

    def conv(self, x: int, spec: ConvSpec, side: int) -> tuple[int, int]:
        """Convolution, norm, activation on a square map; returns the result's number and side."""
        out_side = -(-side // spec.stride)
        self.kept.add(x)
        fan_in = 1 if spec.depthwise else spec.in_channels
        self.macs += out_side**2 * spec.out_channels * fan_in * spec.kernel**2
        y = self.tensor(spec.out_channels * out_side**2)
        if spec.norm:
            self.kept.add(y)
            if self.norm == "group":
                self.kept.add(self.tensor(2 * spec.out_channels // GROUP_NORM_CHANNELS))
            y = self.tensor(self.sizes[y])
        if spec.activation is not None:
            result = self.tensor(self.sizes[y])
            self.kept.add(result if spec.activation == "relu" else y)
            y = result
        return y, out_side

    def cost(self, name: str, x: int, y: int, parameters: Iterable[ParameterSpec]) -> BlockCost:
        """Close the tape; `x` is the block's input and `y` its output."""
        table = tuple(parameters)
        trainable = tuple(item for item in table if item.role != "statistic")
        statistics = sum(item.numel for item in table if item.role == "statistic")
        saved = sum(self.sizes[number] for number in self.kept)
        return BlockCost(name, self.macs, saved, self.sizes[x], self.sizes[y], self.widest, trainable, statistics)


@lru_cache(maxsize=65536)
def _mbconv_cost(block: MBConvSpec, norm: str, side: int) -> tuple[BlockCost, int]:
    tape = _Tape(norm)
    x = y = tape.tensor(block.in_channels * side**2)
    if block.expand is not None:
        y, _ = tape.conv(y, block.expand, side)
    y, out_side = tape.conv(y, block.depthwise, side)
    if block.squeeze_excite is not None:
        reduce, expand = block.squeeze_excite
        gate, _ = tape.conv(tape.tensor(block.mid_channels), reduce, 1)
        gate, _ = tape.conv(gate, expand, 1)
        tape.kept |= {y, gate}
        y = tape.tensor(tape.sizes[y])
    y, _ = tape.conv(y, block.project, out_side)
    return tape.cost(block.name, x, y, block.parameters(norm)), out_side


@lru_cache(maxsize=4096)
def _conv_cost(spec: ConvSpec, norm: str, side: int) -> tuple[BlockCost, int]:
    tape = _Tape(norm)
    x = tape.tensor(spec.in_channels * side**2)
    y, out_side = tape.conv(x, spec, side)
    return tape.cost(spec.name, x, y, spec.parameters(norm)), out_side


def block_costs(spec: NetworkSpec) -> tuple[BlockCost, ...]:
    """The costs of every block of a network at its resolution, in order."""
    costs = []
    cost, side = _conv_cost(spec.stem, spec.norm, spec.resolution)
    costs.append(cost)
    for block in spec.blocks:
        cost, side = _mbconv_cost(block, spec.norm, side)
        costs.append(cost)
    costs.append(_conv_cost(spec.final, spec.norm, side)[0])
    costs.append(_conv_cost(spec.mix, spec.norm, 1)[0])
    features = spec.mix.out_channels
    kept = features if spec.dropout == 0 else 2 * features
    head = tuple(spec.classifier_parameters())
    costs.append(BlockCost("classifier", features * spec.num_classes, kept, features, spec.num_classes, features, head))
    return tuple(costs)


def in_backward(blocks: Sequence[BlockCost], trainable: Collection[str]) -> Sequence[BlockCost]:
    """The blocks that gradients pass through: from the first that trains any of the named parameters to the end."""
    for start, block in enumerate(blocks):
        if any(item.name in trainable for item in block.parameters):
            return blocks[start:]
    return ()
