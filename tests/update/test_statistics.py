"""Statistics on the wire: exact, and refused when they are not what was asked for or what no images give."""

from dataclasses import replace

import numpy as np
import pytest
from cohorts import build_supernet

from fedofa.types.errors import DeltaError, WireError
from fedofa.types.statistics import ChannelSums, SubnetStatistics
from fedofa.update.codec import encode_packed
from fedofa.update.exchange import decode_statistics, encode_delta, encode_statistics
from fedofa.update.verification import StatisticsExpectation, verify_statistics

SUBNET = build_supernet().space.smallest()
NORMS = {"stem.norm": (3, 16), "mix.norm": (2, 4)}
EXPECTED = StatisticsExpectation("client-7", 5, 4, SUBNET, 10, NORMS)


def sums(**changes) -> dict[str, ChannelSums]:
    rng = np.random.default_rng(0)
    made = {}
    for name, (channels, positions) in NORMS.items():
        values = rng.standard_normal((10 * positions, channels))
        made[name] = ChannelSums(10 * positions, values.sum(0), np.square(values).sum(0))
    return {**made, **changes}


def statistics(**changes) -> SubnetStatistics:
    return replace(SubnetStatistics("client-7", 5, SUBNET, 4, 10, sums()), **changes)


def test_they_arrive_to_the_bit_and_are_accepted():
    found = decode_statistics(encode_statistics(statistics()))
    verify_statistics(found, EXPECTED)
    assert replace(found, sums={}) == replace(statistics(), sums={})
    for name, item in statistics().sums.items():
        assert found.sums[name].count == item.count
        assert np.array_equal(found.sums[name].total, item.total)
        assert np.array_equal(found.sums[name].squares, item.squares)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"client_id": "client-8"}, "client id: expected 'client-7', found 'client-8'"),
        ({"round": 6}, "round: expected 5, found 6"),
        ({"base_version": 3}, "base version: expected 4, found 3"),
        ({"subnet": build_supernet().space.largest()}, "subnet: expected"),
        ({"num_examples": 11}, "number of examples: expected 10, found 11"),
        ({"sums": {"stem.norm": sums()["stem.norm"]}}, "norms: expected"),
        ({"sums": {**sums(), "other": sums()["mix.norm"]}}, "norms: expected"),
    ],
)
def test_what_was_not_asked_for_is_refused(changes, message):
    with pytest.raises(
        DeltaError, match="statistics of client 'client-7' for round 5 refused: .*they do not count"
    ) as e:
        verify_statistics(statistics(**changes), EXPECTED)
    assert message in str(e.value)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (ChannelSums(0, np.zeros(2), np.zeros(2)), "expected 1 to 40 values a channel, found 0"),
        (ChannelSums(41, np.zeros(2), np.ones(2)), "expected 1 to 40 values a channel, found 41"),
        (
            ChannelSums(40, np.zeros(3), np.ones(2)),
            r"sums: expected float64 of shape (2,), found float64 of shape (3,)",
        ),
        (ChannelSums(40, np.zeros(2), np.ones((2, 1))), "sums of squares: expected float64 of shape (2,)"),
        (ChannelSums(40, np.zeros(2, np.float32), np.ones(2)), "sums: expected float64"),
        (ChannelSums(40, np.array([0.0, np.nan]), np.ones(2)), "sums: 1 of 2 are not finite"),
        (ChannelSums(40, np.zeros(2), np.array([np.inf, 1.0])), "sums of squares: 1 of 2 are not finite"),
        (ChannelSums(40, np.array([0.0, 40.0]), np.array([1.0, 39.9])), "a variance is negative"),
        (ChannelSums(40, np.zeros(2), np.array([-1.0, 1.0])), "a variance is negative"),
        (ChannelSums(40, np.array([1e300, 0.0]), np.ones(2)), "a variance is negative"),
        (ChannelSums(40, np.zeros(2), np.array([1e39, 1.0])), "out of the range of float32"),
    ],
)
def test_what_no_images_give_is_refused(bad, message):
    with pytest.raises(DeltaError) as why:
        verify_statistics(statistics(sums=sums(**{"mix.norm": bad})), EXPECTED)
    assert "norm 'mix.norm'" in str(why.value)
    assert message in str(why.value)


def test_constant_channels_are_accepted():
    """Their variance is zero, and the rounding of the two sums may make it look negative."""
    value, count = 0.1, 40
    total = np.full(2, sum([value] * count))
    constant = ChannelSums(count, total, np.full(2, sum([value * value] * count)) * (1 - 1e-12))
    verify_statistics(statistics(sums=sums(**{"mix.norm": constant})), EXPECTED)


def header(**changes) -> dict:
    made = {"client_id": "a", "round": 1, "subnet": SUBNET.to_json(), "base_version": 0, "num_examples": 3,
            "counts": {"n": 3}}  # fmt: skip
    return {**made, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"round": "1"}, "round: expected int"),
        ({"counts": {"n": 3.0}}, "whole number"),
        ({"counts": {"n": True}}, "whole number"),
        ({"counts": {"m": 3}}, "not of the same norms"),
        ({"counts": 3}, "not understood"),
        ({"subnet": 3}, "not understood"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_foreign_headers_are_refused(changes, message):
    streams = {"totals": {"n": np.zeros(1)}, "squares": {"n": np.zeros(1)}}
    assert decode_statistics(encode_packed("statistics", header(), streams)).sums["n"].count == 3
    with pytest.raises(WireError, match=message):
        decode_statistics(encode_packed("statistics", header(**changes), streams))


def test_a_delta_is_no_statistics():
    from fedofa.types.delta import SubnetDelta

    with pytest.raises(WireError, match="expected kind 'statistics', found 'delta'"):
        decode_statistics(encode_delta(SubnetDelta("c", 1, SUBNET, "plan", 0, 1, 1, {})))
