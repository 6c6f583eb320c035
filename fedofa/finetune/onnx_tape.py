"""ONNX nodes of a forward pass, each noted on a tape with its hand-derived gradient, for one example at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_OPSET, _IR_VERSION = 17, 9


@dataclass(frozen=True, slots=True)
class Value:
    """A float32 tensor of the graph.

    Args:
        name: in the graph.
        shape: its sizes; maps are `(1, channels, height, width)`.
        live: whether something that trains is behind it, so that its gradient is wanted.
        part: where only a leading part trains, that part's shape, which its gradient then has.
    """

    name: str
    shape: tuple[int, ...]
    live: bool = False
    part: tuple[int, ...] | None = None

    @property
    def trained(self) -> tuple[int, ...]:
        """Shape of its gradient."""
        return self.part or self.shape


class Tape:
    """Adds operations to a graph; `differentiate` then adds the backward pass, in reverse order.

    An operation notes what its gradient needs while it is added, so that a mask is computed where its activation is and
    the activation itself need not be kept. What nothing that trains lies behind gets no backward nodes.
    """

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._tensors: list[onnx.TensorProto] = []
        self._inputs: dict[str, onnx.ValueInfoProto] = {}
        self._outputs: list[onnx.ValueInfoProto] = []
        self._steps: list[tuple[Value, Callable[[str], None]]] = []
        self._gradients: dict[str, str] = {}

    # -- the graph ---------------------------------------------------------------------------------------------------

    def input(
        self, name: str, shape: Sequence[int], *, live: bool = False, part: tuple[int, ...] | None = None
    ) -> Value:
        """A tensor that is given to every run; the other arguments are those of `Value`."""
        if name not in self._inputs:
            self._inputs[name] = helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))
        return Value(name, tuple(shape), live, part)

    def output(self, name: str, value: str, shape: Sequence[int]) -> None:
        """A tensor that every run returns."""
        self._nodes.append(helper.make_node("Identity", [value], [name]))
        self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)))

    def model(self) -> bytes:
        """The graph as a serialised model."""
        graph = helper.make_graph(self._nodes, "step", list(self._inputs.values()), self._outputs, self._tensors)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)
        return model.SerializeToString()

    def node(self, kind: str, *inputs: str, **settings: Any) -> str:
        """Add a node; returns its first result's name."""
        name = f"t{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, inputs, [name], **settings))
        return name

    def constant(self, array: np.ndarray) -> str:
        """A small constant; equal ones are stored once."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = f"c{len(self._tensors)}"
            self._tensors.append(numpy_helper.from_array(array, self._constants[key]))
        return self._constants[key]

    def number(self, value: float) -> str:
        """A scalar."""
        return self.constant(np.array(value, np.float32))

    def shaped(self, name: str, shape: Sequence[int]) -> str:
        """A tensor seen in another shape; nothing is copied."""
        return self.node("Reshape", name, self.constant(np.array(shape, np.int64)))

    def leading(self, name: str, shape: Sequence[int], part: Sequence[int]) -> str:
        """The first values along every axis, as many as the part has; the tensor itself where it has no more."""
        cut = [axis for axis, (side, count) in enumerate(zip(shape, part, strict=True)) if count < side]
        if not cut:
            return name
        bounds = ([0] * len(cut), [part[axis] for axis in cut], cut)
        return self.node("Slice", name, *(self.constant(np.array(item, np.int64)) for item in bounds))

    def summed(self, name: str, axes: Sequence[int], *, keepdims: bool = True) -> str:
        """A tensor's sum over axes; the tensor itself where there are none."""
        if not axes:
            return name
        return self.node("ReduceSum", name, self.constant(np.array(axes, np.int64)), keepdims=int(keepdims))

    # -- gradients ---------------------------------------------------------------------------------------------------

    def differentiate(self, result: Value, gradient: str) -> None:
        """Add the backward pass from the gradient of a result."""
        self.send(result, gradient)
        for value, step in reversed(self._steps):
            if value.name in self._gradients:
                step(self._gradients[value.name])

    def gradient(self, value: Value) -> str:
        """The name of a value's whole gradient, after `differentiate`."""
        return self._gradients[value.name]

    def send(self, value: Value, gradient: str) -> None:
        """Add to a value's gradient; callers send nothing to values that are not live."""
        known = self._gradients.get(value.name)
        self._gradients[value.name] = gradient if known is None else self.node("Add", known, gradient)

    def _noted(self, name: str, shape: Sequence[int], inputs: Sequence[Value], step: Callable[[str], None]) -> Value:
        """A result whose gradient `step` hands on, where anything that trains is behind it."""
        value = Value(name, tuple(shape), any(item.live for item in inputs))
        if value.live:
            self._steps.append((value, step))
        return value

    # -- operations --------------------------------------------------------------------------------------------------

    def reshape(self, x: Value, shape: Sequence[int]) -> Value:
        """The same values in another shape."""
        return self._noted(
            self.shaped(x.name, shape), shape, [x], lambda grad: self.send(x, self.shaped(grad, x.shape))
        )

    def add(self, x: Value, term: Value) -> Value:
        """`x + term`, where `term` may have sides of 1 that are repeated."""

        def step(grad: str) -> None:
            if x.live:
                self.send(x, grad)
            if term.live:
                self.send(term, self.summed(grad, _repeated(x, term)))

        return self._noted(self.node("Add", x.name, term.name), x.shape, [x, term], step)

    def multiply(self, x: Value, factor: Value) -> Value:
        """`x * factor`, where `factor` may have sides of 1 that are repeated.

        Where `x` trains in part and the factor does not, so does the result.
        """
        part = None if factor.live else x.part

        def step(grad: str) -> None:
            if factor.live:
                self.send(factor, self.summed(self.node("Mul", grad, x.name), _repeated(x, factor)))
            if x.live:
                given = part or x.shape
                passed = self.node("Mul", grad, self.leading(factor.name, factor.shape, given))
                self.send(x, self.leading(passed, given, x.trained))

        product = self._noted(self.node("Mul", x.name, factor.name), x.shape, [x, factor], step)
        return replace(product, part=part)

    def activation(self, x: Value, name: str) -> Value:
        """Any of `network.ACTIVATIONS`; as in torch, the slope where pieces meet is that of the flat piece."""
        forward, slope = _ACTIVATIONS[name]
        y = forward(self, x.name)
        if not x.live:
            return replace(x, name=y)
        kept = slope(self, x.name, y)
        return self._noted(y, x.shape, [x], lambda grad: self.send(x, kept(grad)))

    def group_norm(self, x: Value, groups: int, eps: float) -> Value:
        """Each group of channels with mean 0 and variance 1, without an affine (arXiv 1803.08494)."""
        rows = self.shaped(x.name, (groups, -1))
        centred = self.node("Sub", rows, self.node("ReduceMean", rows, axes=[1]))
        variance = self.node("ReduceMean", self.node("Mul", centred, centred), axes=[1])
        rate = self.node("Reciprocal", self.node("Sqrt", self.node("Add", variance, self.number(eps))))
        normed = self.node("Mul", centred, rate)

        def step(grad: str) -> None:
            rows = self.shaped(grad, (groups, -1))
            along = self.node("ReduceMean", self.node("Mul", rows, normed), axes=[1])
            left = self.node("Sub", rows, self.node("ReduceMean", rows, axes=[1]))
            left = self.node("Sub", left, self.node("Mul", normed, along))
            self.send(x, self.shaped(self.node("Mul", left, rate), x.shape))

        return self._noted(self.shaped(normed, x.shape), x.shape, [x], step)

    def mean_pool(self, x: Value) -> Value:
        """The mean over each whole map, `(1, channels, 1, 1)`."""
        positions = math.prod(x.shape[2:])

        def step(grad: str) -> None:
            share = self.node("Mul", grad, self.number(1 / positions))
            self.send(x, self.node("Expand", share, self.constant(np.array(x.shape, np.int64))))

        return self._noted(self.node("GlobalAveragePool", x.name), (*x.shape[:2], 1, 1), [x], step)

    def average_pool(self, x: Value, side: int) -> Value:
        """The mean over windows of `side` x `side`; the last ones may be cut off."""
        _, channels, *sides = x.shape
        out = [-(-length // side) for length in sides]
        y = self.node("AveragePool", x.name, kernel_shape=[side] * 2, strides=[side] * 2, ceil_mode=1)

        def step(grad: str) -> None:
            rows, columns = (np.minimum(side, n - side * np.arange(m)) for n, m in zip(sides, out, strict=True))
            share = self.constant((1 / np.outer(rows, columns)).astype(np.float32)[None, None])
            ones = self.constant(np.ones((channels, 1, side, side), np.float32))
            ends = [m * side - n for n, m in zip(sides, out, strict=True)]
            settings = {"group": channels, "strides": [side] * 2, "pads": [0, 0, *ends]}
            self.send(x, self.node("ConvTranspose", self.node("Mul", grad, share), ones, **settings))

        return self._noted(y, (1, channels, *out), [x], step)

    def upsample(self, x: Value, sides: tuple[int, int]) -> Value:
        """Bilinear interpolation to a `(height, width)` no smaller than before: a matrix product along each side."""
        rows, columns = (_interpolation(n, m) for n, m in zip(x.shape[2:], sides, strict=True))
        down, across = self.constant(rows), self.constant(np.ascontiguousarray(columns.T))
        y = self.node("MatMul", self.node("MatMul", down, x.name), across)

        def step(grad: str) -> None:
            back = self.node("MatMul", grad, self.constant(columns))
            self.send(x, self.node("MatMul", self.constant(np.ascontiguousarray(rows.T)), back))

        return self._noted(y, (*x.shape[:2], *sides), [x], step)

    def max_pool(self, x: Value) -> Value:
        """The largest of 3 x 3 windows at stride 2 from one pixel outside; the first of equals gets the gradient."""
        shape = (*x.shape[:2], *(-(-length // 2) for length in x.shape[2:]))
        y, places = f"t{len(self._nodes)}", f"t{len(self._nodes)}i"
        node = helper.make_node(
            "MaxPool", [x.name], [y, places], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]
        )
        self._nodes.append(node)

        def step(grad: str) -> None:
            flat = np.array([math.prod(x.shape)], np.int64)
            zeros = self.node("ConstantOfShape", self.constant(flat))
            found = self.shaped(places, (-1,))
            spread = self.node("ScatterElements", zeros, found, self.shaped(grad, (-1,)), reduction="add")
            self.send(x, self.shaped(spread, x.shape))

        return self._noted(y, shape, [x], step)

    def linear(self, x: Value, weight: Value, bias: Value) -> Value:
        """`(1, features)` to `(1, out)`; weight `(out, features)`, bias `(out,)`."""
        out, features = weight.trained
        kept = self._first_channels(x, features) if weight.live else x

        def step(grad: str) -> None:
            if weight.live:
                rows = self.leading(grad, (1, weight.shape[0]), (1, out))
                self.send(weight, self.node("Gemm", rows, kept.name, transA=1))
            if bias.live:
                self.send(bias, self.shaped(grad, bias.shape))
            if x.live:
                self.send(x, self.node("Gemm", grad, weight.name))

        y = self.node("Gemm", x.name, weight.name, bias.name, transB=1)
        return self._noted(y, (1, weight.shape[0]), [x, weight, bias], step)

    def conv(self, x: Value, weight: Value, bias: Value | None, window: Window) -> Value:
        """Convolution; weight `(out_channels, in_channels / groups, k, k)`, bias `(out_channels,)`.

        Of the input only the channels are kept that the gradient of what trains of the weight needs.
        """
        inputs = [x, weight, *([] if bias is None else [bias])]
        settings = {"group": window.groups, "strides": [window.stride] * 2, "pads": list(window.pads)}
        y = self.node("Conv", *(item.name for item in inputs), **settings)
        sides = [window.out_side(length, weight.shape[2], axis) for axis, length in enumerate(x.shape[2:])]
        shape = (1, weight.shape[0], *sides)
        read = weight.trained[1] if window.groups == 1 else weight.trained[0]
        kept = self._first_channels(x, read) if weight.live else x

        def step(grad: str) -> None:
            if bias is not None and bias.live:
                self.send(bias, self.summed(grad, (0, 2, 3), keepdims=False))
            if weight.live:
                self.send(weight, self._weight_gradient(kept, weight.trained, grad, shape, window))
            if x.live:
                self.send(x, self._input_gradient(x, weight, grad, shape, window))

        return self._noted(y, shape, inputs, step)

    def _first_channels(self, x: Value, count: int) -> Value:
        """The first channels of `x`, so that the others need not be kept; `x` itself where they are all."""
        shape = (1, count, *x.shape[2:])
        return Value(self.leading(x.name, x.shape, shape), shape)

    def _input_gradient(self, x: Value, weight: Value, grad: str, shape: tuple[int, ...], window: Window) -> str:
        """Of a convolution's input: a matrix product, a convolution with the flipped kernel, or a transposed one."""
        kernel = weight.shape[2]
        if window.is_pointwise(kernel):
            matrix = self.shaped(weight.name, weight.shape[:2])
            product = self.node("Gemm", matrix, self.shaped(grad, (shape[1], -1)), transA=1)
            return self.shaped(product, x.shape)
        if window.stride == 1 and window.groups == x.shape[1] == shape[1]:
            backwards = ([-1] * 2, [_BEFORE_FIRST] * 2, [2, 3])
            last, end, axes = (self.constant(np.array(item, np.int64)) for item in backwards)
            flipped = self.node("Slice", weight.name, last, end, axes, last)
            pads = [kernel - 1 - zeros for zeros in window.pads]
            return self.node("Conv", grad, flipped, group=window.groups, pads=pads)
        left = [
            length - (window.stride * (out - 1) + kernel - before - after)
            for length, out, before, after in zip(x.shape[2:], shape[2:], window.pads[:2], window.pads[2:], strict=True)
        ]
        settings = {"strides": [window.stride] * 2, "pads": list(window.pads), "output_padding": left}
        return self.node("ConvTranspose", grad, weight.name, group=window.groups, **settings)

    def _weight_gradient(
        self, x: Value, part: tuple[int, ...], grad: str, shape: tuple[int, ...], window: Window
    ) -> str:
        """Of what trains of a convolution's weight: its input convolved with the result's gradient as the kernel.

        Args:
            x: of the input, the channels that the part reads.
            part: shape of what trains.
            grad: the result's gradient; shape: its.
            window: of the convolution.
        """
        out, kernel = part[0], part[2]
        grad = self.leading(grad, shape, (1, out, *shape[2:]))
        if window.is_pointwise(kernel):
            rows = [self.shaped(name, (channels, -1)) for name, channels in ((grad, out), (x.name, x.shape[1]))]
            return self.shaped(self.node("Gemm", *rows, transB=1), part)
        is_dense = window.groups == 1
        spread = {"dilations": [window.stride] * 2, "pads": list(window.pads), "group": 1 if is_dense else out}
        maps = self.shaped(x.name, (x.shape[1], 1, *x.shape[2:])) if is_dense else x.name
        found = self.node("Conv", maps, self.shaped(grad, (out, 1, *shape[2:])), **spread)
        first, end, axes = (self.constant(np.array(item, np.int64)) for item in ([0, 0], [kernel] * 2, [2, 3]))
        return self.node("Slice", self.node("Transpose", found, perm=[1, 0, 2, 3]), first, end, axes)


@dataclass(frozen=True, slots=True)
class Window:
    """How a convolution moves over its input: stride, zeros above, left, below and right, groups (1 or all)."""

    stride: int
    pads: tuple[int, int, int, int]
    groups: int

    def out_side(self, side: int, kernel: int, axis: int) -> int:
        """The length of the result along an axis."""
        return (side + self.pads[axis] + self.pads[axis + 2] - kernel) // self.stride + 1

    def is_pointwise(self, kernel: int) -> bool:
        """Whether it is a matrix product over channels."""
        return kernel == 1 and self.stride == 1 and self.groups == 1 and not any(self.pads)


_BEFORE_FIRST = -(2**31)
"""End of a slice that runs backwards to the first value."""

_Slope = Callable[[str], str]
"""From the name of a result's gradient to that of the input's."""


def _repeated(x: Value, other: Value) -> list[int]:
    """The axes along which the other is repeated to x's shape."""
    return [axis for axis, (own, side) in enumerate(zip(x.shape, other.shape, strict=True)) if side != own]


def _interpolation(before: int, after: int) -> np.ndarray:
    """Linear interpolation of a side as a matrix `(after, before)`: pixels are areas, those outside are the edge's."""
    centres = (np.arange(after) + 0.5) * before / after - 0.5
    places = np.clip(centres, 0, before - 1)
    distances = np.abs(places[:, None] - np.arange(before))
    return np.maximum(1 - distances, 0).astype(np.float32)


def _masked(tape: Tape, mask: str, factor: float = 1.0) -> _Slope:
    """A slope of `factor` where the mask is true, else 0."""

    def gradient(grad: str) -> str:
        slope = tape.node("Cast", mask, to=TensorProto.FLOAT)  # many times faster than Where
        passed = tape.node("Mul", grad, slope)
        return passed if factor == 1.0 else tape.node("Mul", passed, tape.number(factor))

    return gradient


def _between(tape: Tape, x: str, low: float, high: float) -> str:
    return tape.node("And", tape.node("Greater", x, tape.number(low)), tape.node("Less", x, tape.number(high)))


def _h_swish_slope(tape: Tape, x: str, y: str) -> _Slope:
    """0 up to -3, `x / 3 + 1/2`, then 1 from 3."""
    inside = tape.node("Add", tape.node("Mul", x, tape.number(1 / 3)), tape.number(0.5))
    slope = tape.node("Where", tape.node("Less", x, tape.number(3.0)), inside, tape.number(1.0))
    slope = tape.node("Where", tape.node("Greater", x, tape.number(-3.0)), slope, tape.number(0.0))
    return lambda grad: tape.node("Mul", grad, slope)


_ACTIVATIONS: dict[str, tuple[Callable[[Tape, str], str], Callable[[Tape, str, str], _Slope]]] = {
    "relu": (
        lambda tape, x: tape.node("Relu", x),
        lambda tape, x, y: _masked(tape, tape.node("Greater", y, tape.number(0.0))),
    ),
    "relu6": (
        lambda tape, x: tape.node("Clip", x, tape.number(0.0), tape.number(6.0)),
        lambda tape, x, y: _masked(tape, _between(tape, y, 0.0, 6.0)),
    ),
    "h_swish": (lambda tape, x: tape.node("HardSwish", x), _h_swish_slope),
    "h_sigmoid": (
        lambda tape, x: tape.node("HardSigmoid", x, alpha=1 / 6, beta=0.5),
        lambda tape, x, y: _masked(tape, _between(tape, x, -3.0, 3.0), 1 / 6),
    ),
}
"""Name -> the nodes of the activation, and what is kept of it (from its input and result) and does its gradient."""
