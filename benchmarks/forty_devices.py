"""Forty kinds of device, one supernet: `python benchmarks/forty_devices.py [--picture docs/images/forty_devices.png]`.

Three ways to give each device a network of its own: train one supernet and search it for every device; design a network
for every device by hand and train it alone; search for every device with training in the loop. The devices' latency
tables are made up (see `assignment.py`), over three orders of magnitude; the space is the published one of width 1.2.
The searches are run and timed here; training is priced in multiply-accumulates (three forward passes' worth a training
example), and a MAC in CPU seconds of training steps measured here. Nothing is trained to the end.

Assumptions are arguments. The supernet's schedule is Once-for-All's (arXiv 1908.09791): the largest network 180 epochs,
then elastic kernels 120 epochs with one subnet a step, depths 25 + 120 with two, expand ratios 25 + 120 with four, each
beside a forward pass of the teacher. A network alone is trained as long as the largest. A search with training is
MnasNet's (arXiv 1807.11626): 8,000 candidates, five epochs each, and its winner trained. ImageNet has 1,281,167
training images. To hold the ratio below against: an early version of the Once-for-All paper (the abstract, since
changed) has 1,142 times as many GPU hours for MnasNet at 40 scenarios. Power is assumed: 9.4 W a core, as of a 32-core
server processor of 300 W, times 1.56 for the data centre (Uptime Institute's survey of 2024), 480 g of CO2 a kWh
(Ember's world average of 2023).

The last line holds MACs, CPU hours and kilograms of CO2 of the three ways, and from how many devices on the supernet is
the cheapest.
"""

import argparse
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before numpy is loaded, as every command of fedofa sets it

import numpy as np
from assignment import made_up_fleet, timed
from matplotlib.ticker import FuncFormatter, NullLocator
from search import SPEC, made_up_predictor
from simulation import print_load

from fedofa.device.models import Macs
from fedofa.device.operators import OperatorIndex, SubnetBatch
from fedofa.device.rates import training_macs_per_second
from fedofa.device.training import PlannedPlaces, RoundCosts
from fedofa.finetune.plans import build_plan
from fedofa.report.style import GREY, INK, LEFT, PALETTE, RIGHT, SMALL_POINTS, TEXT_POINTS, new_figure, save_png, short
from fedofa.report.style import style_axes as style
from fedofa.search.archive import build_archive
from fedofa.search.fleet import Choice, FleetSearch, Way
from fedofa.supernet.families import build_elastic

_PASSES = 3
"""A training example costs a forward pass, and a backward pass of twice that."""
_ELASTIC_PHASES = ((120, 1), (25 + 120, 2), (25 + 120, 4))
"""Epochs and subnets a step of Once-for-All's phases after the first."""
_SAMPLED = 2000
_LABEL_AT = 2
"""Number of devices above which the lines' names stand."""
_NAMES = ("One supernet, a search a device", "A network trained for each", "A search with training for each")


@dataclass(frozen=True, slots=True)
class Prices:
    """What a MAC costs.

    Args:
        macs_per_second: of one core in training.
        watts: of one core, the data centre's share included.
        grams_per_kwh: of CO2.
    """

    macs_per_second: float
    watts: float
    grams_per_kwh: float

    def hours(self, macs: float) -> float:
        """CPU hours."""
        return macs / self.macs_per_second / 3600

    def kilograms(self, hours: float) -> float:
        """Of CO2."""
        return hours * self.watts / 1000 * self.grams_per_kwh / 1000


@dataclass(frozen=True, slots=True)
class Ways:
    """CPU hours of the three ways: what is spent once, and what each device adds on average."""

    once: tuple[float, float, float]
    each: tuple[float, float, float]

    def total(self, way: int, number: int) -> float:
        """CPU hours for so many devices."""
        return self.once[way] + number * self.each[way]

    def break_even(self, way: int) -> int:
        """From how many devices on the supernet is cheaper than another way."""
        return math.floor(self.once[0] / (self.each[way] - self.each[0])) + 1


def main() -> None:
    options = parse()
    index = OperatorIndex.of(build_elastic(SPEC))
    predictor = made_up_predictor(index, options.seed)
    way = Way(RoundCosts(PlannedPlaces(index, partial(build_plan, "last_blocks(8)"))))
    fleet = made_up_fleet(index, way, options.devices, options.seed)
    print_load("before")
    archive, archive_seconds = timed(lambda: build_archive(index, predictor, seed=options.seed))
    outcomes, search_seconds = timed(lambda: FleetSearch(archive, predictor, [[way]]).assign(fleet))
    rows = np.stack([outcome.row for outcome in outcomes if isinstance(outcome, Choice)])
    subnets = len(np.unique(rows, axis=0))
    print(f"{len(rows)} of {len(fleet)} devices served with {subnets} distinct subnets")
    print(f"archive {archive_seconds:.2f} CPU s, all searches {search_seconds:.2f} CPU s")
    order = np.argsort(Macs(index).predict(SubnetBatch(index, rows)))
    median = index.encoding.subnet(rows[order[len(rows) // 2]])
    rate = training_macs_per_second(index.network(median), 1, "cpu")
    prices = Prices(rate, options.watts * options.pue, options.grams)
    print(f"training: {rate / 1e9:.2f} G MACs a CPU second, measured on the median subnet")
    macs = training_macs(index, rows, options)
    searched = (archive_seconds + search_seconds) / 3600
    ways = Ways(
        once=(prices.hours(macs[0]) + archive_seconds / 3600, 0.0, 0.0),
        each=(
            search_seconds / len(fleet) / 3600,
            prices.hours(macs[1]) / len(rows),
            prices.hours(macs[2]) / len(rows),
        ),
    )
    print(f"\n{'way':34}{'MACs':>12}{'CPU hours':>14}{'kg CO2':>12}")
    for number, name in enumerate(_NAMES):
        hours = ways.total(number, len(fleet))
        print(f"{name:34}{macs[number]:12.3g}{hours:14,.0f}{prices.kilograms(hours):12,.1f}")
    print(f"of the first, searching: {searched * 3600:.1f} CPU seconds, {1e3 * prices.kilograms(searched):.3f} g CO2")
    if options.picture:
        plot(ways, prices, len(fleet), options.picture)
    totals = [ways.total(number, len(fleet)) for number in range(len(_NAMES))]
    cells = " ".join(
        f"{key}_macs={count:.4g} {key}_cpu_hours={hours:.1f} {key}_kg_co2={prices.kilograms(hours):.2f}"
        for key, count, hours in zip(("supernet", "alone", "searched"), macs, totals, strict=True)
    )
    print(
        f"\n{cells} search_cpu_seconds={searched * 3600:.2f} break_even_alone={ways.break_even(1)} "
        f"break_even_searched={ways.break_even(2)}"
    )


def parse() -> argparse.Namespace:
    """The assumptions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=40)
    parser.add_argument("--images", type=float, default=1_281_167, help="of the training set")
    parser.add_argument("--epochs", type=float, default=180, help="of a network alone, and of the largest one")
    parser.add_argument("--candidates", type=float, default=8000, help="of a search with training")
    parser.add_argument("--candidate-epochs", type=float, default=5)
    parser.add_argument("--watts", type=float, default=9.4, help="of one core")
    parser.add_argument("--pue", type=float, default=1.56, help="watts of the data centre for each of its computers'")
    parser.add_argument("--grams", type=float, default=480, help="of CO2 a kWh")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def training_macs(index: OperatorIndex, rows: np.ndarray, options: argparse.Namespace) -> tuple[float, float, float]:
    """Multiply-accumulates that the three ways train with, for the devices' subnets."""
    model = Macs(index)
    largest = float(model.predict(index.batch([index.encoding.space.largest()]))[0])
    sampled = SubnetBatch(index, index.encoding.sample(np.random.default_rng(options.seed), _SAMPLED))
    mean = float(model.predict(sampled).mean())
    own = float(model.predict(SubnetBatch(index, rows)).sum())
    elastic = sum(epochs * (largest + number * _PASSES * mean) for epochs, number in _ELASTIC_PHASES)
    supernet = options.images * (options.epochs * _PASSES * largest + elastic)
    alone = options.images * options.epochs * _PASSES * own
    candidates = options.images * options.candidates * options.candidate_epochs * _PASSES * mean * len(rows)
    return supernet, alone, candidates + alone


def plot(ways: Ways, prices: Prices, number: int, path: Path) -> None:
    """Cost against the number of devices, both logarithmic: CPU hours on the left, CO2 on the right."""
    figure = new_figure(f"A network of its own for each of {number} kinds of device", 5.0)
    axes = figure.add_axes((LEFT + 0.05, 0.13, RIGHT - LEFT - 0.13, 0.70))
    style(axes, "CPU hours of training and searching (log scale)")
    counts = np.unique(np.round(np.geomspace(1, number, 60)).astype(int))
    for way, (name, colour) in enumerate(zip(_NAMES, PALETTE, strict=False)):
        hours = [ways.total(way, int(count)) for count in counts]
        axes.plot(counts, hours, color=colour, linewidth=2)
        at = min(len(counts) - 1, int(np.searchsorted(counts, _LABEL_AT)))
        where = {"xytext": (0, 17), "textcoords": "offset points", "ha": "center"}
        axes.annotate(name, (counts[at], hours[at]), fontsize=SMALL_POINTS, color=colour, **where)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([count for count in (1, 2, 5, 10, 20, 40, 100, 200) if count <= number])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    low, high = ways.total(1, 1), ways.total(2, number)
    axes.set_yticks([10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)])
    axes.yaxis.set_major_formatter(FuncFormatter(_thousands))
    axes.set_xlabel("Kinds of device (log scale)", fontsize=TEXT_POINTS, color=GREY)
    if ways.break_even(1) <= number:
        axes.axvline(ways.break_even(1), color=INK, linewidth=0.8, linestyle=":")
        text = f" the supernet is cheapest from {ways.break_even(1)} on"
        axes.text(ways.break_even(1), 1.2 * low, text, fontsize=SMALL_POINTS, color=GREY)
    _carbon_axis(axes, prices.kilograms)
    save_png(figure, path)


def _carbon_axis(axes, kilograms: Callable[[float], float]) -> None:
    """The same costs as CO2, on the right."""
    right = axes.secondary_yaxis("right", functions=(kilograms, lambda mass: mass / kilograms(1.0)))
    right.yaxis.set_minor_locator(NullLocator())
    right.yaxis.set_major_formatter(FuncFormatter(_thousands))
    right.tick_params(labelsize=SMALL_POINTS, labelcolor=GREY, length=0)
    right.spines["right"].set_visible(False)
    right.set_ylabel("kg of CO2", fontsize=TEXT_POINTS, color=GREY)


def _thousands(value: float, _: object) -> str:
    return f"{value:,.0f}" if value >= 1 else short(value)


if __name__ == "__main__":
    main()
