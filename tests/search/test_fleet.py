"""Fleets assigned at once: within every device's limits, as good as trying out every subnet, and clear refusals."""

import itertools
from functools import partial

import numpy as np
import pytest
from cohorts import SPECS

from fedofa.device.cost import AnalyticCostModel, LocalWork
from fedofa.device.latency import Latency, roofline_table
from fedofa.device.memory import InferenceMemory, WorkingSet
from fedofa.device.models import Macs
from fedofa.device.operators import OperatorIndex, SubnetBatch
from fedofa.device.tables import LatencyTable
from fedofa.device.training import BytesUp, PlannedPlaces, RoundCosts, memory_factors, round_factors
from fedofa.finetune.plans import build_plan
from fedofa.search.accuracy import DenseLayer, NetworkPredictor, ZeroCostProxy
from fedofa.search.archive import Archive, build_archive
from fedofa.search.fit import uniform_subnets
from fedofa.search.fleet import Choice, Demand, FleetSearch, Way
from fedofa.search.limits import Limit, Limits
from fedofa.search.pricing import Pricing
from fedofa.search.refine import Beam, refine
from fedofa.supernet.families import build_elastic
from fedofa.supernet.mobilenet_v3 import MobileNetV3Spec
from fedofa.types.device import DeviceProfile
from fedofa.types.errors import ConfigError, InfeasibilityError

INDEX = OperatorIndex.of(build_elastic(SPECS["mobilenet_v3"]))
MADE_UP = {"macs_per_second": 1e9, "bytes_per_second": 1e9, "launch_ms": 0.01, "engine": "x", "source": "made up"}
WORK = LocalWork(num_examples=30, num_samples=60, batch_size=8, wire_bytes=2)
ENDS = INDEX.batch([INDEX.encoding.space.smallest(), INDEX.encoding.space.largest()])


def way(plan="full", *, recompute=False, micro_batch=0, limits=()):
    statistics = "frozen" if micro_batch else "batch"
    plan_of = partial(build_plan, plan, recompute=recompute, micro_batch=micro_batch, statistics=statistics)
    return Way(RoundCosts(PlannedPlaces(INDEX, plan_of)), Limits(tuple(limits)), micro_batch)


PLAIN = way()


def profile(**changes):
    values = {"memory_bytes": 1e12, "macs_per_second": 1e9, "uplink_bytes_per_second": 1e6}
    return DeviceProfile("board", **{**values, "downlink_bytes_per_second": 2e6, **changes})


def random_demands(number, seed=0):
    """Devices with a table each, limited between what the smallest and the largest subnet need."""
    rng = np.random.default_rng(seed)
    plain = roofline_table(INDEX, **MADE_UP)
    demands = []
    for _ in range(number):
        times = {key: ms * float(np.exp(rng.normal(0, 0.7))) for key, ms in plain.milliseconds.items()}
        latency = Latency(INDEX, LatencyTable(plain.family, "x", 1, "made up", times, overhead_ms=0.01))
        factors = round_factors(profile(), WORK)
        features = PLAIN.costs.features(ENDS).matrix()
        between = [
            ends[0] * (ends[1] / ends[0]) ** rng.uniform(0.1, 1.1)
            for ends in (features @ factors.memory_bytes, features @ factors.round_seconds, latency.predict(ENDS))
        ]
        demands.append(Demand(profile(memory_bytes=between[0]), WORK, between[1], between[2], latency))
    return demands


def every_row():
    """All subnets of the space."""
    choices = [range(count) for count in INDEX.encoding.choices]
    return np.unique(INDEX.encoding.normalised(np.array(list(itertools.product(*choices)), np.int16)), axis=0)


def random_predictor(index):
    """An accuracy that no cost explains: a network with random weights."""
    rng = np.random.default_rng(5)
    sizes = (index.encoding.num_features, 16, 1)
    layers = [
        DenseLayer(rng.normal(0, 1, (b, a)).astype(np.float32), rng.normal(0, 1, b).astype(np.float32))
        for a, b in itertools.pairwise(sizes)
    ]
    return NetworkPredictor(index.encoding.space, layers, 60.0)


@pytest.fixture(scope="module")
def predictor():
    return random_predictor(INDEX)


@pytest.fixture(scope="module")
def archive(predictor):
    return build_archive(INDEX, predictor, num_devices=60)


@pytest.fixture(scope="module")
def sparse(predictor):
    """An archive of the subnets with one value an axis, from which only refinement leads to the best ones."""
    rows = INDEX.encoding.rows(list(uniform_subnets(INDEX.encoding.space)))
    accuracies = predictor.predict(SubnetBatch(INDEX, rows))
    order = np.argsort(-accuracies)
    return Archive(INDEX, rows[order], accuracies[order])


@pytest.mark.parametrize("name", sorted(SPECS))
@pytest.mark.parametrize(
    ("plan", "recompute", "micro"), [("full", True, 0), ("last_blocks(2)", False, 3), ("bias", False, 0)]
)
def test_features_times_factors_are_what_the_cost_model_counts(name, plan, recompute, micro):
    index = OperatorIndex.of(build_elastic(SPECS[name]))
    plan_of = partial(build_plan, plan, recompute=recompute, micro_batch=micro, statistics="frozen")
    rows = index.encoding.sample(np.random.default_rng(3), 12)
    features = RoundCosts(PlannedPlaces(index, plan_of)).features(SubnetBatch(index, rows)).matrix()
    device = profile(macs_per_second=3e7, uplink_bytes_per_second=5e3)
    factors = round_factors(device, WORK, micro)
    for row, feature in zip(rows, features, strict=True):
        blocks = index.block_costs(row)
        cost = AnalyticCostModel().cost(blocks, plan_of(blocks), device, WORK)
        assert feature @ factors.memory_bytes == cost.training_bytes
        assert feature @ factors.download_bytes == cost.download_bytes
        assert feature @ factors.upload_bytes == cost.upload_bytes
        assert feature @ factors.compute_seconds == pytest.approx(cost.compute_seconds, rel=1e-12)
        assert feature @ factors.round_seconds == pytest.approx(cost.round_seconds, rel=1e-12)


def test_micro_batches_lessen_the_training_memory_that_is_searched_for():
    features = PLAIN.costs.features(ENDS).matrix()
    whole, micro = features @ memory_factors(WORK), features @ memory_factors(WORK, micro_batch=1)
    assert (micro < whole).all()


def test_every_choice_is_within_its_limits_and_close_to_the_best_of_all_subnets(sparse, predictor):
    demands = random_demands(25)
    everything = SubnetBatch(INDEX, every_row())
    accuracies = predictor.predict(everything)
    features = PLAIN.costs.features(everything).matrix()
    outcomes = FleetSearch(sparse, predictor, [[PLAIN]]).assign(demands)
    short = []
    for demand, outcome in zip(demands, outcomes, strict=True):
        factors = round_factors(demand.profile, WORK)
        fits = (features @ factors.memory_bytes <= demand.profile.memory_bytes) & (
            features @ factors.round_seconds <= demand.round_seconds
        )
        fits &= demand.latency.predict(everything) <= demand.latency_ms
        chosen = (everything.rows == outcome.row).all(axis=1)
        assert fits[chosen].all()
        assert outcome.accuracy == pytest.approx(accuracies[chosen][0], rel=1e-6)
        short.append(accuracies[fits].max() - outcome.accuracy)
    assert min(short) >= -1e-5
    assert np.mean(short) < 0.01 * np.ptp(accuracies)
    assert max(short) < 0.05 * np.ptp(accuracies)


def test_refinement_betters_what_the_archive_has(sparse, predictor):
    demands = random_demands(25, seed=1)
    plain = [item.accuracy for item in FleetSearch(sparse, predictor, [[PLAIN]], widths=()).assign(demands)]
    refined = [item.accuracy for item in FleetSearch(sparse, predictor, [[PLAIN]]).assign(demands)]
    assert all(after >= before - 1e-5 for before, after in zip(plain, refined, strict=True))
    assert sum(refined) > sum(plain)


def test_a_blocks_kernel_and_expand_ratio_are_one_group_and_other_columns_stand_alone():
    names = [{INDEX.encoding.names[column].split("[")[0] for column in group} for group in INDEX.column_groups]
    assert sorted(itertools.chain(*INDEX.column_groups)) == list(range(INDEX.encoding.num_columns))
    assert {"kernel", "expand"} in names
    assert all(group == {"kernel", "expand"} or len(group) == 1 for group in names)


def test_depths_and_the_resolution_make_a_subnets_form():
    names = {INDEX.encoding.names[column].split("[")[0] for column in INDEX.form_columns}
    assert names == {"depth", "resolution"}


def test_going_on_from_several_forms_reaches_better_subnets_than_from_the_best_one():
    index = OperatorIndex.of(build_elastic(MobileNetV3Spec(resolutions=(160, 192, 224))))
    macs, predictor = Macs(index), random_predictor(index)
    limits = np.geomspace(
        *macs.predict(index.batch([index.encoding.space.smallest(), index.encoding.space.largest()])), 18
    )
    limits, every = limits[1:-1], np.arange(16)
    rows = np.repeat(index.encoding.rows([index.encoding.space.smallest()]), 16, axis=0)

    pricing = Pricing(
        features=lambda batch: macs.predict(batch)[:, None],
        factors=1 / limits[:, None, None],
        offsets=np.full((16, 1), -1.0),
        tables=np.zeros((16, len(index.operators) + 1)),
        timed=0,
    )

    def refined(*widths):
        found, accuracies = refine(index, predictor, rows, every, pricing, widths)
        assert (macs.predict(SubnetBatch(index, found)) <= limits).all()
        assert accuracies == pytest.approx(predictor.predict(SubnetBatch(index, found)), rel=1e-5)
        return accuracies

    narrow, wide = refined(1, 1, 1, 1), refined(4, 4, 1, 1)
    assert wide.mean() > narrow.mean()


@pytest.mark.parametrize(
    "changes",
    [
        {"resolutions": (160,), "kernels": (3,), "expands": (4,)},
        {"resolutions": (160,), "depths": (2,)},
        {"resolutions": (160, 192), "depths": (2,), "kernels": (3,), "expands": (4,)},
    ],
)
def test_spaces_with_few_axes_are_refined_to_their_best_subnet(changes):
    index = OperatorIndex.of(build_elastic(MobileNetV3Spec(**changes)))
    predictor, rows = ZeroCostProxy(index), index.encoding.rows([index.encoding.space.smallest()])
    every = SubnetBatch(index, index.encoding.sample(np.random.default_rng(0), 2000))
    most = float(np.quantile(Macs(index).predict(every), 0.7))
    pricing = Pricing(
        features=lambda batch: Macs(index).predict(batch)[:, None],
        factors=np.full((1, 1, 1), 1 / most),
        offsets=np.full((1, 1), -1.0),
        tables=np.zeros((1, len(index.operators) + 1)),
        timed=0,
    )
    found, accuracies = refine(index, predictor, rows, np.zeros(1, np.int64), pricing, (5, 5, 5, 5, 1, 1))
    within = Macs(index).predict(every) <= most
    assert Macs(index).predict(SubnetBatch(index, found))[0] <= most
    assert accuracies[0] >= predictor.predict(every)[within].max() - 1e-6


def test_a_beam_keeps_the_best_of_each_form_and_of_each_device_only_so_many():
    rows = np.array([[0, 1], [0, 2], [1, 1], [2, 0], [0, 0]], np.int16)
    beam = Beam(rows, np.array([1.0, 3.0, 2.0, 0.5, 9.0]), np.array([0, 0, 0, 0, 1]), np.zeros((5, 1)))
    assert beam.best((0,)).tolist() == [1, 2, 3, 4]
    assert beam.best((0,), 2).tolist() == [1, 2, 4]
    assert beam.best((), 1).tolist() == [1, 4]
    assert beam.best((0, 1), 3).tolist() == [1, 2, 0, 4]


def test_a_devices_choice_does_not_depend_on_the_rest_of_the_fleet(archive, predictor):
    demands = random_demands(12, seed=2)
    search = FleetSearch(archive, predictor, [[PLAIN]])
    together = search.assign(demands)
    for demand, choice in zip(demands, together, strict=True):
        (alone,) = search.assign([demand])
        assert (alone.row == choice.row).all()
        assert alone.binding == choice.binding


def test_a_device_without_limits_gets_the_best_subnet_and_nothing_binds(archive, predictor):
    (choice,) = FleetSearch(archive, predictor, [[PLAIN]]).assign([Demand(profile(), WORK, 1e12)])
    assert choice.binding == "none"
    assert choice.accuracy >= archive.accuracies[0] - 1e-6


def test_a_device_that_nothing_fits_is_told_why_and_the_others_are_served(archive, predictor):
    demands = [
        Demand(profile(), WORK, 1e12),
        Demand(profile(memory_bytes=1000.0), WORK, 1e12),
        Demand(profile(), WORK, 1e-3),
        Demand(profile(macs_per_second=1e6), WORK, 1e12, latency_ms=1e-3),
    ]
    served, *refused = FleetSearch(archive, predictor, [[PLAIN]]).assign(demands)
    assert isinstance(served, Choice)
    for error, name, unit in zip(refused, ("memory", "round time", "latency"), ("bytes", "s", "ms"), strict=True):
        assert isinstance(error, InfeasibilityError)
        assert f"{name} is exceeded" in str(error) and f" {unit}, may take" in str(error)
        INDEX.encoding.space.check(error.nearest)
    assert "latency" not in str(refused[0])


def test_without_a_table_a_forward_pass_takes_its_macs_at_the_stated_rate(archive, predictor):
    demand = Demand(profile(macs_per_second=1e6), WORK, 1e12, latency_ms=40.0)
    (choice,) = FleetSearch(archive, predictor, [[PLAIN]]).assign([demand])
    macs = Macs(INDEX).predict(SubnetBatch(INDEX, choice.row[None]))[0]
    assert macs / 1e6 * 1e3 <= 40.0 < Macs(INDEX).predict(ENDS)[1] / 1e6 * 1e3
    assert choice.binding == "latency"


def test_limits_that_all_devices_share_hold_and_are_named(archive, predictor):
    model = BytesUp(PLAIN.costs.plans)
    low = float(model.predict(ENDS)[0])
    limited = way(limits=[Limit(model, 1.3 * low)])
    (choice,) = FleetSearch(archive, predictor, [[limited]]).assign([Demand(profile(), WORK, 1e12)])
    assert model.predict(SubnetBatch(INDEX, choice.row[None]))[0] <= 1.3 * low
    assert choice.binding == "bytes_up"
    impossible = way(limits=[Limit(model, low / 2)])
    (error,) = FleetSearch(archive, predictor, [[impossible]]).assign([Demand(profile(), WORK, 1e12)])
    assert isinstance(error, InfeasibilityError) and "bytes_up is exceeded by" in str(error)


@pytest.mark.parametrize("name", sorted(SPECS))
@pytest.mark.parametrize("model_of", [lambda index: WorkingSet(index, 8), InferenceMemory, Macs])
def test_whether_a_limit_is_a_sum_or_a_peak_no_random_subnet_within_it_is_much_better(name, model_of):
    index = OperatorIndex.of(build_elastic(SPECS[name]))
    proxy, model = ZeroCostProxy(index), model_of(index)
    batch = SubnetBatch(index, index.encoding.sample(np.random.default_rng(6), 3000))
    costs, accuracies = model.predict(batch), proxy.predict(batch)
    made = build_archive(index, proxy, num_devices=40)
    plans = PlannedPlaces(index, partial(build_plan, "full"))
    for most in np.quantile(costs, [0.2, 0.5, 0.8]):
        limited = Way(RoundCosts(plans), Limits((Limit(model, float(most)),)))
        (choice,) = FleetSearch(made, proxy, [[limited]]).assign([Demand(profile(), WORK, 1e12)])
        assert model.predict(SubnetBatch(index, choice.row[None]))[0] <= most
        assert choice.accuracy >= accuracies[costs <= most].max() - 0.02 * np.ptp(accuracies)


def test_recomputation_and_later_plans_serve_only_at_need(archive, predictor):
    plain, again, head = PLAIN, way(recompute=True), way("head")
    needs = [
        np.array([item.costs.features(ENDS).matrix()[:1] @ round_factors(profile(), WORK).memory_bytes])[0, 0]
        for item in (plain, again, head)
    ]
    assert needs[0] > needs[1] > needs[2]
    budgets = [2e9, (needs[0] + needs[1]) / 2, (needs[1] + needs[2]) / 2]
    demands = [Demand(profile(memory_bytes=budget), WORK, 1e12) for budget in budgets]
    choices = FleetSearch(archive, predictor, [[plain, again], [head]]).assign(demands)
    assert [choice.way for choice in choices] == [(0, 0), (0, 1), (1, 0)]


def test_the_archive_covers_the_whole_range_of_costs():
    archive = build_archive(INDEX, ZeroCostProxy(INDEX), num_devices=40)
    macs = Macs(INDEX).predict(archive.batch)
    assert [macs.min(), macs.max()] == list(Macs(INDEX).predict(ENDS))
    assert (np.diff(archive.accuracies) <= 0).all()
    assert len(np.unique(archive.rows, axis=0)) == len(archive)
    pairs = itertools.product(range(5), repeat=2)
    differing = archive.differing(np.arange(5))
    assert all(differing[a, b] == (archive.rows[a] != archive.rows[b]).sum() for a, b in pairs)


def test_an_archive_is_the_same_every_time(archive, predictor):
    again = build_archive(INDEX, predictor, num_devices=60)
    assert (again.rows == archive.rows).all()


def test_bad_input_is_one_clear_error(predictor):
    with pytest.raises(ConfigError, match="expected at least 8"):
        build_archive(INDEX, predictor, num_devices=2)
    for wrong in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="latency_ms: expected a positive finite number"):
            Demand(profile(), WORK, 1.0, wrong)
