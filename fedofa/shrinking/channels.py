"""Channels by importance where a phase begins (Once-for-All's channel sorting, arXiv 1908.09791, section 3.3)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from fedofa.shrinking.schedule import CHANNEL_AXES, ShrinkPhase, ShrinkSchedule
from fedofa.supernet.base import Supernet
from fedofa.supernet.elastic import ElasticSupernet
from fedofa.supernet.importance import channel_ordering
from fedofa.types.errors import ConfigError
from fedofa.types.state import SharedState


def with_channels(supernet: Supernet, setting: str) -> ElasticSupernet:
    """The supernet, as one that has channels to order.

    Args:
        setting: that asks for an order, for the message.

    Raises:
        ConfigError: when it has none.
    """
    if not isinstance(supernet, ElasticSupernet):
        raise ConfigError(f"{setting}: a supernet of {supernet.space.family!r} has no channels to order; leave it out")
    return supernet


def check_channels(supernet: Supernet, schedule: ShrinkSchedule) -> None:
    """Refuse a schedule with a phase that orders channels of a supernet that has none; see `with_channels`."""
    for phase in schedule.phases:
        if phase.order_channels:
            with_channels(supernet, f"shrinking phase {phase.name!r}, order_channels")


def sorted_channels(
    supernet: ElasticSupernet, earlier: Sequence[ShrinkPhase], state: SharedState
) -> dict[str, np.ndarray]:
    """The ordering of a state's channels by L1 importance with which a phase begins.

    Args:
        supernet: of the state.
        earlier: the phases before it, whose subnets stay the networks they are.
        state: the weights, and the ordering that they were trained with.
    """
    largest = supernet.network_spec(supernet.space.largest())
    return channel_ordering(largest, state.tensors, state.ordering, kept_widths(supernet, earlier))


def kept_widths(supernet: Supernet, earlier: Sequence[ShrinkPhase]) -> dict[str, set[int]]:
    """Channel group -> the numbers of channels that subnets of earlier phases have: what a new order keeps apart."""
    kept: dict[str, set[int]] = {}
    for phase in earlier:
        names = [name for name in CHANNEL_AXES if name in phase.elastic]
        for values in itertools.product(*(phase.elastic[name] for name in names)):
            subnet = supernet.space.subnet(**dict(zip(names, values, strict=True)))
            for item in supernet.parameter_table(subnet):
                for group, size in zip(item.groups, item.shape, strict=True):
                    if group is not None:
                        kept.setdefault(group, set()).add(size)
    return kept
