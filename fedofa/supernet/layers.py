"""The torch side of a `NetworkSpec`: plain layers, no elastic ones, named as the parameter table names them.

Every layer is made on torch's meta device: shapes and names, no memory, float32 whatever torch's default is. Its
tensors are always given to it (`Filling`), so none of these layers draws initial values.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

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

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "h_swish": nn.Hardswish,
    "h_sigmoid": nn.Hardsigmoid,
}


def build_activation(name: str) -> nn.Module:
    """The activation layer of that name ("relu", "relu6", "h_swish", "h_sigmoid")."""
    return _ACTIVATIONS[name]()


class Conv2d(nn.Conv2d):
    """torch's convolution, made on the meta device."""

    def reset_parameters(self) -> None:
        """Nothing: the weights are given."""


class BatchNorm2d(nn.BatchNorm2d):
    """torch's batch norm, made on the meta device and without a step counter: its momentum is constant."""

    def reset_parameters(self) -> None:
        """Drop the step counter; the affine and the statistics are given."""
        self.num_batches_tracked = None


class GroupNorm(nn.GroupNorm):
    """torch's group norm with 8 channels a group, made on the meta device."""

    def reset_parameters(self) -> None:
        """Nothing: the affine is given."""


class Linear(nn.Linear):
    """torch's linear layer, made on the meta device."""

    def reset_parameters(self) -> None:
        """Nothing: the weights are given."""


def build_norm(kind: str, channels: int, eps: float) -> nn.Module:
    """Group norm with 8 channels a group, or batch norm."""
    if kind == "group":
        return GroupNorm(channels // GROUP_NORM_CHANNELS, channels, eps=eps, device="meta", dtype=torch.float32)
    return BatchNorm2d(channels, eps=eps, device="meta", dtype=torch.float32)


class SamePad(nn.Module):
    """Zeros around a map, as many as a convolution of that kernel and stride needs there (see `same_padding`)."""

    def __init__(self, kernel: int, stride: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.stride = stride

    def zeros(self, height: int, width: int) -> tuple[int, int, int, int]:
        """The zeros left, right, above and below of a map of that size."""
        return *same_padding(width, self.kernel, self.stride), *same_padding(height, self.kernel, self.stride)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, channels, h, w)` to `(batch, channels, h + zeros, w + zeros)`."""
        zeros = self.zeros(*x.shape[2:])
        return functional.pad(x, zeros) if any(zeros) else x


class ConvNormAct(nn.Module):
    """Padding, convolution, norm, activation, plus its input; all but the convolution where the spec has them."""

    def __init__(self, spec: ConvSpec, norm: str, norm_eps: float) -> None:
        super().__init__()
        self.pad = SamePad(spec.kernel, spec.stride) if spec.pads else None
        self.conv = Conv2d(
            spec.in_channels,
            spec.out_channels,
            spec.kernel,
            stride=spec.stride,
            padding=0 if spec.pads else spec.kernel // 2,
            groups=spec.in_channels if spec.depthwise else 1,
            bias=spec.bias,
            device="meta",
            dtype=torch.float32,
        )
        self.norm = build_norm(norm, spec.out_channels, norm_eps) if spec.norm else None
        self.act = build_activation(spec.activation) if spec.activation else None
        self.residual = spec.residual

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, in_channels, h, w)` to `(batch, out_channels, ceil(h / stride), ceil(w / stride))`."""
        y = self.conv(x if self.pad is None else self.pad(x))
        y = y if self.norm is None else self.norm(y)
        y = y if self.act is None else self.act(y)
        return x + y if self.residual else y


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from the pooled channels."""

    def __init__(self, reduce: ConvSpec, expand: ConvSpec, norm: str, norm_eps: float) -> None:
        super().__init__()
        self.reduce = ConvNormAct(reduce, norm, norm_eps)
        self.expand = ConvNormAct(expand, norm, norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Shape is kept."""
        return x * self.expand(self.reduce(x.mean((2, 3), keepdim=True)))


class MBConv(nn.Module):
    """Mobile inverted bottleneck of one `MBConvSpec`."""

    def __init__(self, spec: MBConvSpec, norm: str, norm_eps: float) -> None:
        super().__init__()
        self.expand = ConvNormAct(spec.expand, norm, norm_eps) if spec.expand else None
        self.depthwise = ConvNormAct(spec.depthwise, norm, norm_eps)
        self.squeeze_excite = SqueezeExcite(*spec.squeeze_excite, norm, norm_eps) if spec.squeeze_excite else None
        self.project = ConvNormAct(spec.project, norm, norm_eps)
        self.residual = spec.residual
        self.lite = LiteResidual(*spec.lite, norm_eps) if spec.lite else None

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, in_channels, h, w)` to `(batch, out_channels, ceil(h / stride), ceil(w / stride))`."""
        y = x if self.expand is None else self.expand(x)
        y = self.depthwise(y)
        y = y if self.squeeze_excite is None else self.squeeze_excite(y)
        y = self.project(y)
        y = x + y if self.residual else y
        return y if self.lite is None else y + self.lite(x, y)


class LiteResidual(nn.Module):
    """The lite residual branch of a block: averages of 2 x 2, two convolutions, and up to the size of the block's map.

    It begins with a last norm whose scale is zero, so that the block begins as it was without the branch.
    """

    def __init__(self, spatial: ConvSpec, project: ConvSpec, norm_eps: float) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(2, ceil_mode=True)
        self.spatial = ConvNormAct(spatial, LITE_NORM, norm_eps)
        self.project = ConvNormAct(project, LITE_NORM, norm_eps)

    def forward(self, x: Tensor, beside: Tensor) -> Tensor:
        """From the block's input `(batch, in_channels, h, w)` to the shape of what it is added to."""
        y = self.project(self.spatial(self.pool(x)))
        if y.shape[2:] == beside.shape[2:]:
            return y
        return functional.interpolate(y, size=beside.shape[2:], mode="bilinear", align_corners=False)


class Bottleneck(nn.Module):
    """Residual bottleneck of one `BottleneckSpec`."""

    def __init__(self, spec: BottleneckSpec, norm: str, norm_eps: float) -> None:
        super().__init__()
        self.reduce = ConvNormAct(spec.reduce, norm, norm_eps)
        self.spatial = ConvNormAct(spec.spatial, norm, norm_eps)
        self.project = ConvNormAct(spec.project, norm, norm_eps)
        pools = spec.downsamples and spec.averages and spec.stride > 1
        self.pool = nn.AvgPool2d(spec.stride, ceil_mode=True) if pools else None
        self.downsample = ConvNormAct(spec.downsample, norm, norm_eps) if spec.downsample else None
        self.act = build_activation(spec.activation)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, in_channels, h, w)` to `(batch, out_channels, ceil(h / stride), ceil(w / stride))`."""
        y = self.project(self.spatial(self.reduce(x)))
        x = x if self.pool is None else self.pool(x)
        x = x if self.downsample is None else self.downsample(x)
        return self.act(y + x)


class MeanPool(nn.Module):
    """The mean over the whole map."""

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, channels, h, w)` to `(batch, channels, 1, 1)`."""
        return x.mean((2, 3), keepdim=True)


class Network(nn.Sequential):
    """The classifier of one `NetworkSpec`: images `(batch, channels, resolution, resolution)` to logits.

    Parts that share the head of their dotted names lie together in a `Sequential` of that name ("stages.1.0" in
    "stages", then "1"), so that the chain runs in order and a part's name is its path.

    Args:
        spec: the description.
        filling: the tensors that it owns; without one they are on the meta device.
    """

    def __init__(self, spec: NetworkSpec, filling: Filling | None = None) -> None:
        super().__init__()
        self.training = filling is None or not filling.frozen
        for part in spec.parts:
            self._add(part.name, _part_blueprint(part, spec.norm, spec.norm_eps), filling)
        self._add("flatten", _FLATTEN, filling)
        self._add("dropout", _dropout_blueprint(spec.dropout), filling)
        self._add("classifier", _classifier_blueprint(spec.features, spec.num_classes), filling)

    def _add(self, name: str, blueprint: Blueprint, filling: Filling | None) -> None:
        *path, leaf = name.split(".")
        parent: nn.Module = self
        for step in path:
            child = parent._modules.get(step)
            if child is None:
                child = parent._modules[step] = _CHAIN.make(filling)
            parent = child
        parent._modules[leaf] = blueprint.make(filling, f"{name}.")


class Filling:
    """Tensors by name for a module that is being made, and how many of them it has taken.

    Args:
        tensors: parameters and buffers by their names in the whole module.
        frozen: evaluation mode, and parameters that ask for no gradients.
    """

    __slots__ = ("frozen", "num_taken", "tensors")

    def __init__(self, tensors: Mapping[str, Tensor], frozen: bool) -> None:
        self.tensors = tensors
        self.frozen = frozen
        self.num_taken = 0


class MisfillError(LookupError):
    """A filling has no tensor of that name and shape; whoever fills says so in words."""


_CONTAINERS = frozenset({dict, set, OrderedDict})
_FILLED = frozenset({"_modules", "_parameters", "_buffers"})


class Blueprint:
    """A module taken apart, from which modules like it are made: cheaper than its constructor and than a deep copy.

    Each module made has dictionaries and parameters of its own; their other values are shared. The first one is to be
    left as it is.
    """

    __slots__ = ("_attributes", "_buffers", "_children", "_containers", "_hooks", "_kind", "_parameters")

    def __init__(self, module: nn.Module) -> None:
        attributes: dict[str, Any] = dict(vars(module))
        own = {key: value for key, value in attributes.items() if type(value) in _CONTAINERS and key not in _FILLED}
        self._kind = type(module)
        self._attributes = attributes
        self._hooks = [key for key, value in own.items() if type(value) is OrderedDict and not value]
        self._containers = [(key, value) for key, value in own.items() if key not in self._hooks]
        self._parameters = [(name, item.shape) for name, item in module._parameters.items() if item is not None]
        self._buffers = [(name, item.shape) for name, item in module._buffers.items() if item is not None]
        self._children = [
            (name, None if child is None else Blueprint(child)) for name, child in module._modules.items()
        ]

    def make(self, filling: Filling | None = None, prefix: str = "") -> nn.Module:
        """A module like the first one: on the meta device, or with the filling's tensors whose names have the prefix.

        Raises:
            MisfillError: when the filling has no such tensor, or one of another shape.
        """
        attributes = self._attributes.copy()
        for key in self._hooks:
            attributes[key] = OrderedDict()
        for key, container in self._containers:
            attributes[key] = container.copy()
        parameters = attributes["_parameters"] = attributes["_parameters"].copy()
        buffers = attributes["_buffers"] = attributes["_buffers"].copy()
        if filling is None:
            for name, _ in self._parameters:
                parameters[name] = nn.Parameter(parameters[name])
        else:
            attributes["training"] = not filling.frozen
            if self._parameters or self._buffers:
                self._fill(parameters, buffers, filling, prefix)
        children = attributes["_modules"] = {}
        for name, child in self._children:
            children[name] = None if child is None else child.make(filling, f"{prefix}{name}.")
        module = object.__new__(self._kind)
        object.__setattr__(module, "__dict__", attributes)  # past nn.Module's own, which sorts what it is given
        return module

    def _fill(self, parameters: dict[str, Any], buffers: dict[str, Any], filling: Filling, prefix: str) -> None:
        """Give a module its tensors."""
        tensors, trains = filling.tensors, not filling.frozen
        for name, shape in self._parameters:
            tensor = tensors.get(prefix + name)
            if tensor is None or tensor.shape != shape:
                raise MisfillError(prefix + name)
            parameters[name] = nn.Parameter(tensor, trains)
        for name, shape in self._buffers:
            tensor = tensors.get(prefix + name)
            if tensor is None or tensor.shape != shape:
                raise MisfillError(prefix + name)
            buffers[name] = tensor
        filling.num_taken += len(self._parameters) + len(self._buffers)


_CHAIN = Blueprint(nn.Sequential())
_FLATTEN = Blueprint(nn.Flatten())


@lru_cache(maxsize=1024)
@torch.inference_mode(False)
def _part_blueprint(part: PartSpec, norm: str, norm_eps: float) -> Blueprint:
    """One part's layers, kept: a space has few distinct parts, of which all its subnets are chained.

    They are ordinary tensors even where inference mode is on, for whoever makes modules of them later.
    """
    return Blueprint(_build_part(part, norm, norm_eps))


@lru_cache(maxsize=64)
def _dropout_blueprint(probability: float) -> Blueprint:
    return Blueprint(nn.Dropout(probability))


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _classifier_blueprint(features: int, num_classes: int) -> Blueprint:
    return Blueprint(Linear(features, num_classes, device="meta", dtype=torch.float32))


def build_part(part: PartSpec, norm: str, norm_eps: float) -> nn.Module:
    """The layers of one part, on the meta device."""
    return _part_blueprint(part, norm, norm_eps).make()


def _build_part(part: PartSpec, norm: str, norm_eps: float) -> nn.Module:
    match part:
        case ConvSpec():
            return ConvNormAct(part, norm, norm_eps)
        case MBConvSpec():
            return MBConv(part, norm, norm_eps)
        case BottleneckSpec():
            return Bottleneck(part, norm, norm_eps)
        case PoolSpec():
            return nn.MaxPool2d(3, stride=2, padding=1) if part.kind == "max" else MeanPool()
