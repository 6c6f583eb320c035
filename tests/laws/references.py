"""Pretrained networks as straight functions of their files' tensors: what the supernets are compared with."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

LITE0 = [  # of each block: kernel, stride, whether it expands
    (3, 1, False),
    *[(3, 2, True), (3, 1, True)],
    *[(5, 2, True), (5, 1, True)],
    *[(3, 2, True), (3, 1, True), (3, 1, True)],
    *[(5, 1, True)] * 3,
    *[(5, 2, True)] + [(5, 1, True)] * 3,
    (3, 1, True),
]
MOBILENET_V2 = [  # of each block: stride, expand, width
    (1, 1, 16),
    *[(2, 6, 24), (1, 6, 24)],
    *[(2, 6, 32)] + [(1, 6, 32)] * 2,
    *[(2, 6, 64)] + [(1, 6, 64)] * 3,
    *[(1, 6, 96)] * 3,
    *[(2, 6, 160)] + [(1, 6, 160)] * 2,
    (1, 6, 320),
]


def tensorflow_conv(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """TensorFlow's "SAME" convolution, one axis after the other: the smaller half of the zeros first."""
    size, groups = weight.shape[-1], x.shape[1] // weight.shape[1]
    for axis in (2, 3):
        windows = math.ceil(x.shape[axis] / stride)
        zeros = max((windows - 1) * stride + size - x.shape[axis], 0)
        shape = list(x.shape)
        shape[axis] = zeros // 2
        before = x.new_zeros(shape)
        shape[axis] = zeros - zeros // 2
        x = torch.cat([before, x, x.new_zeros(shape)], axis)
    return functional.conv2d(x, weight, stride=stride, groups=groups)


def batch_norm(x: Tensor, weights: Mapping[str, Tensor], name: str, eps: float) -> Tensor:
    mean, var, scale, shift = (
        weights[f"{name}.{leaf}"].view(1, -1, 1, 1) for leaf in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + eps).sqrt() * scale + shift


def lite0_logits(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """EfficientNet-Lite0 in evaluation mode, from the tensors of its PyTorch port."""

    def layer(x: Tensor, conv: str, norm: str, stride: int = 1) -> Tensor:
        return batch_norm(tensorflow_conv(x, weights[f"{conv}.weight"], stride), weights, norm, 1e-3)

    x = layer(x, "_conv_stem", "_bn0", 2).clamp(0, 6)
    for number, (_, stride, expands) in enumerate(LITE0):
        block, y = f"_blocks.{number}", x
        if expands:
            y = layer(y, f"{block}._expand_conv", f"{block}._bn0").clamp(0, 6)
        y = layer(y, f"{block}._depthwise_conv", f"{block}._bn1", stride).clamp(0, 6)
        y = layer(y, f"{block}._project_conv", f"{block}._bn2")
        x = x + y if stride == 1 and x.shape == y.shape else y
    x = layer(x, "_conv_head", "_bn1").clamp(0, 6).mean((2, 3))
    return x @ weights["_fc.weight"].T + weights["_fc.bias"]


def mobilenet_v2_weights(generator: torch.Generator, num_classes: int = 1000) -> dict[str, Tensor]:
    """Random tensors of MobileNetV2 under torchvision's names."""
    weights: dict[str, Tensor] = {}

    def conv(name: str, norm: str, out: int, fan_in: int, size: int = 1) -> None:
        scale = math.sqrt(2 / (fan_in * size**2))
        weights[f"{name}.weight"] = scale * torch.randn(out, fan_in, size, size, generator=generator)
        for leaf, base in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            weights[f"{norm}.{leaf}"] = base + 0.2 * torch.rand(out, generator=generator)
        weights[f"{norm}.num_batches_tracked"] = torch.tensor(9)

    conv("features.0.0", "features.0.1", 32, 3, 3)
    channels = 32
    for number, (_, expand, width) in enumerate(MOBILENET_V2, 1):
        block, mid, at = f"features.{number}.conv", channels * expand, 0
        if expand > 1:
            conv(f"{block}.0.0", f"{block}.0.1", mid, channels)
            at = 1
        conv(f"{block}.{at}.0", f"{block}.{at}.1", mid, 1, 3)
        conv(f"{block}.{at + 1}", f"{block}.{at + 2}", width, mid)
        channels = width
    conv("features.18.0", "features.18.1", 1280, channels)
    weights["classifier.1.weight"] = 0.05 * torch.randn(num_classes, 1280, generator=generator)
    weights["classifier.1.bias"] = torch.randn(num_classes, generator=generator)
    return weights


def mobilenet_v2_features(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """MobileNetV2 in evaluation mode up to the pooled features, from torchvision's or the older flat names."""
    flat = "features.1.conv.0.weight" in weights

    def layer(x: Tensor, conv: str, norm: str, stride: int = 1) -> Tensor:
        weight = weights[f"{conv}.weight"]
        groups, padding = x.shape[1] // weight.shape[1], weight.shape[-1] // 2
        y = functional.conv2d(x, weight, stride=stride, padding=padding, groups=groups)
        return batch_norm(y, weights, norm, 1e-5)

    x = layer(x, "features.0.0", "features.0.1", 2).clamp(0, 6)
    for number, (stride, expand, _) in enumerate(MOBILENET_V2, 1):
        block, y = f"features.{number}.conv", x
        if flat:
            names = [(f"{block}.{at}", f"{block}.{at + 1}") for at in (0, 3, 6)]
        else:
            names = [(f"{block}.0.0", f"{block}.0.1"), (f"{block}.1.0", f"{block}.1.1"), (f"{block}.2", f"{block}.3")]
            names = names if expand > 1 else [names[0], (f"{block}.1", f"{block}.2")]
        if expand > 1:
            y = layer(y, *names[0]).clamp(0, 6)
            names = names[1:]
        y = layer(y, *names[0], stride).clamp(0, 6)
        y = layer(y, *names[1])
        x = x + y if stride == 1 and x.shape == y.shape else y
    return layer(x, "features.18.0", "features.18.1").clamp(0, 6).mean((2, 3))


def flat_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's MobileNetV2 names as older files have them: one sequence a block."""
    flat = {}
    for key, value in weights.items():
        parts, name = key.split("."), key
        if parts[2:3] == ["conv"]:
            pairs = 2 if f"features.{parts[1]}.conv.1.0.weight" in weights else 1  # of convolution, norm and activation
            nested = parts[4].isdigit()
            place = 3 * int(parts[3]) + int(parts[4]) if nested else int(parts[3]) + 2 * pairs
            name = ".".join([*parts[:3], str(place), *parts[5 if nested else 4 :]])
        flat[name] = value
    return flat


def resnet_weights(generator: torch.Generator) -> dict[str, Tensor]:
    """Random tensors of a small residual network (stages of 2 and 1 bottlenecks) under torchvision's names."""
    weights: dict[str, Tensor] = {}

    def conv(name: str, norm: str, out: int, fan_in: int, size: int = 1) -> None:
        weights[f"{name}.weight"] = math.sqrt(2 / (fan_in * size**2)) * torch.randn(
            out, fan_in, size, size, generator=generator
        )
        for leaf, base in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            weights[f"{norm}.{leaf}"] = base + 0.2 * torch.rand(out, generator=generator)

    conv("conv1", "bn1", 16, 3, 7)
    channels = 16
    for name, mid, width in (("layer1.0", 16, 64), ("layer1.1", 16, 64), ("layer2.0", 32, 128)):
        conv(f"{name}.conv1", f"{name}.bn1", mid, channels)
        conv(f"{name}.conv2", f"{name}.bn2", mid, mid, 3)
        conv(f"{name}.conv3", f"{name}.bn3", width, mid)
        if channels != width:
            conv(f"{name}.downsample.0", f"{name}.downsample.1", width, channels)
        channels = width
    weights["fc.weight"] = 0.1 * torch.randn(7, channels, generator=generator)
    weights["fc.bias"] = torch.randn(7, generator=generator)
    return weights


def resnet_logits(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The network of `resnet_weights` in evaluation mode; a stage's stride lies in its 3 x 3 convolution."""

    def layer(x: Tensor, conv: str, norm: str, stride: int = 1) -> Tensor:
        weight = weights[f"{conv}.weight"]
        y = functional.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        return batch_norm(y, weights, norm, 1e-5)

    x = functional.max_pool2d(layer(x, "conv1", "bn1", 2).relu(), 3, 2, 1)
    for name, stride in (("layer1.0", 1), ("layer1.1", 1), ("layer2.0", 2)):
        y = layer(x, f"{name}.conv1", f"{name}.bn1").relu()
        y = layer(y, f"{name}.conv2", f"{name}.bn2", stride).relu()
        y = layer(y, f"{name}.conv3", f"{name}.bn3")
        if f"{name}.downsample.0.weight" in weights:
            x = layer(x, f"{name}.downsample.0", f"{name}.downsample.1", stride)
        x = (x + y).relu()
    return x.mean((2, 3)) @ weights["fc.weight"].T + weights["fc.bias"]
