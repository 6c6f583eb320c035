"""Robust timing: bursts in interleaved passes, the median of the passes, and the spread that says whether to trust it.

Noise on a computer only adds time. So a reading is the shortest run of a short burst; passes over all that is timed
spread the readings of each over time; their median is the result. What stays unsteady is read again, then refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from fedofa.device.engines import Run
from fedofa.types.errors import ConfigError, ProfileError

CLOCKS: dict[str, Callable[[], int]] = {"wall": time.perf_counter_ns, "cpu": time.process_time_ns}
_NANOSECONDS_PER_MS = 1e6


@dataclass(frozen=True, slots=True)
class Timing:
    """How times are taken.

    Args:
        clock: "wall", or "cpu": seconds of processor, which other programs on the machine disturb less; it is the
            latency only with one thread.
        passes: over all that is timed.
        burst: runs a reading, after one to warm up.
        more_passes: at the most, over what is unsteady after `passes`.
        max_spread: interquartile range of the readings over their median that is accepted.
    """

    clock: str = "wall"
    passes: int = 5
    burst: int = 4
    more_passes: int = 15
    max_spread: float = 0.15

    def __post_init__(self) -> None:
        if self.clock not in CLOCKS:
            raise ConfigError(f"clock: expected one of {list(CLOCKS)}, found {self.clock!r}")
        for name, least in (("passes", 3), ("burst", 1), ("more_passes", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: expected at least {least}, found {getattr(self, name)}")
        if not self.max_spread > 0:
            raise ConfigError(f"max_spread: expected a positive fraction, found {self.max_spread}")


@dataclass(frozen=True, slots=True)
class Measured:
    """Readings of one thing, in milliseconds."""

    readings: tuple[float, ...]

    @property
    def median(self) -> float:
        """The result."""
        return float(np.median(self.readings))

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        low, high = np.quantile(self.readings, (0.25, 0.75))
        return float((high - low) / self.median) if self.median > 0 else float("inf")


def read(run: Run, timing: Timing) -> float:
    """One reading: milliseconds of the shortest run of a burst."""
    clock, shortest = CLOCKS[timing.clock], float("inf")
    run()
    for _ in range(timing.burst):
        start = clock()
        run()
        shortest = min(shortest, clock() - start)
    return shortest / _NANOSECONDS_PER_MS


def measure(runs: Mapping[str, Run], timing: Timing) -> Iterator[dict[str, Measured]]:
    """Time several things side by side; yields what is known after every pass, the last time the result.

    What is unsteady after all passes is among it (see `refuse_unsteady`).
    """
    readings: dict[str, list[float]] = {name: [] for name in runs}
    unsteady = set(runs)
    for number in range(timing.passes + timing.more_passes):
        if number >= timing.passes:
            unsteady = {name for name, row in readings.items() if Measured(tuple(row)).spread > timing.max_spread}
            if not unsteady:
                break
        for name in runs:
            if name in unsteady:
                readings[name].append(read(runs[name], timing))
        yield {name: Measured(tuple(row)) for name, row in readings.items()}


def refuse_unsteady(measured: Mapping[str, Measured], max_spread: float) -> None:
    """Refuse results whose readings differ too much, with a `ProfileError` that names the worst."""
    unsteady = {name: item for name, item in measured.items() if item.spread > max_spread}
    if unsteady:
        name, worst = max(unsteady.items(), key=lambda item: item[1].spread)
        raise ProfileError(
            f"the device is too noisy: {len(unsteady)} of {len(measured)} readings are unsteady, the worst {name!r}: "
            f"{len(worst.readings)} readings from {min(worst.readings):.3f} to {max(worst.readings):.3f} ms, a spread "
            f"of {worst.spread:.0%}, expected at most {max_spread:.0%}. Stop other programs and go on with resume=true "
            "(what was steady is kept), or accept more with max_spread"
        )
