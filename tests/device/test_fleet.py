"""Simulated fleets: exact shares in a drawn order."""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedofa.device.fleet import assign_profiles
from fedofa.types.device import DeviceProfile
from fedofa.types.errors import ConfigError


def classes(*shares: float) -> dict[str, tuple[float, DeviceProfile]]:
    return {f"c{i}": (share, DeviceProfile(f"c{i}", 1 + i, 1, 1, 1)) for i, share in enumerate(shares)}


def counts_of(given_classes, num_clients: int, seed: int = 0) -> list[int]:
    profiles = assign_profiles(given_classes, num_clients, np.random.default_rng(seed))
    found = Counter(profile.device_class for profile in profiles)
    assert sum(found.values()) == num_clients
    return [found[name] for name in given_classes]


@given(st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any), st.integers(0, 500))
def test_every_class_gets_its_share_to_within_one_and_all_are_given_out(shares, num_clients):
    """Shares are tenths here, so that they do not add up to 1; exactness is held against rational numbers."""
    found = counts_of(classes(*(share / 10 for share in shares)), num_clients)
    for share, count in zip(shares, found, strict=True):
        exact = Fraction(share * num_clients, sum(shares))
        assert math.floor(exact) <= count <= math.ceil(exact)


@pytest.mark.parametrize(
    ("shares", "num_clients", "expected"),
    [
        ((0.3, 0.3, 0.25, 0.15), 100, [30, 30, 25, 15]),
        ((0.3, 0.3, 0.25, 0.15), 20, [6, 6, 5, 3]),
        ((0.5, 0.3, 0.2), 7, [4, 2, 1]),
        ((1, 1, 1), 4, [2, 1, 1]),
        ((0, 2), 3, [0, 3]),
        ((1,), 0, [0]),
    ],
)
def test_the_largest_remainders_get_what_is_left_over(shares, num_clients, expected):
    assert counts_of(classes(*shares), num_clients) == expected


def test_the_order_is_drawn_from_the_generator():
    kinds = classes(0.5, 0.5)
    first, second, other = (assign_profiles(kinds, 40, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first == second
    assert first != other
    assert first != sorted(first, key=lambda profile: profile.device_class)
    assert Counter(first) == Counter(other)


@pytest.mark.parametrize("kinds", [{}, classes(0, 0), classes(1, -0.5), classes(math.nan), classes(math.inf, 1)])
def test_shares_that_are_none_are_refused(kinds):
    with pytest.raises(ConfigError, match=r"fleet\.classes: expected at least one class with a positive share"):
        assign_profiles(kinds, 10, np.random.default_rng(0))
