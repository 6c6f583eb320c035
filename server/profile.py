"""`fedofa profile`: measures this device for a supernet's operators, resumable, and leaves one file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from conf.schema import ProfileConf
from fedofa.device.correction import Fit, corrected_times
from fedofa.device.engines import Engine, build_engine
from fedofa.device.latency import Latency
from fedofa.device.memory import InferenceMemory
from fedofa.device.models import MEGABYTE
from fedofa.device.operators import Operator, OperatorIndex, SubnetBatch
from fedofa.device.profile import MeasuredDevice, describe_machine, free_memory_bytes
from fedofa.device.rates import memory_bytes_per_second, training_macs_per_second
from fedofa.device.tables import LatencyTable
from fedofa.device.timing import Measured, Readings, Timing, measure, refuse_unsteady, without_drift
from fedofa.supernet.families import build_supernet
from fedofa.types.device import NAME, DeviceProfile, class_name
from fedofa.types.errors import ConfigError, ProfileError
from server.checkpoint import replace_file
from server.forward_memory import forward_bytes
from server.progress import CountProgress
from server.structure import describe_structure

_PARAMETER_BYTES, _MEMORY_SHARE = 12, 4
"""Memory that an engine takes a parameter of what it has prepared, and the share of the free memory (1 / 4) for it."""
_ACCEPTED_MAPE = 0.05
"""A table that is further off on whole subnets is corrected."""
_MEMORY_SUBNETS = 3
"""Random subnets, beside the smallest and the largest, whose forward pass is measured in a process of its own."""
_MEMORY_MOST = 1.1
"""Predicted over measured memory is meant to be at least 1, and at most this."""
_CALIBRATION, _VALIDATION = 21, 22
"""Tell the random numbers of the subnets that correct the table from those that it is held against."""


@dataclass(frozen=True, slots=True)
class Profiling:
    """The parts of one run."""

    conf: ProfileConf
    index: OperatorIndex
    engine: Engine
    timing: Timing
    journal: Journal


class Journal:
    """What an unfinished profile has measured, beside its output; read again by a run with the same settings.

    Args:
        output: the profile's file.
        identity: what makes two profiles the same.
        resume: take over what is there, else begin anew.

    Raises:
        ProfileError: when what is there is damaged or of other settings.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any], *, resume: bool) -> None:
        self.path = output.with_name(f"{output.name}.part")
        self.identity = dict(identity)
        self.readings: dict[str, list[float]] = {}
        if resume and self.path.exists():
            self.readings = self._read()

    def _read(self) -> dict[str, list[float]]:
        try:
            content = json.loads(self.path.read_bytes())
            found, readings = (
                content["identity"],
                {str(k): [float(x) for x in v] for k, v in content["readings"].items()},
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ProfileError(f"{self.path} is damaged: {error!r}; begin anew with resume=false") from error
        differing = [
            f"{key}: {found.get(key)!r:.60} then, {value!r:.60} now"
            for key, value in self.identity.items()
            if found.get(key) != value
        ]
        if differing:
            raise ProfileError(
                f"{self.path} was measured with other settings: {'; '.join(differing[:3])}; use those, or begin anew "
                "with resume=false"
            )
        return readings

    def keep(self, readings: Readings) -> None:
        """Put these names' readings in place of what is known of them, and write the file."""
        self.readings |= {name: list(row) for name, row in readings.items() if row}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"identity": self.identity, "readings": self.readings}
        replace_file(self.path, json.dumps(content).encode())


def run_profile(conf: ProfileConf) -> MeasuredDevice:
    """Measure the device and write `conf.output`.

    Raises:
        FedofaError: saying in one line what is wrong; what was measured steadily is kept for resume=true.
    """
    run = _build_run(conf)
    table, fit = _measure_table(run)
    smallest = run.index.network(run.index.encoding.space.smallest())
    profile = DeviceProfile(
        device_class=conf.device_class or class_name(str(describe_machine()["processor"])),
        memory_bytes=conf.memory_bytes if conf.memory_bytes is not None else free_memory_bytes(),
        macs_per_second=training_macs_per_second(smallest, conf.threads, conf.clock),
        uplink_bytes_per_second=conf.uplink_bytes_per_second,
        downlink_bytes_per_second=conf.downlink_bytes_per_second,
    )
    device = MeasuredDevice(profile, memory_bytes_per_second(conf.clock), describe_machine(), conf.clock, table, fit)
    output = Path(conf.output)
    replace_file(output, json.dumps(device.to_json(), indent=1).encode())
    run.journal.path.unlink(missing_ok=True)
    return device


def _build_run(conf: ProfileConf) -> Profiling:
    _check(conf)
    engine = build_engine(conf.engine, conf.threads)
    timing = Timing(**{item.name: getattr(conf, item.name) for item in fields(Timing)})
    supernet = build_supernet(_structure(conf))
    identity = {
        "supernet": json.loads(json.dumps(supernet.description())),
        "engine": engine.name,
        "threads": conf.threads,
        "clock": conf.clock,
        "burst": conf.burst,
        "machine": describe_machine(),
    }
    journal = Journal(Path(conf.output), identity, resume=conf.resume)
    return Profiling(conf, OperatorIndex.of(supernet), engine, timing, journal)


def _structure(conf: ProfileConf) -> dict[str, Any]:
    """The supernet's description."""
    return describe_structure(conf.supernet, conf.in_channels, conf.num_classes)


def _check(conf: ProfileConf) -> None:
    """Settings that only their meaning can refuse."""
    least = {"calibration_subnets": 8, "validation_subnets": 2, "in_channels": 1, "num_classes": 1}
    for name, minimum in least.items():
        if getattr(conf, name) < minimum:
            raise ConfigError(f"{name}: expected at least {minimum}, found {getattr(conf, name)!r}")
    if conf.device_class and not NAME.fullmatch(conf.device_class):
        raise ConfigError(f"device_class: expected a name like {NAME.pattern}, found {conf.device_class!r}")
    if conf.clock == "cpu" and conf.threads != 1:
        raise ConfigError(f"clock=cpu: processor time is the latency of one thread only, found threads={conf.threads}")


def _measure_table(run: Profiling) -> tuple[LatencyTable, dict[str, float] | None]:
    """The latency table, corrected where whole subnets show that it must be, and how well it does on others."""
    conf, index = run.conf, run.index
    operators = {operator.key: [operator] for operator in index.operators}
    calibration = _draw(run, _CALIBRATION, conf.calibration_subnets)
    validation = _draw(run, _VALIDATION, conf.validation_subnets if conf.validate else 0)
    chains = {**operators, **_chains(calibration), **_chains(validation)}
    measured = _measure_all(run, chains)
    alone = np.array([measured[operator.key].median for operator in index.operators])
    times, overhead = _times(index, alone, calibration, _medians(measured, calibration))
    named = {operator.key: float(ms) for operator, ms in zip(index.operators, times, strict=True)}
    source = f"measured: median of {conf.passes} passes, {conf.clock} clock"
    family = index.encoding.space.family
    table = LatencyTable(family, run.engine.name, conf.threads, source, named, float(overhead))
    if not conf.validate:
        return table, None
    found = _medians(measured, validation)
    before, after = (Fit.of(p, found) for p in (validation.total(alone), Latency(index, table).predict(validation)))
    return table, {
        "subnets": len(validation),
        "mape": after.mape,
        "rank_correlation": after.rank_correlation,
        "mape_of_the_plain_sum": before.mape,
        "rank_correlation_of_the_plain_sum": before.rank_correlation,
        **_memory_fit(run, validation),
    }


def _memory_fit(run: Profiling, validation: SubnetBatch) -> dict[str, float]:
    """Predicted over measured memory of forward passes in processes of their own, the least and the greatest."""
    if run.conf.engine != "torch":
        return {}
    space, encoding = run.index.encoding.space, run.index.encoding
    drawn = [encoding.subnet(row) for row in validation.rows[:_MEMORY_SUBNETS]]
    subnets = [space.smallest(), space.largest(), *drawn]
    measured = np.array([forward_bytes(_structure(run.conf), subnet) for subnet in subnets]) / MEGABYTE
    ratios = InferenceMemory(run.index).predict(run.index.batch(subnets)) / measured
    return {
        "memory_subnets": len(subnets),
        "memory_least_ratio": float(ratios.min()),
        "memory_greatest_ratio": float(ratios.max()),
    }


def _times(
    index: OperatorIndex, alone: np.ndarray, calibration: SubnetBatch, measured: np.ndarray
) -> tuple[np.ndarray, float]:
    if Fit.of(calibration.total(alone), measured).mape <= _ACCEPTED_MAPE:
        return alone, 0.0
    return corrected_times(index, alone, calibration, measured)


def _draw(run: Profiling, purpose: int, count: int) -> SubnetBatch:
    rows = run.index.encoding.sample(np.random.default_rng([run.conf.seed, purpose]), count)
    return SubnetBatch(run.index, rows)


def _names(batch: SubnetBatch) -> list[str]:
    return [f"subnet {batch.index.encoding.subnet(row).digest()}" for row in batch.rows]


def _chains(batch: SubnetBatch) -> dict[str, list[Operator]]:
    """Each subnet's operators, in forward order."""
    operators = batch.index.operators
    chains = ([operators[number] for number in numbers if number >= 0] for numbers in batch.operators)
    return dict(zip(_names(batch), chains, strict=True))


def _medians(measured: Mapping[str, Measured], batch: SubnetBatch) -> np.ndarray:
    return np.array([measured[name].median for name in _names(batch)])


def _measure_all(run: Profiling, chains: Mapping[str, Sequence[Operator]]) -> dict[str, Measured]:
    """What every chain takes, going on with what the journal has; unsteady ones are refused in the end."""
    measured: dict[str, Measured] = {}
    with CountProgress("profiling", len(chains) * run.timing.passes, _num_readings(run)) as progress:
        for names in _chunks(list(chains), _parameters(run.index, chains), _most_parameters(run.conf)):
            measured |= _measure_chunk(run, {name: chains[name] for name in names}, progress)
    refuse_unsteady(measured, run.timing.max_spread)
    return measured


def _measure_chunk(
    run: Profiling, chains: Mapping[str, Sequence[Operator]], progress: CountProgress
) -> dict[str, Measured]:
    """What chains take that are timed side by side; what the journal has of them is taken anew where it is unsteady."""
    passes = run.timing.passes
    readings: Readings = {name: tuple(run.journal.readings.get(name, ())) for name in chains}
    kept = without_drift({name: row for name, row in readings.items() if len(row) >= passes})
    steady = {name: item for name, item in kept.items() if item.spread <= run.timing.max_spread}
    if len(steady) == len(chains):
        return steady
    if len(steady) == len(kept):  # they were interrupted, not refused, and share their passes with the others
        steady, left = {}, readings
    else:
        left = {name: readings[name] if name not in kept else () for name in chains if name not in steady}
    progress.status(f"preparing {len(left)} operators and subnets")
    runs = {name: run.engine.prepare(chains[name]) for name in left}
    latest = left
    for latest in measure(runs, run.timing, left):
        run.journal.keep(latest)
        progress.done(_num_readings(run), _pass(latest, passes))
    return {**steady, **without_drift(latest)}


def _num_readings(run: Profiling) -> int:
    """Readings that the journal has of those that every name needs."""
    return sum(min(len(row), run.timing.passes) for row in run.journal.readings.values())


def _pass(readings: Readings, passes: int) -> str:
    number = max(len(row) for row in readings.values())
    if number <= passes:
        return f"pass {number} of {passes}"
    return f"reading what is unsteady again: {sum(len(row) == number for row in readings.values())}, pass {number}"


def _most_parameters(conf: ProfileConf) -> int:
    """Parameters of what may be prepared at once."""
    free = conf.memory_bytes if conf.memory_bytes is not None else free_memory_bytes()
    return int(free / _MEMORY_SHARE / _PARAMETER_BYTES)


def _parameters(index: OperatorIndex, chains: Mapping[str, Sequence[Operator]]) -> dict[str, int]:
    """The parameters of every chain."""
    counts = index.operator_table(lambda cost: cost.num_parameters)
    known = {operator.key: int(count) for operator, count in zip(index.operators, counts, strict=True)}
    return {name: sum(known[operator.key] for operator in chain) for name, chain in chains.items()}


def _chunks(names: Sequence[str], parameters: Mapping[str, int], most: int) -> Iterator[list[str]]:
    """The names in order, as many at a time as have at most so many parameters together, one at the least."""
    chunk: list[str] = []
    total = 0
    for name in names:
        if chunk and total + parameters[name] > most:
            yield chunk
            chunk, total = [], 0
        chunk.append(name)
        total += parameters[name]
    if chunk:
        yield chunk


def summary_lines(device: MeasuredDevice) -> Iterator[str]:
    """What a person wants to know of a finished profile."""
    profile, latency = device.profile, device.latency
    yield (
        f"{profile.device_class}: {profile.memory_bytes / 1e9:.2f} GB free, "
        f"{profile.macs_per_second / 1e9:.2f} G MACs/s in training, "
        f"{device.memory_bytes_per_second / 1e9:.1f} GB/s memory bandwidth"
    )
    count = len(latency.milliseconds)
    yield f"{count} operators of {latency.family} with {latency.engine}, {latency.threads} thread(s)"
    if device.fit is not None:
        fit = device.fit
        yield (
            f"on {fit['subnets']:.0f} held-out subnets: error {fit['mape']:.1%}, rank correlation "
            f"{fit['rank_correlation']:.3f} (plain sums of operators: {fit['mape_of_the_plain_sum']:.1%}, "
            f"{fit['rank_correlation_of_the_plain_sum']:.3f})"
        )
    if device.fit is not None and "memory_subnets" in device.fit:
        fit = device.fit
        least, greatest = fit["memory_least_ratio"], fit["memory_greatest_ratio"]
        yield (
            f"memory of a forward pass of {fit['memory_subnets']:.0f} subnets, each in a process of its own: predicted "
            f"{least:.3f} to {greatest:.3f} of the measured: the bound, 1.00 to {_MEMORY_MOST:.2f}, "
            f"{'holds' if least >= 1 and greatest <= _MEMORY_MOST else 'DOES NOT HOLD'}"
        )
