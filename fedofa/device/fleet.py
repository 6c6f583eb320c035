"""A simulated fleet: which client is which kind of device."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedofa.types.device import DeviceProfile
from fedofa.types.errors import ConfigError


def assign_profiles(
    classes: Mapping[str, tuple[float, DeviceProfile]], num_clients: int, rng: np.random.Generator
) -> list[DeviceProfile]:
    """The profile of every client: exact shares (largest remainder), in an order drawn from `rng`.

    Args:
        classes: name -> (share of the fleet, profile); shares need not add up to 1.
        num_clients: size of the fleet.

    Raises:
        ConfigError: when there is no class, or shares are negative or all zero.
    """
    shares = np.array([share for share, _ in classes.values()], np.float64)
    if not len(shares) or not np.isfinite(shares).all() or (shares < 0).any() or shares.sum() == 0:
        raise ConfigError(
            f"fleet.classes: expected at least one class with a positive share, found "
            f"{ {name: share for name, (share, _) in classes.items()} }"
        )
    exact = shares / shares.sum() * num_clients
    counts = np.floor(exact).astype(int)
    for index in np.argsort(counts - exact, kind="stable")[: num_clients - counts.sum()]:
        counts[index] += 1
    profiles = [profile for count, (_, profile) in zip(counts, classes.values(), strict=True) for _ in range(count)]
    return [profiles[index] for index in rng.permutation(num_clients)]
