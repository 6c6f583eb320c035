"""Searches beside the package `ofa`: `python benchmarks/search.py [--device FILE] [--predictor FILE]`.

`ofa`'s evolution finder and fedofa's search look for the most accurate subnet of the published space of width 1.2
(resolutions 160 to 224) under five latency limits. Both ask the same latency table, `ofa` through its own code in its
published format, and the same accuracy predictor, in `ofa`'s published layout. Without files the table is a roofline
and the predictor is trained on accuracies that are made up: both say so. Times are CPU seconds; `ofa`'s settings are
its defaults (100 subnets, 500 generations) unless --ofa-generations says otherwise. The last line holds the least
difference in predicted accuracy and the largest ratio of CPU seconds.
"""

import argparse
import contextlib
import importlib.machinery
import io
import os
import random
import sys
import time
import types
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before numpy is loaded, as every command of fedofa sets it

import numpy as np

from fedofa.device.latency import Latency, roofline_table
from fedofa.device.models import Macs, Parameters
from fedofa.device.ofa_tables import ofa_entries
from fedofa.device.operators import OperatorIndex, SubnetBatch
from fedofa.device.profile import load_device
from fedofa.device.tables import LatencyTable
from fedofa.search.accuracy import NetworkPredictor, load_predictor
from fedofa.search.learning import train_predictor
from fedofa.search.limits import Limit, Limits
from fedofa.search.specialise import DeviceSearch
from fedofa.supernet.families import build_elastic
from fedofa.supernet.mobilenet_v3 import MobileNetV3Spec

SPEC = MobileNetV3Spec(resolutions=(160, 176, 192, 208, 224)).scaled(1.2)
QUANTILES = (0.05, 0.2, 0.4, 0.6, 0.8)
"""The limits are these quantiles of random subnets' latencies."""


class _Stub(types.ModuleType):
    """A module that has every attribute; `ofa` names torchvision and gdown and runs none of them here."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def import_peer() -> tuple[Any, Any]:
    """The package's evolution finder and its latency table."""
    names = (
        "torchvision",
        "torchvision.transforms",
        "torchvision.datasets",
        "torchvision.transforms.functional",
        "gdown",
    )
    for name in names:
        stub = sys.modules[name] = _Stub(name)
        stub.__spec__, stub.__path__ = importlib.machinery.ModuleSpec(name, None), []
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, stub)
    from ofa.tutorial.evolution_finder import EvolutionFinder
    from ofa.tutorial.latency_table import LatencyEstimator

    return EvolutionFinder, LatencyEstimator


class PeerPredictors:
    """What the finder asks: `ofa`'s own walk over a table, and the predictor that fedofa asks as well."""

    def __init__(self, estimator: Any, predictor: NetworkPredictor, index: OperatorIndex) -> None:
        self.estimator, self.predictor, self.index = estimator, predictor, index

    def predict_efficiency(self, sample: dict[str, Any]) -> float:
        """Milliseconds."""
        return self.estimator.predict_network_latency_given_spec(sample)

    def predict_accuracy(self, samples: list[dict[str, Any]]) -> Any:
        """Accuracies `(num_samples, 1)`."""
        encoding = self.index.encoding
        columns = [np.array([sample[key] for sample in samples]) for key in ("d", "ks", "e", "r")]
        axes = [encoding.space.axis(name) for name in ("depth", "kernel", "expand", "resolution")]
        indices = [np.searchsorted(axis.values, column) for axis, column in zip(axes, columns, strict=True)]
        rows = encoding.normalised(np.concatenate(indices, axis=1))
        return self.predictor.predict(SubnetBatch(self.index, rows))[:, None]


def made_up_predictor(index: OperatorIndex, seed: int) -> NetworkPredictor:
    """Trained on accuracies that grow with size and otherwise are drawn at random."""
    rng = np.random.default_rng(seed)
    rows = index.encoding.sample(rng, 600)
    batch = SubnetBatch(index, rows)
    size = np.log(Macs(index).predict(batch)) + 0.5 * np.log(Parameters(index).predict(batch))
    own = index.encoding.one_hot(rows) @ rng.normal(0, 0.1, index.encoding.num_features)
    accuracies = 76 + 3 * (size - size.mean()) + own + rng.normal(0, 0.05, len(rows))
    predictor, held_out = train_predictor(
        index.encoding, rows, accuracies, kind="mlp", held_out_fraction=0.2, seed=seed
    )
    print(f"predictor: trained on made-up accuracies, held-out rank correlation {held_out.rank_correlation:.3f}")
    return predictor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=Path, help="a profile of this space; without it a roofline serves")
    parser.add_argument("--predictor", type=Path)
    parser.add_argument("--ofa-generations", type=int, default=500)
    parser.add_argument("--limits", type=int, default=len(QUANTILES))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    finder_of, estimator_of = import_peer()
    index = OperatorIndex.of(build_elastic(SPEC))
    table: LatencyTable = (
        load_device(options.device).latency
        if options.device
        else roofline_table(
            index, macs_per_second=2e10, bytes_per_second=1e10, launch_ms=0.02, engine="roofline", source="made up"
        )
    )
    space = index.encoding.space
    predictor = (
        load_predictor(options.predictor, space) if options.predictor else made_up_predictor(index, options.seed)
    )
    latency = Latency(index, table)
    estimator = object.__new__(estimator_of)
    estimator.lut = ofa_entries(table, index)
    peer = PeerPredictors(estimator, predictor, index)
    drawn = latency.predict(SubnetBatch(index, index.encoding.sample(np.random.default_rng(options.seed), 2000)))
    limits = np.quantile(drawn, QUANTILES[: options.limits])
    print(f"table: {table.engine} ({table.source}); ofa {version('ofa')}, {options.ofa_generations} generations")
    print(f"{os.cpu_count()} cores, load average {' '.join(f'{load:.2f}' for load in os.getloadavg())}")
    print(f"\n{'limit ms':>9}{'ofa':>10}{'fedofa':>10}{'difference':>12}{'ofa CPU s':>11}{'fedofa CPU s':>14}")
    differences, ratios = [], []
    for limit in limits:
        ours, our_seconds = run_fedofa(index, predictor, latency, float(limit), options.seed)
        theirs, their_seconds = run_ofa(finder_of, peer, float(limit) - table.overhead_ms, options)
        differences.append(ours - theirs)
        ratios.append(our_seconds / their_seconds)
        cells = f"{limit:9.2f}{theirs:10.3f}{ours:10.3f}{ours - theirs:12.3f}{their_seconds:11.2f}{our_seconds:14.2f}"
        print(cells, flush=True)
    print(f"\nsearch_least_difference={min(differences):.4f} search_largest_ratio={max(ratios):.4f}")


def run_fedofa(
    index: OperatorIndex, predictor: NetworkPredictor, latency: Latency, limit: float, seed: int
) -> tuple[float, float]:
    """Predicted accuracy and CPU seconds of one search."""
    import pymoo.algorithms.moo.nsga2  # noqa: F401  # loading is no part of a search

    search = DeviceSearch(index, predictor, [latency])
    start = time.process_time()
    found = search.best(Limits((Limit(latency, limit),)), seed)
    return found.accuracy, time.process_time() - start


def run_ofa(finder_of: Any, peer: PeerPredictors, limit: float, options: argparse.Namespace) -> tuple[float, float]:
    """The same of the package's finder."""
    random.seed(options.seed)
    np.random.seed(options.seed)  # the package draws from numpy's global generator
    finder_of.valid_constraint_range = {"latency": [0, float("inf")]}
    finder = finder_of("latency", limit, peer, peer, max_time_budget=options.ofa_generations)
    start = time.process_time()
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        _, best = finder.run_evolution_search()
    return float(best[0]), time.process_time() - start


if __name__ == "__main__":
    main()
