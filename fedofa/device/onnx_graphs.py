"""Operators and networks as ONNX graphs with random weights, for measuring: batch norm folded, as exports have it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fedofa.device.operators import Operator
from fedofa.supernet.network import (
    GROUP_NORM_CHANNELS,
    LITE_NORM,
    BottleneckSpec,
    ConvSpec,
    MBConvSpec,
    PoolSpec,
    same_padding,
)

_OPSET, _IR_VERSION = 17, 9
_SCALE, _VALUES = 0.1, 4093
"""Weights repeat so many random values, which takes less time than drawing all of them."""


class GraphBuilder:
    """Adds operators one after the other to a graph of one input and one output.

    Args:
        channels, side: of the input, `(1, channels, side, side)`.
        seed: of the weights.
    """

    def __init__(self, channels: int, side: int, seed: int = 0) -> None:
        self._values = (np.random.default_rng(seed).standard_normal(_VALUES) * _SCALE).astype(np.float32)
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []
        self._input = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, channels, side, side])
        self._last = "input"

    def add(self, operator: Operator) -> None:
        """Put an operator behind what is there."""
        part, norm, side = operator.part, operator.norm, operator.in_side
        match part:
            case ConvSpec():
                y = self._conv(self._last, part, norm, side)
                self._last = self._node("Add", self._last, y) if part.residual else y
            case MBConvSpec():
                self._last = self._mbconv(self._last, part, norm, side)
            case BottleneckSpec():
                self._last = self._bottleneck(self._last, part, norm, side)
            case PoolSpec():
                self._last = self._pool(self._last, part)

    def model(self) -> bytes:
        """The finished graph, serialised."""
        self._nodes.append(helper.make_node("Identity", [self._last], ["output"]))
        output = helper.make_tensor_value_info("output", TensorProto.FLOAT, None)
        graph = helper.make_graph(self._nodes, "fedofa", [self._input], [output], self._weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)
        return model.SerializeToString()

    def _node(self, kind: str, *inputs: str, **settings: Any) -> str:
        name = f"{kind.lower()}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, inputs, [name], **settings))
        return name

    def _tensor(self, array: np.ndarray) -> str:
        name = f"tensor_{len(self._weights)}"
        self._weights.append(numpy_helper.from_array(array, name))
        return name

    def _random(self, *shape: int) -> str:
        return self._tensor(np.resize(self._values, shape))

    def _conv(self, x: str, spec: ConvSpec, norm: str, side: int) -> str:
        groups = spec.in_channels if spec.depthwise else 1
        weight = self._random(spec.out_channels, spec.in_channels // groups, spec.kernel, spec.kernel)
        inputs = [x, weight]
        if spec.bias or (spec.norm and norm == "batch"):
            inputs.append(self._random(spec.out_channels))
        pads = [spec.kernel // 2] * 4
        if spec.pads:
            before, after = same_padding(side, spec.kernel, spec.stride)
            pads = [before, before, after, after]
        y = self._node("Conv", *inputs, group=groups, strides=[spec.stride] * 2, pads=pads)
        if spec.norm and norm == "group":
            y = self._group_norm(y, spec.out_channels, -(-side // spec.stride))
        return self._activation(y, spec.activation)

    def _group_norm(self, x: str, channels: int, side: int) -> str:
        groups = channels // GROUP_NORM_CHANNELS
        rows = self._node("Reshape", x, self._tensor(np.array([1, groups, -1], np.int64)))
        ones, zeros = (self._tensor(np.full(groups, value, np.float32)) for value in (1, 0))
        normed = self._node("InstanceNormalization", rows, ones, zeros)
        y = self._node("Reshape", normed, self._tensor(np.array([1, channels, side, side], np.int64)))
        return self._node("Add", self._node("Mul", y, self._random(channels, 1, 1)), self._random(channels, 1, 1))

    def _activation(self, x: str, name: str | None) -> str:
        match name:
            case "relu":
                return self._node("Relu", x)
            case "relu6":
                return self._node("Clip", x, *(self._tensor(np.array(value, np.float32)) for value in (0, 6)))
            case "h_swish":
                return self._node("HardSwish", x)
            case "h_sigmoid":
                return self._node("HardSigmoid", x, alpha=1 / 6, beta=0.5)
            case _:
                return x

    def _mbconv(self, x: str, part: MBConvSpec, norm: str, side: int) -> str:
        y = x if part.expand is None else self._conv(x, part.expand, norm, side)
        y = self._conv(y, part.depthwise, norm, side)
        in_side, side = side, -(-side // part.stride)
        if part.squeeze_excite is not None:
            gate = self._node("GlobalAveragePool", y)
            for conv in part.squeeze_excite:
                gate = self._conv(gate, conv, norm, 1)
            y = self._node("Mul", y, gate)
        y = self._conv(y, part.project, norm, side)
        y = self._node("Add", x, y) if part.residual else y
        return y if part.lite is None else self._node("Add", y, self._lite(x, part.lite, in_side, side))

    def _lite(self, x: str, branch: tuple[ConvSpec, ConvSpec], side: int, out_side: int) -> str:
        pooled = -(-side // 2)
        y = self._node("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)
        for conv in branch:
            y = self._conv(y, conv, LITE_NORM, pooled)
        if pooled == out_side:
            return y
        sizes = self._tensor(np.array([1, branch[1].out_channels, out_side, out_side], np.int64))
        return self._node("Resize", y, "", "", sizes, mode="linear", coordinate_transformation_mode="half_pixel")

    def _bottleneck(self, x: str, part: BottleneckSpec, norm: str, side: int) -> str:
        y = self._conv(x, part.reduce, norm, side)
        y = self._conv(y, part.spatial, norm, side)
        out_side = -(-side // part.stride)
        y = self._conv(y, part.project, norm, out_side)
        if part.downsample is not None:
            if part.averages and part.stride > 1:
                sides = [part.stride] * 2
                x, side = self._node("AveragePool", x, kernel_shape=sides, strides=sides, ceil_mode=1), out_side
            x = self._conv(x, part.downsample, norm, side)
        return self._activation(self._node("Add", y, x), part.activation)

    def _pool(self, x: str, part: PoolSpec) -> str:
        if part.kind == "mean":
            return self._node("GlobalAveragePool", x)
        return self._node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])


def build_graph(operators: Iterable[Operator]) -> bytes:
    """A serialised model of operators one after the other."""
    chain = list(operators)
    builder = GraphBuilder(chain[0].in_channels, chain[0].in_side)
    for operator in chain:
        builder.add(operator)
    return builder.model()
