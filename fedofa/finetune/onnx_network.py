"""A training step of one subnet under one plan as a plain ONNX graph: forward, loss, gradients of what trains.

The graph holds no weights: all tensors are its inputs. Where a convolution and its frozen batch norm do not train, the
server gives them folded into one another; where either trains, they are composed in the graph and the gradients are
those of the parameters as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fedofa.finetune.onnx_tape import Tape, Value, Window
from fedofa.supernet.network import (
    GROUP_NORM_CHANNELS,
    LITE_NORM,
    BottleneckSpec,
    ConvSpec,
    MBConvSpec,
    NetworkSpec,
    PartSpec,
    PoolSpec,
    same_padding,
)
from fedofa.types.errors import ConfigError
from fedofa.types.plan import FineTunePlan

Tensors = Mapping[str, np.ndarray]
_Derive = Callable[[Tensors], np.ndarray]


@dataclass(frozen=True, slots=True, eq=False)
class CompiledStep:
    """A graph and what it is fed with beside one example.

    Args:
        graph: the serialised ONNX model (see `onnx_trainer` for its inputs and outputs).
        tensors: name of each tensor that it takes -> how it comes from the subnet's tensors.
    """

    graph: bytes
    tensors: Mapping[str, _Derive]

    def feed(self, tensors: Tensors) -> dict[str, np.ndarray]:
        """What the graph takes, from the subnet's tensors (float32, by name, statistics among them)."""
        return {name: derive(tensors) for name, derive in self.tensors.items()}


def compile_step(spec: NetworkSpec, plan: FineTunePlan) -> CompiledStep:
    """The training step of a network, for one example.

    Args:
        spec: of the subnet.
        plan: says whose gradients it gives, in its order, and of which weights only those of a part; where nothing
            trains it is a forward pass that gives the logits. Levers have no part in it: it is exact and keeps little.

    Raises:
        ConfigError: when the network has no parameter of a name, or the plan trains kernel matrices or factors.
    """
    if plan.parametrised or plan.low_rank:
        raise ConfigError(f"plan {plan.name!r} cannot be compiled: it trains kernel matrices or factors of low rank")
    return _compile(spec, FineTunePlan("compiled", plan.trainable, fractions=plan.fractions))


@lru_cache(maxsize=64)
def _compile(spec: NetworkSpec, plan: FineTunePlan) -> CompiledStep:
    known = {item.name for item in spec.parameters() if item.role != "statistic"}
    unknown = [name for name in plan.trainable if name not in known]
    if unknown:
        raise ConfigError(f"the plan trains {unknown[:3]}, which this subnet does not have")
    network = _Network(spec, plan)
    logits = network.logits()
    tape = network.tape
    if plan.trainable:
        target = tape.input("target", logits.shape)
        logs = tape.node("LogSoftmax", logits.name, axis=1)
        shared = tape.summed(tape.node("Mul", logs, target.name), (0, 1), keepdims=False)
        tape.output("loss", tape.node("Neg", shared), ())
        tape.differentiate(logits, tape.node("Sub", tape.node("Exp", logs), target.name))
        for name in plan.trainable:
            value = network.parameters[name]
            tape.output(f"gradient:{name}", tape.gradient(value), value.trained)
    else:
        tape.output("logits", logits.name, logits.shape)
    return CompiledStep(tape.model(), network.tensors)


class _Network:
    """Walks a description and puts its operations on a tape.

    Args:
        spec: of the network.
        plan: what trains.
    """

    def __init__(self, spec: NetworkSpec, plan: FineTunePlan) -> None:
        self.spec = spec
        self.tape = Tape()
        self.plan = plan
        self.trainable = frozenset(plan.trainable)
        self.parameters: dict[str, Value] = {}
        self.tensors: dict[str, _Derive] = {}
        self._shapes = {item.name: item.shape for item in spec.parameters()}

    def logits(self) -> Value:
        """The forward pass of one image, `(1, in_channels, resolution, resolution)`, to `(1, num_classes)`."""
        spec, tape = self.spec, self.tape
        x = tape.input("image", (1, spec.in_channels, spec.resolution, spec.resolution))
        for part in spec.parts:
            x = self._part(x, part)
        x = tape.reshape(x, (1, spec.features))
        if spec.dropout and self.trainable:
            drawn = tape.input("uniform", x.shape)
            dropped = tape.node("Less", drawn.name, tape.number(spec.dropout))
            kept = tape.node("Where", dropped, tape.number(0.0), tape.number(1 / (1 - spec.dropout)))
            x = tape.multiply(x, Value(kept, x.shape))
        return tape.linear(x, self._parameter("classifier.weight"), self._parameter("classifier.bias"))

    def _part(self, x: Value, part: PartSpec) -> Value:
        match part:
            case ConvSpec():
                y = self._conv(x, part)
                return self.tape.add(x, y) if part.residual else y
            case MBConvSpec():
                return self._mbconv(x, part)
            case BottleneckSpec():
                return self._bottleneck(x, part)
            case PoolSpec():
                return self.tape.mean_pool(x) if part.kind == "mean" else self.tape.max_pool(x)

    def _mbconv(self, x: Value, part: MBConvSpec) -> Value:
        y = x if part.expand is None else self._conv(x, part.expand)
        y = self._conv(y, part.depthwise)
        if part.squeeze_excite is not None:
            gate = self.tape.mean_pool(y)
            for conv in part.squeeze_excite:
                gate = self._conv(gate, conv)
            y = self.tape.multiply(y, gate)
        y = self._conv(y, part.project)
        y = self.tape.add(x, y) if part.residual else y
        return y if part.lite is None else self.tape.add(y, self._lite(x, part.lite, y.shape[2:]))

    def _lite(self, x: Value, convs: tuple[ConvSpec, ConvSpec], sides: tuple[int, ...]) -> Value:
        """A block's lite residual branch, from the block's input to the size of its result."""
        x = self.tape.average_pool(x, 2)
        for conv in convs:
            x = self._conv(x, conv, LITE_NORM)
        height, width = sides
        return x if x.shape[2:] == sides else self.tape.upsample(x, (height, width))

    def _bottleneck(self, x: Value, part: BottleneckSpec) -> Value:
        y = self._conv(self._conv(self._conv(x, part.reduce), part.spatial), part.project)
        if part.downsample is not None:
            if part.averages and part.stride > 1:
                x = self.tape.average_pool(x, part.stride)
            x = self._conv(x, part.downsample)
        return self.tape.activation(self.tape.add(y, x), part.activation)

    def _conv(self, x: Value, spec: ConvSpec, norm: str | None = None) -> Value:
        """A convolution with its norm, the network's kind where none is given, and its activation."""
        norm = (norm or self.spec.norm) if spec.norm else None
        if norm == "batch":
            weight, bias = self._composed(spec)
        else:
            weight = self._parameter(f"{spec.name}.conv.weight")
            bias = self._parameter(f"{spec.name}.conv.bias") if spec.bias else None
        y = self.tape.conv(x, weight, bias, _window(spec, x.shape[2]))
        if norm == "group":
            y = self._group_norm(y, spec)
        return y if spec.activation is None else self.tape.activation(y, spec.activation)

    def _group_norm(self, x: Value, spec: ConvSpec) -> Value:
        y = self.tape.group_norm(x, x.shape[1] // GROUP_NORM_CHANNELS, self.spec.norm_eps)
        channels = (1, x.shape[1], 1, 1)
        weight, bias = (self._parameter(f"{spec.name}.norm.{leaf}") for leaf in ("weight", "bias"))
        y = self.tape.multiply(y, self.tape.reshape(weight, channels))
        return self.tape.add(y, self.tape.reshape(bias, channels))

    def _composed(self, spec: ConvSpec) -> tuple[Value, Value]:
        """Weight and bias of a convolution together with its batch norm, whose statistics are frozen."""
        names = {leaf: f"{spec.name}.{leaf}" for leaf in ("conv.weight", "norm.weight", "norm.bias")}
        mean, rate = self._statistics(spec)
        if self.trainable.isdisjoint((names["conv.weight"], names["norm.weight"])):

            def scale(tensors: Tensors) -> np.ndarray:
                return tensors[names["norm.weight"]] * rate(tensors)

            shape = self._shapes[names["conv.weight"]]
            weight = self._derived(
                f"{spec.name}.folded.weight", shape, lambda t: t[names["conv.weight"]] * _column(scale(t))
            )
            shift = self._derived(f"{spec.name}.folded.shift", (shape[0],), lambda t: -mean(t) * scale(t))
            return weight, self.tape.add(self._parameter(names["norm.bias"]), shift)
        kernel, factor = self._parameter(names["conv.weight"]), self._parameter(names["norm.weight"])
        factor = self.tape.multiply(factor, self._derived(f"{spec.name}.norm.rate", factor.shape, rate))
        shift = self.tape.multiply(factor, self._derived(f"{spec.name}.norm.centre", factor.shape, lambda t: -mean(t)))
        weight = self.tape.multiply(kernel, self.tape.reshape(factor, (kernel.shape[0], 1, 1, 1)))
        return weight, self.tape.add(self._parameter(names["norm.bias"]), shift)

    def _statistics(self, spec: ConvSpec) -> tuple[_Derive, _Derive]:
        """What gives a batch norm's mean, and one over its standard deviation."""
        eps, name = self.spec.norm_eps, spec.name

        def rate(tensors: Tensors) -> np.ndarray:
            return (1 / np.sqrt(tensors[f"{name}.norm.running_var"] + np.float32(eps))).astype(np.float32)

        return lambda tensors: tensors[f"{name}.norm.running_mean"], rate

    def _parameter(self, name: str) -> Value:
        if name not in self.parameters:
            self.tensors[name] = lambda tensors: tensors[name]
            shape, live = self._shapes[name], name in self.trainable
            part = self.plan.part_shape(name, shape) if live else shape
            self.parameters[name] = self.tape.input(name, shape, live=live, part=None if part == shape else part)
        return self.parameters[name]

    def _derived(self, name: str, shape: tuple[int, ...], derive: _Derive) -> Value:
        """A tensor that does not train and is computed before it is sent."""
        self.tensors[name] = derive
        return self.tape.input(name, shape)


def _column(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1, 1, 1, 1)


def _window(spec: ConvSpec, side: int) -> Window:
    before = after = spec.kernel // 2
    if spec.pads:
        before, after = same_padding(side, spec.kernel, spec.stride)
    return Window(spec.stride, (before, before, after, after), spec.in_channels if spec.depthwise else 1)
