"""Channel importance: which inner channels of a block a narrower subnet keeps first."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedofa.supernet.elastic import ElasticSupernet
from fedofa.supernet.network import GROUP_NORM_CHANNELS, NetworkSpec

Ordering = Mapping[str, np.ndarray]
"""Channel group -> permutation, most important channel first; a group left out is in order."""

Kept = Mapping[str, Collection[int]]
"""Channel group -> how many leading channels narrower subnets have that must stay the networks they are."""


def channel_ordering(
    spec: NetworkSpec, tensors: Mapping[str, np.ndarray], current: Ordering | None = None, kept: Kept | None = None
) -> dict[str, np.ndarray]:
    """An ordering of every elastic channel group by L1 importance, most important first.

    Inner channels rank by the weights that read them: those of an inverted bottleneck in `project`, those of its
    squeeze-excite in `expand` (Once-for-All, section 3.2), those of a residual bottleneck in the next convolution.
    Channels of the residual stream, which many layers read, stay as they are. With group norm, channels that are normed
    move in whole groups, so that groups stay the same.

    Args:
        spec: the largest network.
        tensors: the shared weights by name.
        current, kept: the ordering that there is, and what it must go on telling apart: a channel stays among the first
            so many, or behind them.
    """
    norms = {
        group: np.abs(tensors[reader]).sum(axis=(0, 2, 3), dtype=np.float64) for group, reader in _readers(spec).items()
    }
    return _by_importance(spec, norms, current or {}, kept or {})


def measured_ordering(
    supernet: ElasticSupernet, batches: Iterable[tuple[Tensor, Tensor]], kept: Kept | None = None
) -> dict[str, np.ndarray]:
    """An ordering of every elastic channel group by what the largest subnet's loss would lose with a channel.

    The loss's first-order change when a channel is taken away is the sum over the weights that read it of weight times
    gradient; its square, summed over the batches, is the channel's importance (arXiv 1906.10771, section 3.1, with the
    reading weights as the group). Norms use the batch's statistics, dropout drops. The weights stay as they are; a
    classifier of zeros tells channels apart as little as it tells classes.

    Args:
        supernet: whose largest subnet is looked at; its parameters keep their gradients and what asks for any.
        batches: inputs as the largest subnet takes them, and labels `(batch,)`.
        kept: what the supernet's ordering must go on telling apart, as of `channel_ordering`.
    """
    spec = supernet.network_spec(supernet.space.largest())
    readers, shared = _readers(spec), supernet.shared()
    weights = {group: shared[reader] for group, reader in readers.items()}
    asked, was_training = [weight.requires_grad for weight in weights.values()], supernet.training
    importance = {group: np.zeros(weight.shape[1]) for group, weight in weights.items()}
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        supernet.train()
        for inputs, labels in batches:
            loss = functional.cross_entropy(supernet(inputs, supernet.space.largest()), labels)
            gradients = torch.autograd.grad(loss, list(weights.values()))
            for (group, weight), gradient in zip(weights.items(), gradients, strict=True):
                change = (weight.detach() * gradient).sum(dim=(0, 2, 3))
                importance[group] += change.double().square().cpu().numpy()
    finally:
        supernet.train(was_training)
        for weight, needed in zip(weights.values(), asked, strict=True):
            weight.requires_grad_(needed)
    return _by_importance(spec, importance, supernet.ordering, kept or {})


def _readers(spec: NetworkSpec) -> dict[str, str]:
    """Each inner channel group, and the name of the weight `(out, channels, k, k)` that reads it."""
    return dict(pair for block in spec.blocks for pair in block.readers)


def _by_importance(
    spec: NetworkSpec, importance: Mapping[str, np.ndarray], current: Ordering, kept: Kept
) -> dict[str, np.ndarray]:
    """Channels of each group by falling importance; those that a group norm runs over move in runs of its size."""
    whole = spec.normed_groups if spec.norm == "group" else frozenset()
    ordering = dict(current)
    for group, values in importance.items():
        channels = current.get(group, np.arange(len(values)))
        cuts = sorted({0, len(values), *kept.get(group, ())})
        run = GROUP_NORM_CHANNELS if group in whole else 1
        parts = [_descending(channels[start:end], values, run) for start, end in itertools.pairwise(cuts)]
        ordering[group] = np.concatenate(parts)
    return ordering


def _descending(channels: np.ndarray, values: np.ndarray, run: int) -> np.ndarray:
    """The channels, in runs of so many, by falling sum of their values."""
    runs = channels.reshape(-1, run)
    return runs[np.argsort(-values[runs].sum(axis=1), kind="stable")].ravel().astype(np.int64)
