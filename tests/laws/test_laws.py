"""The laws of folding, as properties over mixed cohorts: kernels 3, 5 and 7, matrices off the identity, widths."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from cohorts import SPECS, build_supernet, example_counts, make_delta, random_delta, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from fedofa.aggregation.fold import FoldSums
from fedofa.aggregation.server_optimisers import Adaptive, Momentum, Plain
from fedofa.supernet.elastic import ElasticSupernet
from fedofa.supernet.sums import MAX_DELTAS, MAX_TERM
from fedofa.types.errors import FoldError
from fedofa.types.space import SearchSpace
from fedofa.types.state import SharedState


class Case(NamedTuple):
    supernet: ElasticSupernet
    state: SharedState
    space: SearchSpace


CASES = {
    family: Case(supernet, supernet.state(), supernet.space)
    for family, supernet in ((family, build_supernet(spec=spec)) for family, spec in SPECS.items())
}
SUPERNET, STATE, SPACE = CASES["mobilenet_v3"]
every_family = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
with_kernels = pytest.mark.parametrize("case", [CASES["mobilenet_v3"], CASES["proxyless"]], ids=["v3", "proxyless"])
OPTIMISERS = (Plain(), Momentum(), Adaptive(), Adaptive(yogi=True))
laws = settings(max_examples=25, deadline=None)


def fold(case, deltas, state=None, optimiser=None):
    sums = FoldSums(case.supernet.slice_map)
    for delta in deltas:
        sums.add(delta)
    return sums.finish(state or case.state, optimiser or Plain())


def cohort(case, seed, counts):
    rng = np.random.default_rng(seed)
    return [
        random_delta(case.supernet, case.space.sample(rng), rng, client=f"c{i}", num_examples=count)
        for i, count in enumerate(counts)
    ]


def assert_bit_identical(a, b):
    assert a.dtype == b.dtype
    assert a.tobytes() == b.tobytes()


@every_family
@laws
@given(seeds, st.lists(example_counts, min_size=1, max_size=4), st.sampled_from(OPTIMISERS))
def test_law_1_zero_deltas_leave_every_shared_weight_bit_identical(case, seed, counts, optimiser):
    state = case.state
    negative_zero = {name: np.where(tensor == 0, np.float32(-0.0), tensor) for name, tensor in state.tensors.items()}
    state = type(state)(0, negative_zero, state.ordering)
    deltas = [
        make_delta(d.subnet, {n: np.zeros_like(v) for n, v in d.weights.items()}, num_examples=d.num_examples)
        for d in cohort(case, seed, counts)
    ]
    after, _ = fold(case, deltas, state, optimiser)
    assert after.version == 1
    for name, tensor in state.tensors.items():
        assert_bit_identical(tensor, after.tensors[name])


@every_family
@laws
@given(seeds, example_counts)
def test_law_2_put_get_for_one_client(case, seed, count):
    (delta,) = cohort(case, seed, [count])
    after, report = fold(case, [delta])
    before = case.supernet.slice_map(delta.subnet).extract(case.state.tensors)
    got = case.supernet.slice_map(delta.subnet).extract(after.tensors)
    for name, change in delta.weights.items():
        np.testing.assert_allclose(got[name], before[name] + change, atol=1e-5 * max(1, np.abs(change).max()))
    assert not report.truncated


@every_family
@laws
@given(seeds, st.lists(example_counts, min_size=2, max_size=5))
def test_law_2_put_get_for_clients_that_agree(case, seed, counts):
    """Every client's delta is its own view of one change of the shared weights: all of them get it back."""
    rng = np.random.default_rng(seed)
    change = {
        name: rng.standard_normal(tensor.shape).astype(np.float32)
        for name, tensor in case.state.tensors.items()
        if ".matrix_" not in name
    }
    maps = {c: case.supernet.slice_map(c) for c in (case.space.sample(rng) for _ in counts)}
    view = {**case.state.tensors, **change}
    deltas = [
        make_delta(c, {n: maps[c][n].extract(view) for n in maps[c].trainable}, num_examples=count)
        for c, count in zip(maps, counts, strict=False)
    ]
    after, _ = fold(case, deltas)
    for delta in deltas:
        before, got = (maps[delta.subnet].extract(t) for t in (case.state.tensors, after.tensors))
        for name, expected in delta.weights.items():
            np.testing.assert_allclose(got[name], before[name] + expected, atol=3e-5)


def test_law_2_a_badly_conditioned_transform_is_truncated_and_reported():
    supernet = build_supernet(3)
    name = "stages.1.0.depthwise.matrix_5to3"
    with torch.no_grad():
        u, s, v = torch.linalg.svd(supernet.shared()[name])
        s[-1] = s[0] * 1e-6
        supernet.shared()[name].copy_(u @ torch.diag(s) @ v)
    subnet = supernet.space.subnet(kernel=3)
    sums = FoldSums(supernet.slice_map)
    sums.add(random_delta(supernet, subnet, np.random.default_rng(0)))
    after, report = sums.finish(supernet.state(), Plain())
    assert report.truncated == {"stages.1.0.depthwise.conv.weight": 1}
    change = (
        after.tensors["stages.1.0.depthwise.conv.weight"] - supernet.state().tensors["stages.1.0.depthwise.conv.weight"]
    )
    assert np.abs(change).max() < 100, "an untruncated lift would blow this direction up by 1e6"


@with_kernels
@laws
@given(seeds, st.lists(example_counts, min_size=1, max_size=5))
def test_law_3_fold_of_a_kernel_is_the_minimum_norm_weighted_least_squares_solution(case, seed, counts):
    """Against a dense A_c built by differentiating the extraction, solved by lstsq, channel by channel."""
    name = "stages.2.0.depthwise.conv.weight"
    deltas = cohort(case, seed, counts)
    after, _ = fold(case, deltas)
    shape = case.state.tensors[name].shape
    jacobians = [dense_map(case, delta.subnet, name) for delta in deltas]
    a = np.concatenate([np.sqrt(d.num_examples) * j for d, j in zip(deltas, jacobians, strict=True)])
    b = np.concatenate([np.sqrt(d.num_examples) * d.weights[name].ravel() for d in deltas])
    expected = np.zeros((shape[0], shape[2] * shape[3]))
    for channel, solution in enumerate(expected):
        own = slice(channel * solution.size, (channel + 1) * solution.size)
        rows = np.abs(a[:, own]).max(axis=1) > 0
        assert not a[rows, : own.start].any(), "a channel's delta depends on this channel alone"
        assert not a[rows, own.stop :].any()
        if rows.any():
            solution[:] = np.linalg.lstsq(a[rows, own], b[rows], rcond=1e-9)[0]
    expected = expected.reshape(shape)
    np.testing.assert_allclose(after.tensors[name] - case.state.tensors[name], expected, atol=2e-5, rtol=1e-4)


def dense_map(case, subnet, name):
    """A as a dense `(subnet elements, shared elements)` float64 matrix."""
    item = case.supernet.slice_map(subnet)[name]
    tensors = {key: torch.from_numpy(value).double() for key, value in case.state.tensors.items()}
    jacobian = torch.autograd.functional.jacobian(
        lambda w: item.extract({**tensors, name: w}), tensors[name], vectorize=True
    )
    return jacobian.reshape(int(np.prod(item.shape)), -1).numpy()


@every_family
@laws
@given(seeds, st.lists(example_counts, min_size=1, max_size=5))
def test_law_3_fold_of_slices_is_the_mean_over_the_covering_clients(case, seed, counts):
    deltas = cohort(case, seed, counts)
    after, report = fold(case, deltas)
    for name, tensor in case.state.tensors.items():
        if "depthwise.conv" in name:
            continue
        total, weight = np.zeros(tensor.shape), np.zeros(tensor.shape)
        for delta in deltas:
            if name in delta.weights:
                item = case.supernet.slice_map(delta.subnet)[name]
                total += delta.num_examples * item.lift(delta.weights[name], case.state.tensors)
                weight += delta.num_examples * item.lift(np.ones(item.shape), case.state.tensors)
        expected = total / np.maximum(weight, 1)
        np.testing.assert_allclose(after.tensors[name] - tensor, expected, atol=1e-6)
        assert_bit_identical(after.tensors[name][weight == 0], tensor[weight == 0])
        assert report.covered_fraction.get(name, 0.0) == pytest.approx((weight > 0).mean())


@every_family
@laws
@given(seeds, st.lists(example_counts, min_size=1, max_size=5))
def test_law_4_the_largest_subnet_everywhere_is_flowers_fedavg(case, seed, counts):
    from flwr.app import ArrayRecord, MetricRecord, RecordDict
    from flwr.app.message import make_message
    from flwr.app.metadata import Metadata
    from flwr.serverapp.strategy import FedAvg

    rng = np.random.default_rng(seed)
    deltas = [random_delta(case.supernet, case.space.largest(), rng, num_examples=count) for count in counts]
    after, _ = fold(case, deltas)
    names = case.supernet.slice_map(case.space.largest()).trainable
    extract = case.supernet.slice_map(case.space.largest()).extract
    received = extract(case.state.tensors)
    messages = []
    for number, delta in enumerate(deltas):
        trained = ArrayRecord([received[name] + delta.weights[name] for name in names])
        content = RecordDict({"arrays": trained, "metrics": MetricRecord({"num-examples": delta.num_examples})})
        metadata = Metadata(1, f"m{number}", number + 1, 0, "r", "1", 0.0, 60.0, "train")
        messages.append(make_message(metadata=metadata, content=content))
    averaged, _ = FedAvg().aggregate_train(1, messages)
    assert averaged is not None
    folded = extract(after.tensors)
    for name, theirs in zip(names, averaged.to_numpy_ndarrays(), strict=True):
        np.testing.assert_allclose(folded[name], theirs, atol=1e-6, rtol=1e-6)


@every_family
@laws
@given(seeds, st.lists(example_counts, min_size=2, max_size=6), st.randoms(use_true_random=False))
def test_law_5_any_order_and_any_grouping_give_the_same_bits(case, seed, counts, random):
    deltas = cohort(case, seed, counts)
    expected, report = fold(case, deltas)
    shuffled = random.sample(deltas, len(deltas))
    parts = [FoldSums(case.supernet.slice_map) for _ in range(3)]
    for delta in shuffled:
        random.choice(parts).add(delta)
    total = FoldSums(case.supernet.slice_map)
    for part in random.sample(parts, 3):
        total.merge(part)
    got, other = total.finish(case.state, Plain())
    assert got.digest() == expected.digest()
    assert other == report


def test_law_5_an_overflow_is_refused_by_name_and_nothing_is_added():
    delta = random_delta(SUPERNET, SPACE.largest(), np.random.default_rng(0), num_examples=10)
    bad = {**delta.weights, "classifier.bias": np.full(5, MAX_TERM, np.float32)}
    sums = FoldSums(SUPERNET.slice_map)
    sums.add(delta)
    expected, _ = sums.finish(STATE, Plain())
    with pytest.raises(FoldError, match=r"classifier\.bias"):
        sums.add(make_delta(delta.subnet, bad, num_examples=10))
    assert sums.finish(STATE, Plain())[0].digest() == expected.digest()


def test_law_5_the_largest_allowed_cohort_of_largest_deltas_does_not_overflow():
    sums = FoldSums(SUPERNET.slice_map)
    value = np.nextafter(np.float32(MAX_TERM), np.float32(0))
    delta = make_delta(SPACE.largest(), {"classifier.bias": np.full(5, value, np.float32)})
    for _ in range(MAX_DELTAS):
        sums.add(delta)
    after, _ = sums.finish(STATE, Plain())
    np.testing.assert_allclose(after.tensors["classifier.bias"], STATE.tensors["classifier.bias"] + value)
    with pytest.raises(FoldError, match="smaller cohorts"):
        sums.add(delta)


@every_family
@laws
@given(seeds, st.lists(example_counts, min_size=1, max_size=3), st.sampled_from(OPTIMISERS[1:]))
def test_server_optimisers_are_lazy(case, seed, counts, optimiser):
    """Two rounds: in the second, what nobody trains keeps weights, moments and step counts to the bit."""
    rng = np.random.default_rng(seed)
    first, _ = fold(case, [random_delta(case.supernet, case.space.largest(), rng)], optimiser=optimiser)
    deltas = cohort(case, seed, counts)
    second, _ = fold(case, deltas, first, optimiser)
    for name in case.state.tensors:
        touched = np.zeros(case.state.tensors[name].shape, bool)
        for delta in deltas:
            if name in delta.weights:
                item = case.supernet.slice_map(delta.subnet)[name]
                channels = item.lift(np.ones(item.shape), case.state.tensors)
                touched |= (
                    (np.abs(channels).reshape(len(channels), -1).max(1) > 0).reshape(-1, *[1] * (touched.ndim - 1))
                    if item.kernel
                    else channels > 0
                )
        assert_bit_identical(first.tensors[name][~touched], second.tensors[name][~touched])
        for kind, arrays in first.moments.items():
            if name in arrays:
                assert_bit_identical(arrays[name][~touched], second.moments[kind][name][~touched])


def test_server_optimiser_numbers():
    """Hand-computed first steps on one coordinate that changed by 0.5."""
    change, covered, weight = np.array([0.5]), np.array([True]), np.array([1.0], np.float32)
    assert Plain(0.5).step("w", weight, change, covered, {})[0] == np.float32(1.25)
    moments = {}
    momentum = Momentum(1.0, 0.9)
    weight2 = momentum.step("w", weight, change, covered, moments)
    assert momentum.step("w", weight2, change, covered, moments)[0] == pytest.approx(1.0 + 0.5 + 0.95)
    for yogi in (False, True):
        step = Adaptive(0.1, 0.9, 0.99, 1e-3, yogi).step("w", weight, change, covered, {})
        assert step[0] == pytest.approx(1.0 + 0.1 * 0.5 / (0.5 + 1e-3), rel=1e-5)
