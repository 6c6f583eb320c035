"""Memory of a forward pass: a whole process in eager torch, and the working set of a chip that holds one layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import final

import numpy as np

from fedofa.device.allocator import resident_bytes
from fedofa.device.layers import Layer, layers_of
from fedofa.device.models import KILOBYTE, MEGABYTE, SubnetCostModel
from fedofa.device.operators import Operator, OperatorIndex, SubnetBatch
from fedofa.supernet.network import (
    GROUP_NORM_CHANNELS,
    LITE_NORM,
    BottleneckSpec,
    ConvSpec,
    MBConvSpec,
    part_parameters,
    same_padding,
)

_BYTES = 4

_LANES = 16
"""Channels that oneDNN puts side by side in its own layouts, for registers of 512 bits."""
_SMALL = 20480
"""Values of one example's input up to which torch 2.13 prefers its own convolution, without oneDNN."""
_KERNEL_BYTES = 96 << 10
"""Code that oneDNN makes for a shape of convolution, its description, and the rest of their pages. After 400 distinct
convolutions of two spaces, each alone, anonymous memory had grown by 62 KB for a depthwise one, 68 to 80 KB for a dense
3 x 3 one, 21 to 50 KB for a pointwise one; in whole networks, where blocks between them stay, by 80 to 120 KB (AMD Zen
4, torch 2.13)."""
_LAYER_BYTES = 1 << 14
"""Python's objects of a convolution, its norm, its activation and what contains them: four modules of 2.6 KB each
(`tracemalloc`), and torch's descriptions of five tensors."""
_PROCESS_BYTES = 1 << 19
"""What the kernel's counters of resident pages, with which a peak is measured, may lag behind on two processors (64
pages), and as much again for free blocks that the heap may keep (up to 64 KB at its top, the rest between others)."""


@final
class InferenceMemory(SubnetCostModel):
    """Peak of the memory that a process needs for a forward pass in eager torch, batch 1, beyond the engine's floor.

    That is what the allocator takes for weights, the image, and what lives inside the widest block: tensors and the
    copies of its input, result and kernel that a convolution works on; the code that oneDNN makes for every convolution
    of another shape; and Python's objects for the layers. It is meant to be at most 10 % above what passes in a process
    of their own take, and never below it (`server.forward_memory` measures).
    """

    setting, unit = "inference_memory_mb", "MB"

    @cached_property
    def _inputs(self) -> np.ndarray:
        return np.array([operator.input_elements for operator in self.index.operators])

    @cached_property
    def _scratched(self) -> np.ndarray:
        return np.array([max(_live(operator, scratch=True)) for operator in self.index.operators])

    @cached_property
    def _resident(self) -> np.ndarray:
        return np.array([_resident_bytes(operator) for operator in self.index.operators])

    @cached_property
    def _kernels(self) -> np.ndarray:
        return np.array([_num_kernels(operator) for operator in self.index.operators])

    def predict(self, batch: SubnetBatch) -> np.ndarray:
        tensors = batch.total(self._resident) + _BYTES * self._peak(batch, self._scratched)
        return (tensors + _KERNEL_BYTES * batch.distinct(self._kernels) + _PROCESS_BYTES) / MEGABYTE

    def tensor_bytes(self, batch: SubnetBatch) -> np.ndarray:
        """The part of it that tensors hold which torch is seen to make, exactly, `(num_subnets,)`."""
        weights = self.index.operator_table(lambda cost: cost.num_parameters + cost.num_statistics)
        made = np.array([max(_live(operator, scratch=False)) for operator in self.index.operators])
        return _BYTES * (batch.total(weights) + self._peak(batch, made))

    def _peak(self, batch: SubnetBatch, live: np.ndarray) -> np.ndarray:
        """Values in the widest block, with what is held around it, `(num_subnets,)`."""
        given = np.append(self._inputs, 0)[batch.operators]
        inside = np.append(live, 0)[batch.operators]
        for place, held in enumerate(_held_inputs(self.index.places)):
            inside[:, place] += given[:, held].sum(axis=1)
        inside[~batch.present] = 0
        return inside.max(axis=1)


def _resident_bytes(operator: Operator) -> int:
    """What an operator takes as long as the network is there: its tensors, and Python's objects."""
    tensors = part_parameters(operator.part, operator.norm)
    objects = _LAYER_BYTES * sum(1 for _ in layers_of(operator))
    return objects + sum(resident_bytes(_BYTES * tensor.numel) for tensor in tensors)


def _num_kernels(operator: Operator) -> int:
    """Convolutions that oneDNN makes code for."""
    return len({layer for layer in layers_of(operator) if not _is_small(layer)})


def _is_small(layer: Layer) -> bool:
    """Whether torch runs a convolution of one example without oneDNN."""
    return not layer.conv.depthwise and layer.conv.kernel <= 3 and layer.input_elements <= _SMALL


def _held_inputs(places: Sequence[str]) -> list[list[int]]:
    """For each place the others whose inputs are held meanwhile: the image, and those of the containers around it.

    A container ("stages" and "stages.1" of "stages.1.0") holds what its first part was given until its last is done.
    """
    first: dict[str, int] = {}
    held = []
    for number, name in enumerate(places):
        steps = name.split(".")
        containers = [".".join(steps[:length]) for length in range(1, len(steps))]
        held.append(sorted({0, *(first.setdefault(container, number) for container in containers)} - {number}))
    return held


def _live(operator: Operator, *, scratch: bool) -> Iterator[int]:
    """Values that live inside a block, step by step; the chain holds the block's input until the block is done.

    Args:
        operator: the block.
        scratch: count the convolutions' own copies as well.
    """
    part, x, out = operator.part, operator.input_elements, operator.output_elements
    layers = list(layers_of(operator))
    yield x + out
    match part:
        case ConvSpec():
            yield x + _made(layers[0], operator.norm, scratch=scratch)
            yield x + (2 * out if part.residual else 0)
        case MBConvSpec():
            layers, branch = (layers[:-2], layers[-2:]) if part.lite else (layers, [])
            for number, layer in enumerate(layers):
                own = 0 if number == 0 else layer.input_elements
                gated = layers[-1].input_elements if layer.in_side == 1 and part.squeeze_channels else 0
                yield x + own + gated + _made(layer, operator.norm, scratch=scratch)
            if part.squeeze_channels:
                yield x + 2 * layers[-1].input_elements + part.mid_channels
            for layer in branch:
                yield x + out + layer.input_elements + _made(layer, LITE_NORM, scratch=scratch)
            yield x + (3 if branch else 2) * out
        case BottleneckSpec():
            yield x + _made(layers[0], operator.norm, scratch=scratch)
            for layer in layers[1:3]:
                yield x + layer.input_elements + _made(layer, operator.norm, scratch=scratch)
            for layer in layers[3:]:
                averaged = layer.input_elements if layer.in_side != operator.in_side else 0
                yield x + out + averaged + _made(layer, operator.norm, scratch=scratch)
            yield x + (4 if part.downsamples else 3) * out


def _made(layer: Layer, norm: str, *, scratch: bool) -> int:
    """Values that a layer has made at its peak: a convolution, its norm and its activation make a tensor each, of which
    two are alive. A padded copy of the input lives as long as the convolution runs, as its own copies do; group norm's
    statistics as long as the norm does.
    """
    conv, out = layer.conv, layer.output_elements
    statistics = 2 * conv.out_channels // GROUP_NORM_CHANNELS if conv.norm and norm == "group" else 0
    made = 2 * out + statistics if conv.norm or conv.activation else out
    padded = conv.in_channels * (layer.in_side + sum(same_padding(layer.in_side, conv.kernel, conv.stride))) ** 2
    running = out + (padded if conv.pads else 0) + (_scratch(layer) if scratch else 0)
    return max(running, made)


def _scratch(layer: Layer) -> int:
    """Values that torch 2.13 works on beside a convolution's input, and result, which it makes last.

    oneDNN has the input, the kernel and the result in layouts of its own, whose channels are filled up to 16; an image
    of fewer channels it reads as it is. Pointwise convolutions are matrix products of what is there. A small
    convolution is one too, of every position's window of the input.
    """
    conv = layer.conv
    if conv.kernel == 1 and conv.stride == 1:
        return 0
    if _is_small(layer):
        return layer.out_side**2 * conv.in_channels * conv.kernel**2
    given = 0 if conv.in_channels < _LANES else _filled(conv.in_channels) * layer.in_side**2
    result = _filled(conv.out_channels) * layer.out_side**2
    kernel = _filled(conv.out_channels) * (1 if conv.depthwise else _filled(conv.in_channels)) * conv.kernel**2
    return max(result, given + kernel + result - layer.output_elements)


def _filled(channels: int) -> int:
    return -(-channels // _LANES) * _LANES


@final
class WorkingSet(SubnetCostModel):
    """Peak of the activations that one layer needs at once, as they lie in a chip's own memory (weights in flash).

    A layer is a convolution with its norm and activation in place; its input, its result and what a later layer still
    needs are alive.

    Args:
        index: of the space.
        activation_bits: of one value.
    """

    setting, unit = "sram_kb", "KB"

    def __init__(self, index: OperatorIndex, activation_bits: int = 8) -> None:
        super().__init__(index)
        elements = [max((layer.live_elements for layer in layers_of(item)), default=0) for item in index.operators]
        self._table = np.array(elements) * activation_bits / 8 / KILOBYTE

    def predict(self, batch: SubnetBatch) -> np.ndarray:
        return batch.greatest(self._table)
