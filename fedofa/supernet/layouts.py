"""How others name the tensors of a chain: for every layer here the names of its convolution and its norm there.

Names are templates. Of a block: `{number}` counts all blocks from 0, `{next}` from 1, `{stage}` and `{block}` are those
of its name here, `{layer}` counts stages from 1. After the blocks: `{next}` is the number of blocks plus 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from fedofa.supernet.network import BlockSpec, BottleneckSpec, ConvSpec, NetworkSpec

Names = tuple[str, str]
"""Of a layer's convolution and of its norm."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The names of one library.

    Args:
        stem, mix: of the layers before and after the blocks.
        classifier: of the linear layer.
        block: what the names of a block's layers begin with.
        inverted, separable: layer -> names in an inverted bottleneck that expands, and in one that does not.
        residual: layer -> names in a residual bottleneck.
    """

    stem: Names
    mix: Names
    classifier: str
    block: str
    inverted: Mapping[str, Names] = field(default_factory=dict)
    separable: Mapping[str, Names] = field(default_factory=dict)
    residual: Mapping[str, Names] = field(default_factory=dict)

    def keys(self, spec: NetworkSpec) -> dict[str, str]:
        """Name here -> name there, for every tensor of the network; those of blocks that it has not are left out."""
        owners = dict(self._owners(spec))
        pairs = ((item.name, *item.name.rsplit(".", 1)) for item in spec.parameters())
        return {name: f"{owners[owner]}.{leaf}" for name, owner, leaf in pairs if owner in owners}

    def _owners(self, spec: NetworkSpec) -> Iterator[tuple[str, str]]:
        """Name here and there of every module that has tensors."""
        yield "classifier", self.classifier
        outside = {"stem": self.stem, "mix": self.mix}
        for part in spec.parts:
            if isinstance(part, ConvSpec):
                yield from _named(part.name, outside[part.name], next=len(spec.blocks) + 1)
        for number, block in enumerate(spec.blocks):
            _, stage, place = block.name.split(".")
            numbers = {"number": number, "next": number + 1, "stage": stage, "block": place, "layer": int(stage) + 1}
            for layer, names in self._layers(block).items():
                inside = (f"{self.block}.{names[0]}", f"{self.block}.{names[1]}")
                yield from _named(f"{block.name}.{layer}", inside, **numbers)

    def _layers(self, block: BlockSpec) -> Mapping[str, Names]:
        if isinstance(block, BottleneckSpec):
            return self.residual
        return self.inverted if block.expands else self.separable


def _named(ours: str, names: Names, **numbers: int | str) -> Iterator[tuple[str, str]]:
    for leaf, name in zip(("conv", "norm"), names, strict=True):
        yield f"{ours}.{leaf}", name.format(**numbers)


_OWN = {layer: (f"{layer}.conv", f"{layer}.norm") for layer in ("expand", "depthwise", "project")}

LAYOUTS: dict[str, Layout] = {
    "fedofa": Layout(
        stem=("stem.conv", "stem.norm"),
        mix=("mix.conv", "mix.norm"),
        classifier="classifier",
        block="stages.{stage}.{block}",
        inverted=_OWN,
        separable=_OWN,
        residual={
            layer: (f"{layer}.conv", f"{layer}.norm") for layer in ("reduce", "spatial", "project", "downsample")
        },
    ),
    "efficientnet_pytorch": Layout(
        stem=("_conv_stem", "_bn0"),
        mix=("_conv_head", "_bn1"),
        classifier="_fc",
        block="_blocks.{number}",
        inverted={
            "expand": ("_expand_conv", "_bn0"),
            "depthwise": ("_depthwise_conv", "_bn1"),
            "project": ("_project_conv", "_bn2"),
        },
        separable={"depthwise": ("_depthwise_conv", "_bn1"), "project": ("_project_conv", "_bn2")},
    ),
    "torchvision_mobilenet": Layout(
        stem=("features.0.0", "features.0.1"),
        mix=("features.{next}.0", "features.{next}.1"),
        classifier="classifier.1",
        block="features.{next}.conv",
        inverted={"expand": ("0.0", "0.1"), "depthwise": ("1.0", "1.1"), "project": ("2", "3")},
        separable={"depthwise": ("0.0", "0.1"), "project": ("1", "2")},
    ),
    "flat_mobilenet": Layout(
        stem=("features.0.0", "features.0.1"),
        mix=("features.{next}.0", "features.{next}.1"),
        classifier="classifier.1",
        block="features.{next}.conv",
        inverted={"expand": ("0", "1"), "depthwise": ("3", "4"), "project": ("6", "7")},
        separable={"depthwise": ("0", "1"), "project": ("3", "4")},
    ),
    "torchvision_resnet": Layout(
        stem=("conv1", "bn1"),
        mix=("", ""),
        classifier="fc",
        block="layer{layer}.{block}",
        residual={
            "reduce": ("conv1", "bn1"),
            "spatial": ("conv2", "bn2"),
            "project": ("conv3", "bn3"),
            "downsample": ("downsample.0", "downsample.1"),
        },
    ),
    "timm_efficientnet": Layout(
        stem=("conv_stem", "bn1"),
        mix=("conv_head", "bn2"),
        classifier="classifier",
        block="blocks.{stage}.{block}",
        inverted={"expand": ("conv_pw", "bn1"), "depthwise": ("conv_dw", "bn2"), "project": ("conv_pwl", "bn3")},
        separable={"depthwise": ("conv_dw", "bn1"), "project": ("conv_pw", "bn2")},
    ),
}
"""Layouts that a file may have: our own names; those of EfficientNet ports; torchvision's MobileNetV2, and the same in
one flat sequence a block as older files have it; torchvision's residual networks; timm's EfficientNets and MobileNetV2.
"""
