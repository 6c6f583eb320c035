"""A supernet's structure from its settings, which says nothing of where its first weights come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedofa.supernet import fixed
from fedofa.types.errors import ConfigError

PRETRAINED = "pretrained"
"""The setting that says where a supernet's first weights come from; its structure does not depend on it."""


def describe_structure(
    settings: Mapping[str, Any], in_channels: int, num_classes: int, side: tuple[int, int] | None = None
) -> dict[str, Any]:
    """What `families.build_supernet` needs to build the supernet of `supernet` settings.

    Args:
        settings: the `supernet` group.
        in_channels, num_classes: of the images and the labels.
        side: height and width of the images, which a fixed network depends on; None where there are no images.

    Raises:
        ConfigError: for a fixed network without images.
    """
    structure = {name: value for name, value in settings.items() if name != PRETRAINED}
    if settings["family"] != fixed.FAMILY:
        return {**structure, "in_channels": in_channels, "num_classes": num_classes}
    if side is None:
        raise ConfigError(
            "supernet.family: expected a space of many subnets, found the fixed network, in which there is nothing to "
            "choose; take an elastic one (supernet=small)"
        )
    return {**structure, "input_shape": [in_channels, *side], "num_classes": num_classes}
