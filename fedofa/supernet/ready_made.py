"""Networks described here as chains, whose pretrained weights can be had: EfficientNet-Lite0 and MobileNetV2."""

from __future__ import annotations

from dataclasses import replace

from fedofa.supernet.chain import BlockSize, ChainSpec
from fedofa.supernet.published import IMAGENET_MEAN, IMAGENET_STD


def _blocks(*rows: tuple[int, float, int, int, int]) -> tuple[BlockSize, ...]:
    """Blocks of rows (kernel, expand, width, blocks, stride of the first)."""
    return tuple(
        BlockSize(width, kernel, expand, stride if number == 0 else 1)
        for kernel, expand, width, count, stride in rows
        for number in range(count)
    )


READY_MADE: dict[str, ChainSpec] = {
    "efficientnet_lite0": ChainSpec(
        _blocks(
            (3, 1, 16, 1, 1),
            (3, 6, 24, 2, 2),
            (5, 6, 40, 2, 2),
            (3, 6, 80, 3, 2),
            (5, 6, 112, 3, 1),
            (5, 6, 192, 4, 2),
            (3, 6, 320, 1, 1),
        ),
        padding="tensorflow",
        norm_eps=1e-3,
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
    ),
    "mobilenet_v2": ChainSpec(
        _blocks(
            (3, 1, 16, 1, 1),
            (3, 6, 24, 2, 2),
            (3, 6, 32, 3, 2),
            (3, 6, 64, 4, 2),
            (3, 6, 96, 3, 1),
            (3, 6, 160, 3, 2),
            (3, 6, 320, 1, 1),
        ),
        kernels=(3,),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    ),
}
"""Networks described here: EfficientNet-Lite0 (arXiv 1905.11946 without squeeze-excite, ReLU6) and MobileNetV2 (arXiv
1801.04381, table 2)."""

_LITE0 = READY_MADE["efficientnet_lite0"]
TIMM: dict[str, ChainSpec] = {
    "tf_efficientnet_lite0": replace(_LITE0, mean=(0.5,) * 3, std=(0.5,) * 3),
    "efficientnet_lite0": replace(_LITE0, padding="symmetric", norm_eps=1e-5, mean=IMAGENET_MEAN, std=IMAGENET_STD),
    "mobilenetv2_100": READY_MADE["mobilenet_v2"],
}
"""timm's names of networks that are described here; its own training of Lite0 pads and normalises in another way."""
