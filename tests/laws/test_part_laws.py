"""The laws of folding for deltas of parts of weights and of low rank, alone and mixed with dense ones."""

from dataclasses import replace

import numpy as np
import pytest
from cohorts import SPECS, build_supernet, example_counts, make_delta, random_delta, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from fedofa.aggregation.fold import FoldSums
from fedofa.aggregation.server_optimisers import Adaptive, Momentum, Plain
from fedofa.types.delta import LowRank
from fedofa.types.errors import FoldError
from fedofa.types.plan import FineTunePlan

SUPERNETS = {family: build_supernet(spec=spec) for family, spec in SPECS.items()}
STATES = {family: supernet.state() for family, supernet in SUPERNETS.items()}
every_family = pytest.mark.parametrize("family", SUPERNETS)
OPTIMISERS = (Plain(), Momentum(), Adaptive(), Adaptive(yogi=True))
laws = settings(max_examples=12, deadline=None)
counts_of = st.lists(example_counts, min_size=1, max_size=5)


def fold(family, deltas, optimiser=None):
    sums = FoldSums(SUPERNETS[family].slice_map)
    for delta in deltas:
        sums.add(delta)
    return sums.finish(STATES[family], optimiser or Plain())


def is_matrix(item) -> bool:
    return len(item.shape) in (2, 4) and item.shape[1] > 1 and int(np.prod(item.shape)) == item.shape[0] * item.shape[1]


def random_part_delta(supernet, subnet, rng, *, num_examples=1):
    """Every weight whole, in a leading part, by factors, or not at all."""
    slices = supernet.slice_map(subnet)
    weights, low_rank = {}, {}
    for item in slices:
        kind = rng.integers(4)
        if item.role == "weight" and kind == 0 and is_matrix(item):
            rank = min(2, *item.shape[:2])
            left, right = (
                rng.standard_normal(s).astype(np.float32) for s in ((item.shape[0], rank), (rank, item.shape[1]))
            )
            low_rank[item.name] = LowRank(left, right)
        elif item.role == "weight" and kind <= 1:
            plan = FineTunePlan("p", (item.name,), fractions=((item.name, rng.uniform(0.05, 1.0)),))
            weights[item.name] = rng.standard_normal(plan.part_shape(item.name, item.shape)).astype(np.float32)
        elif item.role != "statistic" and kind == 2:
            weights[item.name] = rng.standard_normal(item.shape).astype(np.float32)
    return replace(make_delta(subnet, weights, num_examples=num_examples), low_rank=low_rank)


def cohort(family, seed, counts):
    rng, supernet = np.random.default_rng(seed), SUPERNETS[family]
    return [random_part_delta(supernet, supernet.space.sample(rng), rng, num_examples=count) for count in counts]


def dense(family, delta, name):
    """A delta's change of one tensor and which coordinates it concerns, both in the subnet's shape, float64."""
    shape = SUPERNETS[family].slice_map(delta.subnet)[name].shape
    change, covered = np.zeros(shape), np.zeros(shape, bool)
    if name in delta.low_rank:
        pair = delta.low_rank[name]
        return (pair.left.astype(np.float64) @ pair.right.astype(np.float64)).reshape(shape), np.ones(shape, bool)
    if name in delta.weights:
        part = tuple(slice(size) for size in delta.weights[name].shape)
        change[part], covered[part] = delta.weights[name], True
    return change, covered


def zeros_of(delta):
    weights = {name: np.zeros_like(values) for name, values in delta.weights.items()}
    pairs = {name: LowRank(np.zeros_like(pair.left), pair.right) for name, pair in delta.low_rank.items()}
    return replace(delta, weights=weights, low_rank=pairs)


@every_family
@laws
@given(seeds, counts_of, st.sampled_from(OPTIMISERS))
def test_law_1_zero_deltas_leave_every_shared_weight_bit_identical(family, seed, counts, optimiser):
    after, _ = fold(family, [zeros_of(delta) for delta in cohort(family, seed, counts)], optimiser)
    for name, tensor in STATES[family].tensors.items():
        assert tensor.tobytes() == after.tensors[name].tobytes()


@every_family
@laws
@given(seeds, example_counts)
def test_law_2_put_get_for_one_client(family, seed, count):
    (delta,) = cohort(family, seed, [count])
    after, _ = fold(family, [delta])
    slices = SUPERNETS[family].slice_map(delta.subnet)
    before, got = slices.extract(STATES[family].tensors), slices.extract(after.tensors)
    for name in {**delta.weights, **delta.low_rank}:
        change, _ = dense(family, delta, name)
        np.testing.assert_allclose(got[name], before[name] + change, atol=1e-5 * max(1, np.abs(change).max()))
    for name in set(slices.trainable) - {*delta.weights, *delta.low_rank}:
        assert got[name].tobytes() == before[name].tobytes()


@every_family
@laws
@given(seeds, counts_of)
def test_law_3_the_fold_is_the_mean_over_who_trained_an_entry(family, seed, counts):
    """Against dense sums; of low rank the mean of products. Depthwise kernels are compared in `test_law_2`."""
    deltas = cohort(family, seed, counts)
    after, report = fold(family, deltas)
    for name, tensor in STATES[family].tensors.items():
        if ".depthwise.conv" in name:
            continue
        total, weight = np.zeros(tensor.shape), np.zeros(tensor.shape)
        for delta in deltas:
            if name in delta.weights or name in delta.low_rank:
                item = SUPERNETS[family].slice_map(delta.subnet)[name]
                change, covered = dense(family, delta, name)
                total += delta.num_examples * item.lift(change, STATES[family].tensors)
                weight += delta.num_examples * item.lift(covered, STATES[family].tensors)
        np.testing.assert_allclose(after.tensors[name] - tensor, total / np.maximum(weight, 1), atol=2e-6)
        assert after.tensors[name][weight == 0].tobytes() == tensor[weight == 0].tobytes()
        assert report.covered_fraction.get(name, 0.0) == pytest.approx((weight > 0).mean())


@pytest.mark.parametrize("family", ["mobilenet_v3", "proxyless"])
@laws
@given(seeds, example_counts, example_counts)
def test_law_3_kernels_that_train_in_part_are_solved_channel_by_channel(family, seed, some, others):
    """A client with the leading channels and one with all: on the leading ones the two, on the rest the one alone."""
    rng, supernet = np.random.default_rng(seed), SUPERNETS[family]
    name, first, second = "stages.2.0.depthwise.conv.weight", supernet.space.sample(rng), supernet.space.sample(rng)
    whole = [random_delta(supernet, c, rng, num_examples=n, names=[name]) for c, n in ((first, some), (second, others))]
    count = max(1, len(whole[0].weights[name]) // 2)
    part = replace(whole[0], weights={name: whole[0].weights[name][:count]})
    both, alone = fold(family, whole)[0].tensors[name], fold(family, whole[1:])[0].tensors[name]
    found = fold(family, [part, whole[1]])[0].tensors[name]
    order = STATES[family].ordering["stages.2.0.mid"][:count]
    mine = np.zeros(len(found), bool)
    mine[order] = True
    np.testing.assert_allclose(found[mine], both[mine], atol=1e-6)
    np.testing.assert_allclose(found[~mine], alone[~mine], atol=1e-6)


@every_family
@laws
@given(seeds, counts_of)
def test_law_4_a_part_of_everything_is_dense_and_factors_are_their_product(family, seed, counts):
    supernet = SUPERNETS[family]
    rng, largest = np.random.default_rng(seed), supernet.space.largest()
    deltas = [random_part_delta(supernet, largest, rng, num_examples=count) for count in counts]
    whole = [random_delta(supernet, largest, rng, num_examples=count) for count in counts]
    names = [item.name for item in supernet.slice_map(largest) if item.role == "weight"]
    plan = FineTunePlan("p", tuple(names), fractions=tuple((name, 1.0) for name in names))
    for delta in whole:
        assert all(plan.part_shape(name, delta.weights[name].shape) == delta.weights[name].shape for name in names)
    products = [
        replace(
            delta,
            weights={**delta.weights, **{name: dense(family, delta, name)[0] for name in delta.low_rank}},
            low_rank={},
        )
        for delta in deltas
    ]
    assert fold(family, deltas)[0].digest() == fold(family, products)[0].digest()


@every_family
@laws
@given(seeds, st.lists(example_counts, min_size=2, max_size=6), st.randoms(use_true_random=False))
def test_law_5_any_order_and_any_grouping_give_the_same_bits(family, seed, counts, random):
    deltas = cohort(family, seed, counts)
    expected, report = fold(family, deltas)
    parts = [FoldSums(SUPERNETS[family].slice_map) for _ in range(3)]
    for delta in random.sample(deltas, len(deltas)):
        random.choice(parts).add(delta)
    total = FoldSums(SUPERNETS[family].slice_map)
    for part in random.sample(parts, 3):
        total.merge(part)
    got, other = total.finish(STATES[family], Plain())
    assert got.digest() == expected.digest()
    assert other == report


def test_law_5_a_shape_that_is_no_leading_part_is_refused_and_nothing_is_added():
    supernet = SUPERNETS["mobilenet_v3"]
    subnet, sums = supernet.space.largest(), FoldSums(supernet.slice_map)
    fine = random_delta(supernet, subnet, np.random.default_rng(0))
    sums.add(fine)
    expected, _ = sums.finish(STATES["mobilenet_v3"], Plain())
    name = "final.conv.weight"
    out, inputs = fine.weights[name].shape[:2]
    for shape in ((out, inputs + 1, 1, 1), (out, 0, 1, 1), (out, inputs), (out, 1, 3, 3)):
        wrong = make_delta(subnet, {"classifier.bias": np.ones(5, np.float32), name: np.ones(shape, np.float32)})
        with pytest.raises(FoldError, match=r"'final\.conv\.weight': expected a leading part of"):
            sums.add(wrong)
    assert sums.finish(STATES["mobilenet_v3"], Plain())[0].digest() == expected.digest()


@every_family
@laws
@given(seeds, st.integers(0, 2**31))
def test_law_6_another_ordering_moves_a_part_with_its_channels(family, seed, other):
    """Put-get holds under an ordering of its own: the leading channels are the ordering's first."""
    supernet = build_supernet(other % 7, spec=SPECS[family])
    rng = np.random.default_rng(seed)
    delta = random_part_delta(supernet, supernet.space.largest(), rng)
    sums = FoldSums(supernet.slice_map)
    sums.add(delta)
    state = supernet.state()
    after, _ = sums.finish(state, Plain())
    slices = supernet.slice_map(delta.subnet)
    before, got = slices.extract(state.tensors), slices.extract(after.tensors)
    for name, values in delta.weights.items():
        part = tuple(slice(size) for size in values.shape)
        np.testing.assert_allclose(got[name][part], before[name][part] + values, atol=1e-5)
