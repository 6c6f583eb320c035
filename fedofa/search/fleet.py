"""The best subnet for each of many unlike devices at once: no device is searched for alone.

What a subnet costs is its features times a device's factors: how often it has each operator times the device's latency
table, and the features of a round (`device.training.RoundFeatures`) times what the device's memory, rates and data make
of them. An archive of good subnets, made once for a space and a predictor, is so priced on a thousand devices by a few
matrix products; each device takes the best that meets all its limits, and goes on from there to better ones nearby.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from fedofa.device.cost import LocalWork
from fedofa.device.latency import Latency
from fedofa.device.models import Quantity
from fedofa.device.operators import OperatorIndex, SubnetBatch
from fedofa.device.training import RoundCosts, round_factors
from fedofa.search.accuracy import AccuracyPredictor
from fedofa.search.archive import Archive
from fedofa.search.limits import Limits
from fedofa.search.pricing import Pricing
from fedofa.search.refine import refine
from fedofa.search.specialise import describe
from fedofa.types.device import DeviceProfile
from fedofa.types.errors import ConfigError, InfeasibilityError

_OWN_LIMITS = ("memory", "round time", "latency")
_LATENCY = _OWN_LIMITS.index("latency")
_UNLIMITED = 1e300
_TO_MILLI = 1e3
_AT_A_TIME = 128
"""Devices that the archive is priced on at once."""
WIDTHS = (5, 5, 5, 2, 1, 1)
"""Subnets of unlike forms that a device keeps after each step of the refinement, unless told otherwise."""
_STARTS, _APART = 2, 14
"""Subnets of a device that are refined, and columns in which they differ at the least."""
_ROUNDING = np.float32(1e-5)
"""Share of a limit that single-precision sums over an archive may be off."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way to train: a plan for every subnet, and what limits every device alike under it.

    Args:
        costs: of a round.
        limits: on subnets, whatever the device: energy, bytes, memory of a forward pass.
        micro_batch: of the plan.
    """

    costs: RoundCosts
    limits: Limits = field(default_factory=lambda: Limits(()))
    micro_batch: int = 0


@dataclass(frozen=True, slots=True)
class Demand:
    """What one device can and may do.

    Args:
        profile: its memory and rates.
        work: of a round.
        round_seconds: for download, training and upload.
        latency_ms: the most that a forward pass of one example may take; None: as long as it takes.
        latency: measured on the device; without it a forward pass takes its MACs at the profile's rate.
    """

    profile: DeviceProfile
    work: LocalWork
    round_seconds: float
    latency_ms: float | None = None
    latency: Latency | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("round_seconds", "latency_ms"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{name}: expected a positive finite number, found {value!r}")

    @property
    def most(self) -> tuple[Quantity, Quantity, Quantity | None]:
        """The device's own limits, in the order of `Devices.limit_names`."""
        latency = None if self.latency_ms is None else Quantity(self.latency_ms, "ms")
        return Quantity(self.profile.memory_bytes, "bytes"), Quantity(self.round_seconds, "s"), latency


class Devices:
    """Many demands as matrices, under one way to train.

    Attributes:
        limit_names: of the limits that differ from device to device, then of those that all devices share.
    """

    def __init__(self, demands: Sequence[Demand], way: Way, macs: np.ndarray) -> None:
        """Prepare the matrices.

        Args:
            macs: of every operator, for devices without a table, `(num_operators,)`.
        """
        self.way = way
        self.limit_names = (*_OWN_LIMITS, *(limit.model.setting for limit in way.limits.limits))
        factors = [round_factors(item.profile, item.work, way.micro_batch) for item in demands]
        self.memory = _relative([item.memory_bytes for item in factors], [d.profile.memory_bytes for d in demands])
        self.seconds = _relative([item.round_seconds for item in factors], [d.round_seconds for d in demands])
        absent = np.zeros((len(demands), 1))  # what a place without a part takes
        tables = np.concatenate([np.stack([_milliseconds(item, macs) for item in demands]), absent], axis=1)
        most = np.array([_UNLIMITED if item.latency_ms is None else item.latency_ms for item in demands])
        self.tables = tables / most[:, None]
        self.overheads = np.array([item.latency.overhead_ms if item.latency else 0.0 for item in demands]) / most
        self.pricing = self._pricing()

    def _pricing(self) -> Pricing:
        """All limits, those that the devices share as features of their own."""
        own, shared, kinds = len(_OWN_LIMITS), len(self.way.limits.limits), self.memory.shape[1]
        factors = np.zeros((len(self), own + shared, kinds + shared))
        factors[:, 0, :kinds], factors[:, 1, :kinds] = self.memory, self.seconds
        factors[:, own:, kinds:] = np.eye(shared)
        offsets = np.zeros(factors.shape[:2])
        offsets[:, :own] = -1.0
        offsets[:, _LATENCY] += self.overheads
        return Pricing(self._features, factors, offsets, self.tables, _LATENCY)

    def _features(self, batch: SubnetBatch) -> np.ndarray:
        """The features of a round, then the excess over the limits that all devices share."""
        return np.concatenate([self.way.costs.features(batch).matrix(), self.way.limits.excess(batch)], axis=1)

    def __len__(self) -> int:
        return len(self.tables)

    def excess(self, features: np.ndarray, counts: np.ndarray, chosen: slice) -> np.ndarray:
        """The greatest excess over the devices' own limits, of every subnet on some of the devices.

        Args:
            features: of the round, `(num_subnets, num_features)`.
            counts: of operators, float32 `(num_subnets, num_operators)`.

        Returns:
            float32 `(num_subnets, num_devices)`.
        """
        tables, overheads = self.tables[chosen, :-1].astype(np.float32), self.overheads[chosen].astype(np.float32)
        latency = counts @ tables.T + overheads
        memory, seconds = ((features @ item[chosen].T).astype(np.float32) for item in (self.memory, self.seconds))
        return np.maximum(np.maximum(memory, seconds), latency) - np.float32(1)

    def each(self, batch: SubnetBatch, owners: np.ndarray) -> np.ndarray:
        """By which share subnets exceed each limit of a device of their own, and those that all devices share.

        Args:
            owners: the device of every subnet, `(num_subnets,)`.

        Returns:
            `(num_subnets, num_limits)`, in the order of `limit_names`.
        """
        return self.pricing.excess(batch, owners)

    def worst(self, batch: SubnetBatch, owners: np.ndarray) -> np.ndarray:
        """The greatest excess of subnets, each on its own device, `(num_subnets,)`."""
        return self.each(batch, owners).max(axis=1)


def _relative(factors: Sequence[np.ndarray], most: Sequence[float]) -> np.ndarray:
    return np.stack(factors) / np.array(most)[:, None]


def _milliseconds(demand: Demand, macs: np.ndarray) -> np.ndarray:
    if demand.latency is not None:
        return demand.latency.table
    return macs / demand.profile.macs_per_second * _TO_MILLI


@dataclass(frozen=True, slots=True)
class Choice:
    """What one device trains.

    Args:
        row: of the subnet, `(num_columns,)`.
        accuracy: as predicted.
        way: position of the group of ways to train, and of the way in it.
        binding: the limit that leaves the least room: "memory", "round time", "latency" or the setting of one that all
            devices share; "none" where the archive's best subnet fits.
    """

    row: np.ndarray
    accuracy: float
    way: tuple[int, int]
    binding: str


@dataclass(frozen=True)
class FleetSearch:
    """Assigns subnets to fleets.

    Args:
        archive: of the space, by the same predictor.
        predictor: of accuracy.
        ways: to train, in order of preference; a later group serves only devices that nothing fits in the earlier ones.
            In a group the first way that fits the chosen subnet is taken (recompute only at need).
        widths: of the refinement, subnets of unlike forms that a device keeps after each step; without a step it takes
            the archive's best.
    """

    archive: Archive
    predictor: AccuracyPredictor
    ways: Sequence[Sequence[Way]]
    widths: Sequence[int] = WIDTHS

    @property
    def index(self) -> OperatorIndex:
        """Of the space."""
        return self.archive.index

    @cached_property
    def _macs(self) -> np.ndarray:
        return self.index.operator_table(lambda cost: cost.macs)

    def assign(self, demands: Sequence[Demand]) -> list[Choice | InfeasibilityError]:
        """The best subnet for every device, or why it has none: which limits, by how much, and the nearest subnet.

        Demands that are equal have equal choices, so that each need be given only once.
        """
        outcomes: dict[int, Choice | InfeasibilityError] = {}
        left = list(range(len(demands)))
        for number, group in enumerate(self.ways):
            if left:
                found = self._assign_group(number, group, [demands[device] for device in left])
                for device, outcome in zip(left, found, strict=True):
                    if isinstance(outcome, Choice) or device not in outcomes:
                        outcomes[device] = outcome
                left = [device for device in left if not isinstance(outcomes[device], Choice)]
        return [outcomes[device] for device in range(len(demands))]

    def _assign_group(
        self, number: int, group: Sequence[Way], demands: Sequence[Demand]
    ) -> list[Choice | InfeasibilityError]:
        """The best under ways that are equally good; of devices that nothing fits, by how much the last way misses."""
        priced = [Devices(demands, way, self._macs) for way in group]
        found = [self._in_archive(devices) for devices in priced]
        firsts = np.stack([np.where(fits, ranks[:, 0], len(self.archive)) for ranks, fits in found])
        chosen, first = firsts.argmin(axis=0), firsts.min(axis=0)  # the best comes first, and the plainest way to it
        outcomes: dict[int, Choice | InfeasibilityError] = {}
        for way, devices in enumerate(priced):
            members = np.nonzero((first < len(self.archive)) & (chosen == way))[0]
            rows, accuracies = self._refined(devices, members, found[way][0][members])
            outcomes |= self._choices(priced[: way + 1], number, members, rows, accuracies)
        for device in set(range(len(demands))) - set(outcomes):
            nearest = self.archive.rows[found[-1][0][device, 0]]
            outcomes[device] = self._refusal(demands[device], priced[-1], device, nearest)
        return [outcomes[device] for device in range(len(demands))]

    def _in_archive(self, devices: Devices) -> tuple[np.ndarray, np.ndarray]:
        """Where each device begins: its best subnets that differ from one another, or else the nearest subnet.

        Returns:
            Positions in the archive, `(num_devices, _STARTS)`, and whether they fit the device, `(num_devices,)`.
        """
        archive, way = self.archive, devices.way
        features = way.costs.features(archive.batch).matrix()
        common = way.limits.worst(archive.batch).astype(np.float32)[:, None]
        ranks, fitting = [], []
        for start in range(0, len(devices), _AT_A_TIME):
            excess = devices.excess(features, archive.counts, slice(start, start + _AT_A_TIME)) + _ROUNDING
            excess = np.maximum(excess, common)
            fits = excess <= 0
            fitting.append(fits.any(axis=0))
            first = np.where(fitting[-1], fits.argmax(axis=0), excess.argmin(axis=0))
            chosen = [first]
            for _ in range(_STARTS - 1):
                fits &= archive.differing(chosen[-1]) >= _APART
                chosen.append(np.where(fits.any(axis=0), fits.argmax(axis=0), first))
            ranks.append(np.stack(chosen, axis=1))
        return np.concatenate(ranks), np.concatenate(fitting)

    def _refined(self, devices: Devices, members: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The best subnet that is reached from each device's starts, and its accuracy.

        Args:
            members: of the devices.
            starts: positions in the archive, `(num_members, _STARTS)`.
        """
        if not self.widths:
            return self.archive.rows[starts[:, 0]], self.archive.accuracies[starts[:, 0]]

        owners, rows = np.repeat(members, starts.shape[1]), self.archive.rows[starts.ravel()]
        return refine(self.index, self.predictor, rows, owners, devices.pricing, self.widths)

    def _choices(
        self, ways: Sequence[Devices], group: int, members: np.ndarray, rows: np.ndarray, accuracies: np.ndarray
    ) -> dict[int, Choice]:
        """By device the choice of its subnet: the first of the ways that fits, as the last does, and what binds."""
        best = SubnetBatch(self.index, np.repeat(self.archive.rows[:1], len(members), axis=0))
        choices: dict[int, Choice] = {}
        for way, devices in enumerate(ways):
            each = devices.each(SubnetBatch(self.index, rows), members)
            unlimited = devices.worst(best, members) <= 0
            for number, device in enumerate(members):
                if int(device) not in choices and (each[number].max() <= 0 or way == len(ways) - 1):
                    binding = "none" if unlimited[number] else devices.limit_names[int(each[number].argmax())]
                    choices[int(device)] = Choice(rows[number], float(accuracies[number]), (group, way), binding)
        return choices

    def _refusal(self, demand: Demand, devices: Devices, device: int, row: np.ndarray) -> InfeasibilityError:
        """Why a device has no subnet."""
        subnet = self.index.encoding.subnet(row)
        missed = _missed(demand, devices, device, SubnetBatch(self.index, row[None]))
        return InfeasibilityError(
            f"no subnet of {subnet.family!r} fits a {demand.profile.device_class!r} device: with the nearest, "
            f"{describe(self.index.encoding.space, subnet)}, {missed}. Give it more of that, or take a "
            "supernet with smaller subnets",
            nearest=subnet,
        )

    def missed(self, demand: Demand, group: int, way: int, batch: SubnetBatch) -> str:
        """In words which limits the only subnet of a batch exceeds on a device, and by how much; "" where none.

        Args:
            group, way: to train, a position in `ways`.
        """
        return _missed(demand, Devices([demand], self.ways[group][way], self._macs), 0, batch)


def _missed(demand: Demand, devices: Devices, device: int, batch: SubnetBatch) -> str:
    own = devices.each(batch, np.array([device]))[0][: len(_OWN_LIMITS)]
    words = [
        f"{name} is exceeded {1 + excess:.2f} times (it needs {Quantity(most.value * (1 + excess), most.unit)}, "
        f"may take {most})"
        for name, excess, most in zip(_OWN_LIMITS, own, demand.most, strict=True)
        if most is not None and excess > 0
    ]
    words += [devices.way.limits.miss(batch)] if devices.way.limits.worst(batch)[0] > 0 else []
    return "; ".join(words)
