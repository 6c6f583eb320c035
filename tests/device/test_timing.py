"""Readings on a clock that the test turns, corrections of tables that are known, and engines that run everything."""

import numpy as np
import pytest
from cohorts import LITE_SPEC, SPECS

from fedofa.device import timing as timing_module
from fedofa.device.correction import Fit, corrected_times, rank_correlation
from fedofa.device.engines import build_engine
from fedofa.device.operators import OperatorIndex, SubnetBatch
from fedofa.device.timing import Measured, Timing, measure, read, refuse_unsteady, without_drift
from fedofa.supernet.families import build_elastic
from fedofa.types.errors import ConfigError, ProfileError

INDEX = OperatorIndex.of(build_elastic(SPECS["mobilenet_v3"]))


class Clock:
    """Nanoseconds that only runs move."""

    def __init__(self, monkeypatch):
        self.now = 0
        monkeypatch.setitem(timing_module.CLOCKS, "wall", lambda: self.now)

    def run(self, *milliseconds):
        """A run that takes these times, over and over."""
        calls = iter(range(10**9))

        def run():
            self.now += int(milliseconds[next(calls) % len(milliseconds)] * 1e6)

        return run


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_a_reading_is_the_shortest_run_after_one_to_warm_up(clock):
    assert read(clock.run(1, 5, 4, 7, 6), Timing(burst=4)) == 4


def test_steady_things_are_read_in_so_many_passes(clock):
    seen = list(measure({"a": clock.run(2), "b": clock.run(3)}, Timing(passes=4)))
    assert len(seen) == 4
    assert seen[-1] == {"a": (2,) * 4, "b": (3,) * 4}
    assert list(measure({"a": clock.run(2)}, Timing(passes=4), {"a": (2, 2, 2)})) == [{"a": (2,) * 4}]


def test_unsteady_things_are_read_again_until_they_settle(clock):
    settles = iter([1, 9, 5, *[2] * 100])
    timing = Timing(passes=3, burst=1, more_passes=30)

    def run():
        clock.now += 1_000_000 * (next(settles) if warm[0] else 0)
        warm[0] = not warm[0]

    warm = [False]
    last = without_drift(list(measure({"steady": clock.run(4), "settles": run}, timing))[-1])
    assert len(last["steady"].readings) == 3
    assert len(last["settles"].readings) > 3 and last["settles"].median == pytest.approx(2)
    refuse_unsteady(last, timing.max_spread)


def test_the_drift_of_a_computers_speed_is_taken_out(clock):
    """Of a machine whose speed goes up and down by 10 % while 300 things are read."""
    rng = np.random.default_rng(0)
    times = {str(number): rng.uniform(1, 9) for number in range(300)}

    def run_of(milliseconds):
        def run():
            clock.now += int(milliseconds * (1 + 0.1 * np.sin(clock.now / 1e9)) * rng.normal(1, 0.005) * 1e6)

        return run

    readings = list(measure({name: run_of(time) for name, time in times.items()}, Timing(burst=1, more_passes=0)))[-1]
    measured = without_drift(readings)
    plain = np.array([np.median(readings[name]) / time for name, time in times.items()])
    found = np.array([measured[name].median / time for name, time in times.items()])
    assert np.std(found) < 0.01 < 0.025 < np.std(plain)
    assert np.median(found / plain) == pytest.approx(1, abs=0.1)


def test_noise_of_few_things_is_no_drift():
    noisy = {"a": (1.0, 2.0, 3.0, 4.0, 5.0), "b": (1.0, 2.0, 3.0, 4.0, 5.0)}
    assert without_drift(noisy)["a"].spread == pytest.approx(Measured(noisy["a"]).spread)


def test_noise_is_refused_with_its_spread():
    measured = {"calm": Measured((1.0, 1.0, 1.0)), "conv": Measured((1.0, 2.0, 3.0, 4.0, 5.0))}
    with pytest.raises(ProfileError, match=r"1 of 2 readings.*'conv'.*from 1.000 to 5.000 ms, a spread of 67%.*15%"):
        refuse_unsteady(measured, 0.15)


@pytest.mark.parametrize(
    ("settings", "name"), [({"clock": "sun"}, "clock"), ({"passes": 2}, "passes"), ({"max_spread": 0.0}, "max_spread")]
)
def test_impossible_timings_are_refused(settings, name):
    with pytest.raises(ConfigError, match=name):
        Timing(**settings)


def test_rank_correlation_is_spearmans():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, 40).astype(float), rng.integers(0, 9, 40).astype(float)
    assert rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b)[0], abs=1e-12)
    assert rank_correlation(a, np.ones(40)) == 0
    assert Fit.of(np.array([1.0, 2.2]), np.array([1.0, 2.0])) == Fit(pytest.approx(0.05), pytest.approx(1.0))


def test_a_network_that_costs_more_than_its_operators_is_learned():
    rng = np.random.default_rng(0)
    macs = INDEX.operator_table(lambda cost: cost.macs)
    alone = macs * 1e-5 * rng.uniform(0.8, 1.2, len(macs)) + 0.05
    inside = 1.3 * alone + 0.02 + 1e-6 * macs
    train, test = (SubnetBatch(INDEX, INDEX.encoding.sample(rng, count)) for count in (24, 40))
    noise = rng.normal(1.0, 0.005, 24)
    times, overhead = corrected_times(INDEX, alone, train, (train.total(inside) + 0.4) * noise)
    fit = Fit.of(test.total(times) + overhead, test.total(inside) + 0.4)
    assert fit.mape < 0.01 < 0.2 < Fit.of(test.total(alone), test.total(inside) + 0.4).mape
    assert fit.rank_correlation > 0.99
    assert (times >= 0).all() and overhead >= 0


@pytest.mark.parametrize("name", ["torch", "onnxruntime"])
@pytest.mark.parametrize("family", [*SPECS, "lite"])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_engines_run_every_operator_and_whole_networks(name, family, norm):
    if name == "onnxruntime":
        pytest.importorskip("onnxruntime", reason="onnxruntime is missing; `make test` installs it")
        pytest.importorskip("onnx", reason="onnx is missing; `make test` installs it")
    spec = {**SPECS, "lite": LITE_SPEC}[family]
    spec = type(spec).from_json({**spec.to_json(), "norm": norm})
    index, engine = OperatorIndex.of(build_elastic(spec)), build_engine(name, 1)
    kinds = {operator.key.split()[0] for operator in index.operators}
    assert engine.name.startswith(name)
    for operator in index.operators[:: max(len(index.operators) // 12, 1)]:
        engine.prepare([operator])()
    for row in index.encoding.sample(np.random.default_rng(0), 2):
        (numbers,) = index.look_up(row[None])
        result = engine.prepare([index.operators[number] for number in numbers if number >= 0])()
        assert {"conv", "linear"} <= kinds
        assert np.asarray(result).reshape(-1).shape == (5,)


def test_unknown_engines_and_threads_are_refused():
    with pytest.raises(ConfigError, match="expected one of .*'torch', 'onnxruntime'.*found 'tflite'"):
        build_engine("tflite", 1)
    with pytest.raises(ConfigError, match="threads"):
        build_engine("torch", 0)
