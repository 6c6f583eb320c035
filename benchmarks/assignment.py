"""A fleet with a latency table each is assigned its subnets: `python benchmarks/assignment.py`.

Tables are made up: rooflines of every balance of compute and bandwidth, over three orders of magnitude, a factor for
each kind of operator and one for each operator. Limits on latency lie between the space's smallest and largest subnet
on that device; training memory, link rates and the time of a round differ as well. The space is the published one of
width 1.2 (more than 10^19 subnets), the accuracy predictor is trained on accuracies that are made up.

Some of the devices are then searched for one by one, by `fedofa.search.specialise` with the same limits. The last line
holds the seconds of the assignment, of the archive (made once for a space and a predictor) and of one full search, and
by how much the assignment's predicted accuracy is below the full search's, in points of a hundred, on average and at
the most.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

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
from fedofa.search.fleet import Choice, Demand, FleetSearch, Way
from fedofa.search.limits import Limit, Limits
from fedofa.search.specialise import DeviceSearch
from fedofa.supernet.families import build_elastic
from fedofa.types.device import DeviceProfile

Result = TypeVar("Result")

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--searched", type=int, default=20, help="devices that are searched for one by one as well")
    parser.add_argument("--steps", type=int, default=6, help="of the refinement")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    index = OperatorIndex.of(build_elastic(SPEC))
    predictor = made_up_predictor(index, options.seed)
    way = Way(RoundCosts(PlannedPlaces(index, partial(build_plan, "last_blocks(8)"))))
    fleet = made_up_fleet(index, way, options.devices, options.seed)
    print_load("before")
    archive, archive_wall, archive_cpu = timed(lambda: build_archive(index, predictor, seed=options.seed))
    search = FleetSearch(archive, predictor, [[way]], options.steps)
    outcomes, wall, cpu = timed(lambda: search.assign(fleet))
    served = [number for number, outcome in enumerate(outcomes) if isinstance(outcome, Choice)]
    print(f"archive: {len(archive):,} subnets, {archive_wall:.2f} s wall, {archive_cpu:.2f} s CPU")
    print(f"{len(fleet):,} devices, {len(served):,} served: {wall:.2f} s wall, {cpu:.2f} s CPU")
    check_limits(index, way, fleet, outcomes)
    chosen = np.random.default_rng(options.seed).permutation(served)[: options.searched]
    single = DeviceSearch(index, predictor, [])
    losses, seconds = [], []
    print(f"\n{'device':>12}{'limit ms':>12}{'assigned':>10}{'searched':>10}{'below':>8}  binding")
    for number in chosen:
        outcome, demand = outcomes[number], fleet[number]
        found, _, searched_cpu = timed(lambda demand=demand: single.best(limits_of(demand, way), options.seed))
        losses.append(found.accuracy - outcome.accuracy)
        seconds.append(searched_cpu)
        cells = f"{demand.latency_ms:12.3f}{outcome.accuracy:10.3f}{found.accuracy:10.3f}{losses[-1]:8.3f}"
        print(f"{demand.profile.device_class:>12}{cells}  {outcome.binding}", flush=True)
    print(
        f"\nassignment_wall_seconds={wall:.3f} assignment_cpu_seconds={cpu:.3f} archive_cpu_seconds={archive_cpu:.3f} "
        f"search_cpu_seconds={np.mean(seconds):.3f} mean_points_below={np.mean(losses):.4f} "
        f"most_points_below={max(losses):.4f}"
    )


def check_limits(index: OperatorIndex, way: Way, fleet: Sequence[Demand], outcomes: Sequence[object]) -> None:
    """Hold every choice against its device's limits, priced one by one; a choice beyond them ends the benchmark."""
    for demand, outcome in zip(fleet, outcomes, strict=True):
        if isinstance(outcome, Choice):
            batch = SubnetBatch(index, outcome.row[None])
            limits = limits_of(demand, way)
            if limits.worst(batch)[0] > 1e-9:
                raise SystemExit(f"{demand.profile.device_class}: {limits.miss(batch)}")


def timed(action: Callable[[], Result]) -> tuple[Result, float, float]:
    """What it gives, and its seconds of wall and processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = action()
    return result, time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    main()
