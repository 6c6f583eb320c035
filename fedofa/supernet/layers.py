"""The torch side of a `NetworkSpec`: plain layers, no elastic ones, named as the parameter table names them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedofa.supernet.network import GROUP_NORM_CHANNELS, ConvSpec, MBConvSpec, NetworkSpec

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "h_swish": nn.Hardswish,
    "h_sigmoid": nn.Hardsigmoid,
}


def build_activation(name: str) -> nn.Module:
    """The activation layer of that name ("relu", "relu6", "h_swish", "h_sigmoid")."""
    return _ACTIVATIONS[name]()


def build_norm(kind: str, channels: int, eps: float) -> nn.Module:
    """Group norm with 8 channels a group, or batch norm without a step counter (its momentum is constant)."""
    if kind == "group":
        return nn.GroupNorm(channels // GROUP_NORM_CHANNELS, channels, eps=eps)
    norm = nn.BatchNorm2d(channels, eps=eps)
    norm.num_batches_tracked = None
    return norm


class ConvNormAct(nn.Module):
    """Convolution, norm, activation; the last two where the spec has them."""

    def __init__(self, spec: ConvSpec, norm: str, norm_eps: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            spec.in_channels,
            spec.out_channels,
            spec.kernel,
            stride=spec.stride,
            padding=spec.kernel // 2,
            groups=spec.in_channels if spec.depthwise else 1,
            bias=spec.bias,
        )
        self.norm = build_norm(norm, spec.out_channels, norm_eps) if spec.norm else None
        self.act = build_activation(spec.activation) if spec.activation else None

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, in_channels, h, w)` to `(batch, out_channels, ceil(h / stride), ceil(w / stride))`."""
        x = self.conv(x)
        x = x if self.norm is None else self.norm(x)
        return x if self.act is None else self.act(x)


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


class Network(nn.Module):
    """The classifier of one `NetworkSpec`."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        norm, eps = spec.norm, spec.norm_eps
        self.stem = ConvNormAct(spec.stem, norm, eps)
        self.stages = nn.ModuleList(
            nn.Sequential(*(MBConv(block, norm, eps) for block in stage)) for stage in spec.stages
        )
        self.final = ConvNormAct(spec.final, norm, eps)
        self.mix = ConvNormAct(spec.mix, norm, eps)
        self.dropout = nn.Dropout(spec.dropout)
        self.classifier = nn.Linear(spec.mix.out_channels, spec.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images `(batch, channels, resolution, resolution)` to logits `(batch, num_classes)`."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        x = self.final(x).mean((2, 3), keepdim=True)
        x = self.mix(x).flatten(1)
        return self.classifier(self.dropout(x))


def build_skeleton(spec: NetworkSpec) -> Network:
    """The network's layers on torch's meta device: shapes and names, no memory, no random numbers."""
    with torch.device("meta"):
        return Network(spec)
