"""Robust timing: bursts in interleaved passes, the median of the passes, and the spread that says whether to trust it.

Noise on a computer only adds time. So a reading is the shortest run of a short burst; passes over all that is timed
spread the readings of each over time; their median is the result. A computer's speed also drifts over seconds, which
shows in all that is read at about the same time and is taken out. What stays unsteady is read again, then refused.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedofa.device.engines import Run
from fedofa.types.errors import ConfigError, ProfileError

CLOCKS: dict[str, Callable[[], int]] = {"wall": time.perf_counter_ns, "cpu": time.process_time_ns}
_NANOSECONDS_PER_MS = 1e6
_REPORTED = 64
"""Readings after which `measure` reports what is known."""
_WINDOW, _ROUNDS = 9, 20
"""Readings of one pass, one after the other, that tell the speed of the moment; times that it is estimated anew."""
_LEAST_MS = 1e-9

Readings = dict[str, tuple[float, ...]]
"""Name -> milliseconds as they were read, one a pass."""


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


def measure(
    runs: Mapping[str, Run], timing: Timing, known: Mapping[str, Sequence[float]] | None = None
) -> Iterator[Readings]:
    """Time several things side by side; yields all readings now and then, the last time the result.

    What is unsteady after all passes is among it (see `refuse_unsteady`).

    Args:
        runs: what is timed.
        timing: how.
        known: readings of an interrupted call, which are gone on with.
    """
    readings: Readings = {name: tuple((known or {}).get(name, ())) for name in runs}
    for number in range(timing.passes + timing.more_passes):
        if number < timing.passes:
            due = [name for name, row in readings.items() if len(row) <= number]
        else:
            due = [name for name, item in without_drift(readings).items() if item.spread > timing.max_spread]
            if not due:
                break
        for count, name in enumerate(_in_pass(due, number), start=1):
            readings[name] = (*readings[name], read(runs[name], timing))
            if count % _REPORTED == 0 or count == len(due):
                yield dict(readings)


def without_drift(readings: Mapping[str, Sequence[float]]) -> dict[str, Measured]:
    """What was measured, with the drift of the computer's speed taken out of the readings.

    The logarithm of a reading is that of its name's time plus that of the moment's slowness. The second is the running
    median, within a pass, of how much readings differ from their names' medians; short passes show none. Every pass has
    an order of its own, so that a name has other neighbours in each.
    """
    names = [name for name, row in readings.items() if row]
    if not names:
        return {}
    logs = np.full((len(names), max(len(readings[name]) for name in names)), np.nan)
    for row, name in zip(logs, names, strict=True):
        row[: len(readings[name])] = np.log(np.maximum(readings[name], _LEAST_MS))
    numbers = {name: number for number, name in enumerate(names)}
    orders = [
        [numbers[name] for name in _in_pass([name for name in names if len(readings[name]) > number], number)]
        for number in range(logs.shape[1])
    ]
    drift = np.where(np.isnan(logs), np.nan, 0.0)
    for _ in range(_ROUNDS):
        differences = logs - np.nanmedian(logs - drift, axis=1, keepdims=True)
        for number, order in enumerate(orders):
            drift[order, number] = _running_median(differences[order, number])
        drift -= np.nanmedian(drift)
    steady = np.exp(logs - drift)
    return {name: Measured(tuple(row[: len(readings[name])].tolist())) for name, row in zip(names, steady, strict=True)}


def _in_pass(names: Sequence[str], number: int) -> list[str]:
    """The names in the order of a pass, which is the same in every process."""
    return sorted(names, key=lambda name: zlib.crc32(f"{number} {name}".encode()))


def _running_median(values: np.ndarray) -> np.ndarray:
    """The median of the `_WINDOW` values around each; zeros where there are fewer than that."""
    if len(values) < _WINDOW:
        return np.zeros(len(values))
    padded = np.pad(values, _WINDOW // 2, mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, _WINDOW), axis=1)


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
