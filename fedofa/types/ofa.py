"""Subnet configurations as the pip package `ofa` writes them: `{"ks": [...], "e": [...], "d": [...]}` and the like.

======== ================================================================================================
key      values
======== ================================================================================================
``ks``   kernel size of every block of the deepest network (20; Proxyless 21); not in residual networks
``e``    expand ratio of every block (20; Proxyless 21; ResNet 18)
``d``    blocks of every stage (5; Proxyless 6, the last of them 1); ResNet: 0 or 2 for the stem, then the blocks added
         to each of 4 stages
``w``    ResNet: index of the width of the stem's inside, of the stem, and of each of 4 stages
``r``    resolution, a number or a list of one; where it is left out, the largest
======== ================================================================================================

Rows may be numpy arrays, and "wid" may be there with None. Entries of blocks that the subnet does not have may hold
anything; they are written with the axis' smallest value.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedofa.types.errors import SpaceError
from fedofa.types.space import INACTIVE, Axis, SearchSpace, SubnetConfig
from fedofa.types.spaces import PROXYLESS, PUBLISHED_SPACES, RESNET

_KEYS = {"ks": "kernel", "e": "expand", "d": "depth", "w": "width", "r": "resolution"}
_UNUSED = "wid"
"""A key of the package's own configurations, whose value is None in every published space."""
_TAIL_DEPTH = 1


def published_space(family: str) -> SearchSpace:
    """The published space of that family, or a `SpaceError` that lists the families."""
    if not isinstance(family, str) or family not in PUBLISHED_SPACES:
        raise SpaceError(
            f"no published space of family {family!r}: expected one of {', '.join(PUBLISHED_SPACES)}; a configuration "
            "of another space is made by that space's `subnet`"
        )
    return PUBLISHED_SPACES[family]


def from_ofa(architecture: Mapping[str, Any], family: str) -> SubnetConfig:
    """The configuration of a published space that the package's dictionary describes.

    Raises:
        SpaceError: naming the key that is missing, unknown, of another length or holds a value that is not allowed.
    """
    space = published_space(family)
    if not isinstance(architecture, Mapping):
        raise SpaceError(f"ofa configuration for {family!r}: expected an object, found {architecture!r:.80}")
    architecture = {key: value for key, value in architecture.items() if key != _UNUSED or value is not None}
    axes = {key: name for key, name in _KEYS.items() if any(axis.name == name for axis in space.axes)}
    unknown = sorted(map(str, set(architecture) - set(axes)))
    missing = sorted(set(axes) - set(architecture) - {"r"})
    if unknown or missing:
        raise SpaceError(
            f"ofa configuration for {family!r}: expected the keys {sorted(axes)} ('r' may be left out); "
            f"missing {missing}, unknown {unknown}"
        )
    values: dict[str, list[float]] = {
        name: _row(key, architecture[key]) for key, name in axes.items() if key in architecture
    }
    _split_depth(values, family)
    if "width" in values:
        values["width"] = [_width(space.axis("width"), index) for index in values["width"]]
    return space.subnet(**_with_absent_filled(space, values))


def to_ofa(subnet: SubnetConfig) -> dict[str, list[float]]:
    """The package's dictionary for a configuration of a published space; "r" is its resolution.

    Raises:
        SpaceError: when the configuration is not of the published space of its family.
    """
    space = published_space(subnet.family)
    space.check(subnet)
    rows = {axis.name: [axis.values[max(index, 0)] for index in subnet[axis.name]] for axis in space.axes}
    if subnet.family == PROXYLESS:
        rows["depth"].append(_TAIL_DEPTH)
    if subnet.family == RESNET:
        rows["depth"] = rows["stem_depth"] + rows["depth"]
        rows["width"] = list(subnet["width"])
    return {key: rows[name] for key, name in _KEYS.items() if name in rows}


def _row(key: str, given: Any) -> list[Any]:
    given = given.tolist() if isinstance(given, np.ndarray | np.generic) else given
    if isinstance(given, Sequence) and not isinstance(given, str):
        rows = [entry for entry in given if getattr(entry, "ndim", 0) or isinstance(entry, Sequence)]
        if rows:
            raise SpaceError(f"ofa configuration, {key!r}: expected a list of numbers, found {rows[0]!r:.80} in it")
        return list(given)
    if key == "r":
        return [given]
    raise SpaceError(f"ofa configuration, {key!r}: expected a list, found {given!r:.80}")


def _split_depth(values: dict[str, list[float]], family: str) -> None:
    """Take the entries of `d` that are not stages of elastic depth out of it."""
    depth = values["depth"]
    expected = len(published_space(family).axis("depth").controls) + (family in (PROXYLESS, RESNET))
    if len(depth) != expected:
        raise SpaceError(f"ofa configuration for {family!r}, 'd': expected {expected} entries, found {len(depth)}")
    if family == RESNET:
        values["stem_depth"], values["depth"] = depth[:1], depth[1:]
    elif family == PROXYLESS:
        values["depth"] = depth[:-1]
        if depth[-1] != _TAIL_DEPTH:
            raise SpaceError(
                f"ofa configuration for {family!r}, 'd': the last stage has one block, so its entry must be "
                f"{_TAIL_DEPTH}, found {depth[-1]!r}"
            )


def _width(axis: Axis, index: Any) -> float:
    try:
        position = -1 if isinstance(index, bool) else operator.index(index)
    except TypeError:
        position = -1
    if not 0 <= position < len(axis.values):
        raise SpaceError(
            f"ofa configuration, 'w': expected indices from 0 to {len(axis.values) - 1}, found {index!r:.80}"
        )
    return axis.values[position]


def _with_absent_filled(space: SearchSpace, values: dict[str, list[float]]) -> dict[str, list[float]]:
    """The values with an allowed one wherever the subnet has no such block."""
    plain = {name: row for name, row in values.items() if not any(space.axis(name).controls)}
    present = space.subnet(**plain)
    filled = {}
    for name, row in values.items():
        indices = present[name]
        if len(row) != len(indices):
            raise SpaceError(
                f"ofa configuration for {space.family!r}, {name}: expected {len(indices)} entries, found {len(row)}"
            )
        smallest = space.axis(name).values[0]
        filled[name] = [smallest if index == INACTIVE else value for index, value in zip(indices, row, strict=True)]
    return filled
