"""The torch side of a `NetworkSpec`: plain layers, no elastic ones, named as the parameter table names them.

Every layer is made on torch's meta device: shapes and names, no memory. Its tensors are always given to it
(`base.assemble`), so none of these layers draws initial values.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import lru_cache

from torch import Tensor, nn
from torch.nn import functional

from fedofa.supernet.network import (
    GROUP_NORM_CHANNELS,
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
        return GroupNorm(channels // GROUP_NORM_CHANNELS, channels, eps=eps, device="meta")
    return BatchNorm2d(channels, eps=eps, device="meta")


class SamePad(nn.Module):
    """Zeros around a map, as many as a convolution of that kernel and stride needs there (see `same_padding`)."""

    def __init__(self, kernel: int, stride: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, channels, h, w)` to `(batch, channels, h + zeros, w + zeros)`."""
        top, bottom = same_padding(x.shape[2], self.kernel, self.stride)
        left, right = same_padding(x.shape[3], self.kernel, self.stride)
        return functional.pad(x, (left, right, top, bottom)) if top + bottom + left + right else x


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

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, in_channels, h, w)` to `(batch, out_channels, ceil(h / stride), ceil(w / stride))`."""
        y = x if self.expand is None else self.expand(x)
        y = self.depthwise(y)
        y = y if self.squeeze_excite is None else self.squeeze_excite(y)
        y = self.project(y)
        return x + y if self.residual else y


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
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        for part in spec.parts:
            self._add(part.name, build_part(part, spec.norm, spec.norm_eps))
        self.flatten = nn.Flatten()
        self.dropout = nn.Dropout(spec.dropout)
        self.classifier = Linear(spec.features, spec.num_classes, device="meta")

    def _add(self, name: str, module: nn.Module) -> None:
        *path, leaf = name.split(".")
        parent: nn.Module = self
        for step in path:
            if step not in parent._modules:
                parent.add_module(step, nn.Sequential())
            parent = parent.get_submodule(step)
        parent.add_module(leaf, module)


_CONTAINERS = frozenset({dict, set, OrderedDict})


def copy_structure(module: nn.Module) -> nn.Module:
    """A module like the given one, with dictionaries of its own and the same tensors: cheaper than a new one."""
    copied = object.__new__(type(module))
    own = vars(copied)
    for key, value in vars(module).items():
        kind = value.__class__
        own[key] = value if kind not in _CONTAINERS else value.copy() if value else kind()
    for name, child in module._modules.items():
        copied._modules[name] = None if child is None else copy_structure(child)
    return copied


def build_part(part: PartSpec, norm: str, norm_eps: float) -> nn.Module:
    """The layers of one part, on the meta device."""
    return copy_structure(_prototype(part, norm, norm_eps))


@lru_cache(maxsize=512)
def _prototype(part: PartSpec, norm: str, norm_eps: float) -> nn.Module:
    """The part's layers, to be copied and never used themselves."""
    match part:
        case ConvSpec():
            return ConvNormAct(part, norm, norm_eps)
        case MBConvSpec():
            return MBConv(part, norm, norm_eps)
        case BottleneckSpec():
            return Bottleneck(part, norm, norm_eps)
        case PoolSpec():
            return nn.MaxPool2d(3, stride=2, padding=1) if part.kind == "max" else MeanPool()
