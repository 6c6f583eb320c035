"""Channel importance: which inner channels of a block a narrower subnet keeps first."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedofa.supernet.network import GROUP_NORM_CHANNELS, NetworkSpec


def channel_ordering(spec: NetworkSpec, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """An ordering of every elastic channel group by L1 importance, most important first.

    A block's inner channels rank by the weights that read them in `project`, the squeeze-excite's by those in its
    `expand` (Once-for-All, section 3.2). With group norm, channels move in whole groups, so that groups stay the same.

    Args:
        spec: the largest network.
        tensors: the shared weights by name.
    """
    whole = GROUP_NORM_CHANNELS if spec.norm == "group" else 1
    ordering: dict[str, np.ndarray] = {}
    for block in spec.blocks:
        if block.mid_group is not None:
            ordering[block.mid_group] = _descending(tensors[f"{block.name}.project.conv.weight"], whole)
        if block.squeeze_excite is not None:
            ordering[f"{block.name}.squeeze"] = _descending(
                tensors[f"{block.name}.squeeze_excite.expand.conv.weight"], 1
            )
    return ordering


def _descending(weight: np.ndarray, whole: int) -> np.ndarray:
    """Input channels of `(out, in, 1, 1)` by falling L1 norm, moved in runs of `whole` channels."""
    norms = np.abs(weight).sum(axis=(0, 2, 3), dtype=np.float64).reshape(-1, whole).sum(axis=1)
    runs = np.argsort(-norms, kind="stable")
    return (runs[:, None] * whole + np.arange(whole)).ravel().astype(np.int64)
