"""A fleet with a latency table each is assigned its subnets: `python benchmarks/assignment.py`.

Tables are made up: rooflines of every balance of compute and bandwidth, over three orders of magnitude, a factor for
each kind of operator and one for each operator. Limits on latency lie between the space's smallest and largest subnet
on that device; training memory, link rates and the time of a round differ as well. The space is the published one of
width 1.2 (more than 10^19 subnets), the accuracy predictor is trained on accuracies that are made up.

Some of the devices are then searched for one by one, by `fedofa.search.specialise` with the same limits. Seconds
are of the processor: of the assignment, of the archive (made once for a space and a predictor) and of one full search.
The last line holds the worst of all seeds, and by how much the assignment's predicted accuracy is below the full
search's, in points of a hundred, on average and at the most.
"""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before numpy is loaded, as every command of fedofa sets it

import numpy as np
from search import SPEC, made_up_predictor
from simulation import print_load

from fedofa.device.cost import LocalWork
from fedofa.device.latency import Latency, roofline_table
from fedofa.device.models import SubnetCostModel
from fedofa.device.operators import OperatorIndex, SubnetBatch
from fedofa.device.tables import LatencyTable
from fedofa.device.training import PlannedPlaces, RoundCosts, round_factors
from fedofa.finetune.plans import build_plan
from fedofa.search.archive import build_archive
from fedofa.search.fleet import WIDTHS, Choice, Demand, FleetSearch, Way
from fedofa.search.limits import Limit, Limits
from fedofa.search.specialise import DeviceSearch
from fedofa.supernet.families import build_elastic
from fedofa.types.device import DeviceProfile

Made = TypeVar("Made")

_WORK = LocalWork(num_examples=100, num_samples=100, batch_size=8)
_OPERATOR_SPREAD, _KIND_SPREAD = 0.3, 0.4
"""Standard deviations of the logarithms of the factors of an operator, and of a kind of operator."""


def made_up_table(index: OperatorIndex, rng: np.random.Generator) -> LatencyTable:
    """A device somewhere in three orders of magnitude, of a shape of its own."""
    speed = 10 ** rng.uniform(8, 11)
    plain = roofline_table(
        index,
        macs_per_second=speed,
        bytes_per_second=speed * 10 ** rng.uniform(-1, 1),
        launch_ms=float(10 ** rng.uniform(-1, 1)) * 1e6 / speed,
        engine="roofline with factors",
        source="made up",
    )
    kinds: dict[str, float] = {}
    times = {}
    for key, ms in plain.milliseconds.items():
        kind = " ".join(part for part in key.split() if part.startswith(("k=", "se=", "act=", "mbconv", "conv")))
        factor = kinds.setdefault(kind, float(np.exp(rng.normal(0, _KIND_SPREAD))))
        times[key] = ms * factor * float(np.exp(rng.normal(0, _OPERATOR_SPREAD)))
    return LatencyTable(plain.family, plain.engine, 1, plain.source, times)


def made_up_fleet(index: OperatorIndex, way: Way, number: int, seed: int) -> list[Demand]:
    """So many devices, whose limits lie somewhere between the smallest subnet's needs and more than the largest's."""
    rng = np.random.default_rng(seed)
    ends = index.batch([index.encoding.space.smallest(), index.encoding.space.largest()])
    features = way.costs.features(ends).matrix()
    fleet = []
    for _ in range(number):
        latency = Latency(index, made_up_table(index, rng))
        speed, link = 10 ** rng.uniform(7, 10), 10 ** rng.uniform(4, 7)
        rates = DeviceProfile(f"device-{len(fleet)}", 1.0, speed, link, 4 * link)
        factors = round_factors(rates, _WORK)
        memory = _between(features @ factors.memory_bytes, rng.uniform(0.1, 1.5))
        seconds = _between(features @ factors.round_seconds, rng.uniform(0.1, 1.5))
        profile = DeviceProfile(rates.device_class, memory, speed, link, 4 * link)
        fleet.append(Demand(profile, _WORK, seconds, _between(latency.predict(ends), rng.uniform(0.05, 0.9)), latency))
    return fleet


def _between(ends: np.ndarray, share: float) -> float:
    """Geometrically between two values, or beyond the second."""
    return float(ends[0] * (ends[1] / ends[0]) ** share)


class DeviceCost(SubnetCostModel):
    """A cost that is linear in the features of a round, for the search of one device."""

    def __init__(self, way: Way, setting: str, unit: str, factors: np.ndarray) -> None:
        super().__init__(way.costs.index)
        self.way, self.setting, self.unit, self.factors = way, setting, unit, factors

    def predict(self, batch: SubnetBatch) -> np.ndarray:
        return self.way.costs.features(batch).matrix() @ self.factors


def limits_of(demand: Demand, way: Way) -> Limits:
    """A device's limits as the search of one device takes them."""
    factors = round_factors(demand.profile, demand.work)
    memory = DeviceCost(way, "memory", "bytes", factors.memory_bytes)
    seconds = DeviceCost(way, "round time", "s", factors.round_seconds)
    limits = [Limit(memory, demand.profile.memory_bytes), Limit(seconds, demand.round_seconds)]
    if demand.latency is not None and demand.latency_ms is not None:
        limits.append(Limit(demand.latency, demand.latency_ms))
    return Limits(tuple(limits))


@dataclass(frozen=True, slots=True)
class Result:
    """Of one seed.

    Args:
        archive_cpu, assignment_cpu, search_cpu: seconds; the last one a device.
        below: by how much each device that was searched for is below its full search.
    """

    archive_cpu: float
    assignment_cpu: float
    search_cpu: float
    below: Sequence[float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--searched", type=int, default=20, help="devices that are searched for one by one as well")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of predictor, fleet, archive and searches")
    parser.add_argument("--widths", type=int, nargs="*", default=WIDTHS, help="of the refinement")
    options = parser.parse_args()
    index = OperatorIndex.of(build_elastic(SPEC))
    print_load("before")
    results = [compared(index, seed, options.devices, options.searched, options.widths) for seed in options.seeds]
    print(f"\n{'seed':>6}{'archive s':>11}{'assignment s':>14}{'search s':>10}{'mean below':>12}{'most below':>12}")
    for seed, item in zip(options.seeds, results, strict=True):
        seconds = f"{item.archive_cpu:11.2f}{item.assignment_cpu:14.2f}{item.search_cpu:10.2f}"
        print(f"{seed:6}{seconds}{np.mean(item.below):12.3f}{max(item.below):12.3f}")
    below = np.concatenate([item.below for item in results])
    print(
        f"\nassignment_cpu_seconds={max(item.assignment_cpu for item in results):.3f} "
        f"archive_cpu_seconds={max(item.archive_cpu for item in results):.3f} "
        f"search_cpu_seconds={np.mean([item.search_cpu for item in results]):.3f} "
        f"mean_points_below={below.mean():.4f} most_points_below={below.max():.4f}"
    )


def compared(index: OperatorIndex, seed: int, devices: int, searched: int, widths: Sequence[int]) -> Result:
    """A fleet of one seed is assigned, and some of its devices are searched for."""
    print(f"\nseed {seed}")
    predictor = made_up_predictor(index, seed)
    way = Way(RoundCosts(PlannedPlaces(index, partial(build_plan, "last_blocks(8)"))))
    fleet = made_up_fleet(index, way, devices, seed)
    archive, archive_cpu = timed(lambda: build_archive(index, predictor, seed=seed))
    outcomes, cpu = timed(lambda: FleetSearch(archive, predictor, [[way]], widths).assign(fleet))
    served = [number for number, outcome in enumerate(outcomes) if isinstance(outcome, Choice)]
    print(f"archive: {len(archive):,} subnets, {archive_cpu:.2f} s")
    print(f"{len(fleet):,} devices, {len(served):,} served: {cpu:.2f} s")
    check_limits(index, way, fleet, outcomes)
    single = DeviceSearch(index, predictor, [])
    below, seconds = list[float](), list[float]()
    print(f"{'device':>12}{'limit ms':>12}{'assigned':>10}{'searched':>10}{'below':>8}  binding")
    for number in np.random.default_rng(seed).permutation(served)[:searched]:
        outcome, demand = outcomes[number], fleet[number]
        found, searched_cpu = timed(lambda demand=demand: single.best(limits_of(demand, way), seed))
        below.append(found.accuracy - outcome.accuracy)
        seconds.append(searched_cpu)
        cells = f"{demand.latency_ms:12.3f}{outcome.accuracy:10.3f}{found.accuracy:10.3f}{below[-1]:8.3f}"
        print(f"{demand.profile.device_class:>12}{cells}  {outcome.binding}", flush=True)
    return Result(archive_cpu, cpu, float(np.mean(seconds)), below)


def check_limits(index: OperatorIndex, way: Way, fleet: Sequence[Demand], outcomes: Sequence[object]) -> None:
    """Hold every choice against its device's limits, priced one by one; a choice beyond them ends the benchmark."""
    for demand, outcome in zip(fleet, outcomes, strict=True):
        if isinstance(outcome, Choice):
            batch = SubnetBatch(index, outcome.row[None])
            limits = limits_of(demand, way)
            if limits.worst(batch)[0] > 1e-9:
                raise SystemExit(f"{demand.profile.device_class}: {limits.miss(batch)}")


def timed(action: Callable[[], Made]) -> tuple[Made, float]:
    """What it gives, and its seconds of processor time."""
    start = time.process_time()
    made = action()
    return made, time.process_time() - start


if __name__ == "__main__":
    main()
