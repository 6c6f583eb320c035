"""Searches against trying out every subnet of a small space, impossible limits, and the published space."""

import itertools
from functools import partial

import numpy as np
import pytest
from cohorts import SPECS

from fedofa.device.cost import LocalWork
from fedofa.device.latency import Latency, roofline_table
from fedofa.device.memory import InferenceMemory
from fedofa.device.models import Macs, Parameters, SubnetCostModel
from fedofa.device.operators import OperatorIndex, SubnetBatch
from fedofa.device.training import BytesUp, PlannedPlaces
from fedofa.finetune.planned_memory import PlannedTrainingMemory
from fedofa.finetune.plans import build_plan
from fedofa.search.accuracy import DenseLayer, NetworkPredictor, ZeroCostProxy
from fedofa.search.limits import Limit, Limits
from fedofa.search.specialise import DeviceSearch
from fedofa.supernet.families import build_elastic
from fedofa.supernet.mobilenet_v3 import MobileNetV3Spec
from fedofa.types.errors import ConfigError, InfeasibilityError

pytest.importorskip("pymoo", reason="pymoo is missing; `make test` installs it")

INDEX = OperatorIndex.of(build_elastic(SPECS["mobilenet_v3"]))
MADE_UP = {"macs_per_second": 1e9, "bytes_per_second": 1e9, "launch_ms": 0.01, "engine": "x", "source": "made up"}


def every_row(index):
    """All subnets of a small space."""
    choices = [range(count) for count in index.encoding.choices]
    return np.unique(index.encoding.normalised(np.array(list(itertools.product(*choices)), np.int16)), axis=0)


def random_predictor(index, seed, hidden=16):
    """An accuracy that no cost explains: a network with random weights."""
    rng, width = np.random.default_rng(seed), index.encoding.num_features
    sizes = (width, hidden, 1)
    layers = [
        DenseLayer(rng.normal(0, 1, (b, a)).astype(np.float32), rng.normal(0, 1, b).astype(np.float32))
        for a, b in itertools.pairwise(sizes)
    ]
    return NetworkPredictor(index.encoding.space, layers, 60.0)


@pytest.fixture(scope="module")
def everything():
    rows = every_row(INDEX)
    assert len(rows) == INDEX.encoding.space.count() * 2  # resolutions
    return SubnetBatch(INDEX, rows)


@pytest.fixture(scope="module")
def models():
    plans = PlannedPlaces(INDEX, partial(build_plan, "full"))
    return {
        model.setting: model
        for model in (
            Latency(INDEX, roofline_table(INDEX, **MADE_UP)),
            Macs(INDEX),
            Parameters(INDEX),
            PlannedTrainingMemory(plans, LocalWork(20, 20, 4)),
            BytesUp(plans),
        )
    }


def limits_at(models, batch, **quantiles):
    """Limits at these quantiles of what the subnets of a batch cost."""
    costs = {name: np.quantile(models[name].predict(batch), at) for name, at in quantiles.items()}
    return Limits(tuple(Limit(models[name], float(most)) for name, most in costs.items()))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "quantiles",
    [{"latency_ms": 0.3}, {"latency_ms": 0.05}, {"latency_ms": 0.5, "training_memory_mb": 0.4, "bytes_up": 0.3}, {}],
    ids=lambda quantiles: "+".join(quantiles) or "none",
)
def test_the_best_subnet_is_the_best_of_all(everything, models, seed, quantiles):
    predictor, limits = random_predictor(INDEX, seed), limits_at(models, everything, **quantiles)
    allowed = limits.worst(everything) <= 0
    best = predictor.predict(everything)[allowed].max()
    found = DeviceSearch(INDEX, predictor, list(models.values())).best(limits, seed)
    assert found.accuracy == pytest.approx(best, abs=1e-4)
    batch = INDEX.batch([found.subnet])
    assert limits.worst(batch)[0] <= 0
    for name, quantity in found.costs.items():
        assert quantity.value == models[name].predict(batch)[0] and quantity.unit == models[name].unit


def test_the_pareto_set_is_close_to_that_of_all(everything, models):
    predictor = random_predictor(INDEX, 0)
    limits = limits_at(models, everything, latency_ms=0.7)
    front = DeviceSearch(INDEX, predictor, [models["latency_ms"]]).pareto(limits)
    accuracies = [found.accuracy for found in front]
    latencies = [found.costs["latency_ms"].value for found in front]
    assert len(front) > 5
    assert accuracies == sorted(accuracies, reverse=True) and latencies == sorted(latencies, reverse=True)
    all_accuracies, all_latencies = predictor.predict(everything), models["latency_ms"].predict(everything)
    spread = all_accuracies.std()
    for found in front:
        reachable = all_accuracies[all_latencies <= found.costs["latency_ms"].value].max()
        assert found.accuracy >= reachable - 0.25 * spread
    assert front[0].accuracy == pytest.approx(all_accuracies[limits.worst(everything) <= 0].max(), abs=1e-4)


def test_the_same_seed_finds_the_same(models, everything):
    limits = limits_at(models, everything, latency_ms=0.3)
    search = DeviceSearch(INDEX, random_predictor(INDEX, 1), [models["latency_ms"]])
    assert search.pareto(limits, 3) == search.pareto(limits, 3)


@pytest.mark.parametrize("name", ["latency_ms", "parameters", "training_memory_mb"])
def test_an_impossible_limit_names_itself_and_the_nearest(everything, models, name):
    costs = models[name].predict(everything)
    limits = Limits((Limit(models[name], float(costs.min()) / 1.25), Limit(models["macs"], 1e12)))
    with pytest.raises(InfeasibilityError, match=f"{name} is exceeded by 25.0%.*it needs.*. Raise what") as caught:
        DeviceSearch(INDEX, ZeroCostProxy(INDEX), list(models.values())).best(limits)
    assert "macs" not in str(caught.value)
    nearest = models[name].predict(INDEX.batch([caught.value.nearest]))[0]
    assert nearest == pytest.approx(costs.min())


class CountingCost(SubnetCostModel):
    """Counts the subnets that another model prices."""

    def __init__(self, model):
        super().__init__(model.index)
        self.model, self.setting, self.unit, self.priced = model, model.setting, model.unit, 0

    def predict(self, batch):
        self.priced += len(batch)
        return self.model.predict(batch)


def test_an_impossible_limit_is_found_out_with_fewer_prices_than_a_search(everything, models):
    costs = models["latency_ms"].predict(everything)

    counting = CountingCost(models["latency_ms"])
    search = DeviceSearch(INDEX, ZeroCostProxy(INDEX), [counting])
    search.best(Limits((Limit(counting, float(np.quantile(costs, 0.3))),)))
    possible, counting.priced = counting.priced, 0
    with pytest.raises(InfeasibilityError):
        search.best(Limits((Limit(counting, float(costs.min()) / 2),)))
    assert 0 < counting.priced < possible / 4


def test_a_limit_that_one_subnet_alone_meets_is_met(everything, models):
    costs = models["latency_ms"].predict(everything)
    limits = Limits((Limit(models["latency_ms"], float(costs.min()) * (1 + 1e-9)),))
    found = DeviceSearch(INDEX, ZeroCostProxy(INDEX), [models["latency_ms"]]).best(limits)
    assert found.costs["latency_ms"].value == pytest.approx(costs.min())


@pytest.mark.parametrize("most", [-1.0, 0.0, float("nan"), float("inf")])
def test_limits_that_are_none_are_refused(models, most):
    with pytest.raises(ConfigError, match="latency_ms: expected a positive finite number of ms"):
        Limit(models["latency_ms"], most)


def test_populations_that_are_none_are_refused(models):
    with pytest.raises(ConfigError, match="generations"):
        DeviceSearch(INDEX, ZeroCostProxy(INDEX), [models["macs"]], generations=0)


def test_the_published_space_is_searched_with_several_limits():
    index = OperatorIndex.of(build_elastic(MobileNetV3Spec()))
    latency = Latency(index, roofline_table(index, **MADE_UP))
    memory = InferenceMemory(index)
    limits = Limits((Limit(latency, 250.0), Limit(memory, 24.0)))
    predictor = random_predictor(index, 0, hidden=64)
    found = DeviceSearch(index, predictor, [latency, memory], population=64, generations=15).best(limits)
    index.encoding.space.check(found.subnet)
    assert found.costs["latency_ms"].value <= 250 and found.costs["inference_memory_mb"].value <= 24
    rows = index.encoding.sample(np.random.default_rng(0), 5000)
    batch = SubnetBatch(index, rows)
    assert found.accuracy > predictor.predict(batch)[limits.worst(batch) <= 0].max()
