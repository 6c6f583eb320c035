"""Channel importance: which inner channels of a block a narrower subnet keeps first."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedofa.supernet.network import GROUP_NORM_CHANNELS, NetworkSpec


def channel_ordering(spec: NetworkSpec, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """An ordering of every elastic channel group by L1 importance, most important first.

    Inner channels rank by the weights that read them: those of an inverted bottleneck in `project`, those of its
    squeeze-excite in `expand` (Once-for-All, section 3.2), those of a residual bottleneck in the next convolution.
    Channels of the residual stream, which many layers read, stay in order. With group norm, channels that are normed
    move in whole groups, so that groups stay the same.

    Args:
        spec: the largest network.
        tensors: the shared weights by name.
    """
    whole = spec.normed_groups if spec.norm == "group" else frozenset()
    return {
        group: _descending(tensors[reader], GROUP_NORM_CHANNELS if group in whole else 1)
        for block in spec.blocks
        for group, reader in block.readers
    }


def _descending(weight: np.ndarray, whole: int) -> np.ndarray:
    """Input channels of `(out, in, k, k)` by falling L1 norm, moved in runs of `whole` channels."""
    norms = np.abs(weight).sum(axis=(0, 2, 3), dtype=np.float64).reshape(-1, whole).sum(axis=1)
    runs = np.argsort(-norms, kind="stable")
    return (runs[:, None] * whole + np.arange(whole)).ravel().astype(np.int64)
