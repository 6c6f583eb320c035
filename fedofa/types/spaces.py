"""The axes of block networks, and the search spaces of the published Once-for-All supernets (arXiv 1908.09791)."""

from __future__ import annotations

from collections.abc import Sequence

from fedofa.types.space import Axis, Control, SearchSpace

MOBILENET_V3, PROXYLESS, RESNET = "mobilenet_v3", "proxyless", "resnet"
"""Families; a configuration carries the name, and `mobilenet_v3` is the same space at every width."""

KERNELS = (3, 5, 7)
EXPANDS = (3, 4, 6)
DEPTHS = (2, 3, 4)
RESOLUTIONS = (128, 144, 160, 176, 192, 208, 224)
RESNET_EXPANDS = (0.2, 0.25, 0.35)
RESNET_DEPTHS = (0, 1, 2)
RESNET_WIDTHS = (0.65, 0.8, 1.0)
RESNET_BLOCKS = (2, 2, 4, 2)
STEM_WIDTHS = 2
"""Positions of a residual network's width axis that are before its stages: the stem's inner and its output width."""


def block_controls(fixed_blocks: Sequence[int], depths: Sequence[float]) -> tuple[Control | None, ...]:
    """One entry a block of the deepest network: when it exists.

    Args:
        fixed_blocks: for each stage the blocks that it has beside those that the depth axis adds.
        depths: the values of the depth axis, which has one position a stage.
    """
    return tuple(
        Control("depth", stage, block + 1 - fixed) if block + 1 - fixed > depths[0] else None
        for stage, fixed in enumerate(fixed_blocks)
        for block in range(fixed + int(depths[-1]))
    )


def mbconv_space(
    family: str,
    num_stages: int,
    kernels: Sequence[int],
    expands: Sequence[float],
    depths: Sequence[int],
    resolutions: Sequence[int],
    *,
    tail_blocks: int = 0,
) -> SearchSpace:
    """Axes depth (a stage), kernel and expand (a block), resolution.

    `tail_blocks` blocks follow the stages in every subnet, with a kernel and an expand ratio of their own.
    """
    blocks = block_controls([0] * num_stages, depths) + (None,) * tail_blocks
    return SearchSpace(
        family,
        (
            Axis.free("depth", depths, num_stages),
            Axis("kernel", tuple(kernels), blocks),
            Axis("expand", tuple(expands), blocks),
            Axis.free("resolution", resolutions, 1, is_input=True),
        ),
    )


def residual_space(
    family: str,
    fixed_blocks: Sequence[int],
    expands: Sequence[float],
    depths: Sequence[int],
    widths: Sequence[float],
    resolutions: Sequence[int],
) -> SearchSpace:
    """Axes stem_depth, depth (blocks added to a stage), width (stem's inner, stem's, each stage's), expand, resolution.

    The stem's middle convolution exists where stem_depth is the largest depth; its other value is the smallest.
    """
    return SearchSpace(
        family,
        (
            Axis.free("stem_depth", sorted({depths[0], depths[-1]}), 1),
            Axis.free("depth", depths, len(fixed_blocks)),
            Axis.free("width", widths, STEM_WIDTHS + len(fixed_blocks)),
            Axis("expand", tuple(expands), block_controls(fixed_blocks, depths)),
            Axis.free("resolution", resolutions, 1, is_input=True),
        ),
    )


PUBLISHED_SPACES = {
    MOBILENET_V3: mbconv_space(MOBILENET_V3, 5, KERNELS, EXPANDS, DEPTHS, RESOLUTIONS),
    PROXYLESS: mbconv_space(PROXYLESS, 5, KERNELS, EXPANDS, DEPTHS, RESOLUTIONS, tail_blocks=1),
    RESNET: residual_space(RESNET, RESNET_BLOCKS, RESNET_EXPANDS, RESNET_DEPTHS, RESNET_WIDTHS, RESOLUTIONS),
}
"""7371^5, 9 * 7371^5 and 18 * 351^3 * 3159 configurations.

A stage of the first two has (3 * 3)^2 + (3 * 3)^3 + (3 * 3)^4 = 7371 choices, Proxyless' last block 9. A stage of two to
four residual blocks has 3 * (3^2 + 3^3 + 3^4) = 351, one of four to six 3 * (3^4 + 3^5 + 3^6) = 3159, the stem 2 * 3 * 3.
"""
