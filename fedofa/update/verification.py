"""Verification: a delta or statistics count only when they are exactly what this client was asked for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from fedofa.supernet.slices import SliceMap
from fedofa.supernet.sums import MAX_TERM
from fedofa.types.delta import LowRank, SubnetDelta
from fedofa.types.errors import DeltaError
from fedofa.types.plan import FineTunePlan
from fedofa.types.space import SubnetConfig
from fedofa.types.statistics import ChannelSums, SubnetStatistics

_ROUNDING = 1e-6
"""Relative error of clients' sums (`calibration.channel_sums`: some 1e-7): sums of squares may be so much too small."""


@dataclass(frozen=True, slots=True)
class Expectation:
    """What the server asked one client for.

    Args:
        num_examples: as the client stated when it introduced itself; its weight in the fold may not change later.
        slice_map: of the subnet, for the shapes.
    """

    client_id: str
    round: int
    version: int
    subnet: SubnetConfig
    plan: FineTunePlan
    num_examples: int
    slice_map: SliceMap


def verify_delta(delta: SubnetDelta, expected: Expectation) -> None:
    """Refuse a delta that differs from what was asked for, or that holds values no training gives.

    Raises:
        DeltaError: naming the client, the field or parameter, what was expected and what was found.
    """
    for name, wanted, found in (
        ("client id", expected.client_id, delta.client_id),
        ("round", expected.round, delta.round),
        ("base version", expected.version, delta.base_version),
        ("subnet", expected.subnet.digest(), delta.subnet.digest()),
        ("plan", expected.plan.digest(), delta.plan_digest),
        ("parametrised", expected.plan.parametrised, delta.parametrised),
        ("number of examples", expected.num_examples, delta.num_examples),
    ):
        if wanted != found:
            raise _refusal(expected, f"{name}: expected {wanted!r}, found {found!r}")
    if delta.num_examples < 1:
        raise _refusal(expected, f"number of examples: expected at least 1, found {delta.num_examples}")
    if delta.num_steps < 1:
        raise _refusal(expected, f"number of steps: expected at least 1, found {delta.num_steps}")
    plan = expected.plan
    _verify_names("parameters", plan.trainable, delta.weights, expected)
    _verify_names("weights of low rank", plan.low_rank, delta.low_rank, expected)
    for name in plan.trainable:
        shape = plan.part_shape(name, expected.slice_map[name].shape)
        _verify_range(name, _verify_form(name, delta.weights[name], shape, expected), expected)
    for name in plan.low_rank:
        _verify_factors(name, delta.low_rank[name], expected)


def _verify_names(what: str, names: Collection[str], given: Collection[str], expected: Expectation) -> None:
    wanted, found = set(names), set(given)
    if wanted != found:
        missing, unknown = sorted(wanted - found), sorted(found - wanted)
        raise _refusal(
            expected,
            f"{what}: expected the plan's {len(wanted)}; missing {len(missing)} {missing[:3]}, "
            f"unknown {len(unknown)} {unknown[:3]}",
        )


def _verify_factors(name: str, pair: LowRank, expected: Expectation) -> None:
    """Both factors must be of the plan's rank, and their product within the fold's range."""
    shape = expected.slice_map[name].shape
    left, right = expected.plan.factor_shapes(shape)
    _verify_form(f"{name}, left factor", pair.left, left, expected)
    _verify_form(f"{name}, right factor", pair.right, right, expected)
    _verify_range(name, float(np.abs(pair.product(shape)).max(initial=0.0)), expected)


def _verify_form(name: str, values: np.ndarray, shape: tuple[int, ...], expected: Expectation) -> float:
    """The largest magnitude among the values, where they are finite and of that shape."""
    if values.shape != shape:
        raise _refusal(expected, f"parameter {name!r}: expected shape {shape}, found {values.shape}")
    if values.dtype != np.float32:
        raise _refusal(expected, f"parameter {name!r}: expected float32, found {values.dtype}")
    # Two reductions, no temporary: a NaN or an infinity shows in the extremes.
    low, high = float(values.min(initial=0.0)), float(values.max(initial=0.0))
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = int(values.size - np.isfinite(values).sum())
        raise _refusal(expected, f"parameter {name!r}: {bad} of {values.size} values are not finite")
    return max(-low, high)


def _verify_range(name: str, largest: float, expected: Expectation) -> None:
    if largest * expected.num_examples >= MAX_TERM:
        raise _refusal(
            expected,
            f"parameter {name!r}: a change of {largest:.3g} by {expected.num_examples} examples is out of the "
            f"fold's range ({MAX_TERM:.3g})",
        )


@dataclass(frozen=True, slots=True)
class StatisticsExpectation:
    """Which statistics the server asked one client for.

    Args:
        num_examples: as the client stated when it introduced itself.
        norms: name of each batch norm -> its channels, and the positions an example has there.
    """

    client_id: str
    round: int
    version: int
    subnet: SubnetConfig
    num_examples: int
    norms: Mapping[str, tuple[int, int]]


def verify_statistics(statistics: SubnetStatistics, expected: StatisticsExpectation) -> None:
    """Refuse statistics that differ from what was asked for, or that no images give.

    Raises:
        DeltaError: naming the client, the field or norm, what was expected and what was found.
    """
    for name, wanted, found in (
        ("client id", expected.client_id, statistics.client_id),
        ("round", expected.round, statistics.round),
        ("base version", expected.version, statistics.base_version),
        ("subnet", expected.subnet.digest(), statistics.subnet.digest()),
        ("number of examples", expected.num_examples, statistics.num_examples),
        ("norms", sorted(expected.norms), sorted(statistics.sums)),
    ):
        if wanted != found:
            raise _unfit(expected, f"{name}: expected {wanted!r:.200}, found {found!r:.200}")
    for name, (channels, positions) in expected.norms.items():
        problem = _problem(statistics.sums[name], channels, expected.num_examples * positions)
        if problem:
            raise _unfit(expected, f"norm {name!r}: {problem}")


def _problem(sums: ChannelSums, channels: int, most: int) -> str:
    """What is wrong with a norm's sums, "" where nothing is."""
    if not 1 <= sums.count <= most:
        return f"expected 1 to {most:,} values a channel, found {sums.count:,}"
    for what, values in (("sums", sums.total), ("sums of squares", sums.squares)):
        if values.shape != (channels,) or values.dtype != np.float64:
            return f"{what}: expected float64 of shape {(channels,)}, found {values.dtype} of shape {values.shape}"
        if not np.isfinite(values).all():
            return f"{what}: {int((~np.isfinite(values)).sum())} of {channels} are not finite"
    with np.errstate(over="ignore"):
        least = np.square(sums.total) / sums.count  # of the sum of squares, by the Cauchy-Schwarz inequality
    if not (sums.squares >= least * (1 - _ROUNDING)).all():
        return "a variance is negative"
    if not (sums.squares <= np.finfo(np.float32).max).all():
        return "a sum of squares is out of the range of float32"
    return ""


def _unfit(expected: StatisticsExpectation, what: str) -> DeltaError:
    return DeltaError(
        f"statistics of client {expected.client_id!r} for round {expected.round} refused: {what}; they do not count"
    )


def _refusal(expected: Expectation, what: str) -> DeltaError:
    return DeltaError(
        f"delta of client {expected.client_id!r} for round {expected.round} refused: {what}; it is not folded"
    )
