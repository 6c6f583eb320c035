"""Memory of a forward pass: a whole process in eager torch, and the working set of a chip that holds one layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import final

import numpy as np

from fedofa.device.layers import Layer, layers_of
from fedofa.device.models import KILOBYTE, MEGABYTE, SubnetCostModel
from fedofa.device.operators import Operator, OperatorIndex, SubnetBatch
from fedofa.supernet.network import (
    GROUP_NORM_CHANNELS,
    LITE_NORM,
    BottleneckSpec,
    ConvSpec,
    MBConvSpec,
    same_padding,
)

_BYTES = 4

_COPIES = 2
"""Copies of a dense kernel larger than 1 x 1 that torch's convolution makes in layouts of its own."""
_SLACK_BYTES = 1_700_000
"""What tensors and scratch do not show: pages that are not full, small blocks that stay."""


@final
class InferenceMemory(SubnetCostModel):
    """Peak of the memory that a process needs for a forward pass in eager torch, batch 1, beyond the engine's floor.

    That is the weights, the image, and what lives inside the widest block: tensors, the copies of its input, result and
    kernel that a convolution works on, and some slack. It is meant to be at most 10 % or 1.5 MB above what a process of
    its own takes, and never below it (`server.forward_memory` measures).
    """

    setting, unit = "inference_memory_mb", "MB"

    @cached_property
    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        weights = self.index.operator_table(lambda cost: cost.num_parameters + cost.num_statistics)
        return weights, np.array([operator.input_elements for operator in self.index.operators])

    @cached_property
    def _live(self) -> np.ndarray:
        return np.array([max(_live(operator, scratch=True)) for operator in self.index.operators])

    def predict(self, batch: SubnetBatch) -> np.ndarray:
        return (self._peak_bytes(batch, self._live) + _SLACK_BYTES) / MEGABYTE

    def tensor_bytes(self, batch: SubnetBatch) -> np.ndarray:
        """The part of it that tensors hold which torch is seen to make, exactly, `(num_subnets,)`."""
        return self._peak_bytes(
            batch, np.array([max(_live(operator, scratch=False)) for operator in self.index.operators])
        )

    def _peak_bytes(self, batch: SubnetBatch, live: np.ndarray) -> np.ndarray:
        weights, inputs = self._tables
        given = np.append(inputs, 0)[batch.operators]
        inside = np.append(live, 0)[batch.operators]
        for place, held in enumerate(_held_inputs(self.index.places)):
            inside[:, place] += given[:, held].sum(axis=1)
        inside[~batch.present] = 0
        return _BYTES * (batch.total(weights) + inside.max(axis=1))


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
    running = out
    if conv.pads:
        running += conv.in_channels * (layer.in_side + sum(same_padding(layer.in_side, conv.kernel, conv.stride))) ** 2
    if scratch:
        running += layer.input_elements + out
        running += _COPIES * layer.weight_elements if conv.kernel > 1 and not conv.depthwise else 0
    return max(running, made)


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
