"""The laws of folding for parametrised subnets, whose large kernels and matrices both train, and for mixed cohorts."""

import numpy as np
import pytest
import torch
from cohorts import PROXYLESS_SPEC, SPEC, build_supernet, example_counts, random_delta, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from fedofa.aggregation.fold import FoldSums
from fedofa.aggregation.server_optimisers import Adaptive, Momentum, Plain
from fedofa.supernet.base import fill_skeleton
from fedofa.types.delta import SubnetDelta

SUPERNETS = {spec.family: build_supernet(spec=spec) for spec in (SPEC, PROXYLESS_SPEC)}
STATES = {family: supernet.state() for family, supernet in SUPERNETS.items()}
every_family = pytest.mark.parametrize("family", SUPERNETS)
laws = settings(max_examples=10, deadline=None)


def parametrised_delta(family, subnet, rng, num_examples=1) -> SubnetDelta:
    slices = SUPERNETS[family].slice_map(subnet, True)
    weights = {name: rng.standard_normal(slices[name].shape).astype(np.float32) for name in slices.trainable}
    return SubnetDelta("c", 1, subnet, "plan", 0, num_examples, 1, weights, True)


def cohort(family, seed, counts, *, mixed=False):
    """One delta a count; with `mixed` every other one is of a plain subnet."""
    rng = np.random.default_rng(seed)
    space = SUPERNETS[family].space
    return [
        random_delta(SUPERNETS[family], space.sample(rng), rng, num_examples=count)
        if mixed and number % 2
        else parametrised_delta(family, space.sample(rng), rng, count)
        for number, count in enumerate(counts)
    ]


def fold(family, deltas, optimiser=None):
    sums = FoldSums(SUPERNETS[family].slice_map)
    for delta in deltas:
        sums.add(delta)
    return sums.finish(STATES[family], optimiser or Plain())


@every_family
@laws
@given(seeds)
def test_a_parametrised_subnet_is_the_plain_one(family, seed):
    """The same logits, and the gradient of the large kernel's centre and of the matrices is the supernet's."""
    supernet = SUPERNETS[family]
    rng = np.random.default_rng(seed)
    subnet = supernet.space.sample(rng)
    side = supernet.resolution(subnet)
    images = torch.from_numpy(rng.standard_normal((3, 1, side, side)).astype(np.float32))
    slices = supernet.slice_map(subnet, True)
    tensors = {name: tensor.detach().clone() for name, tensor in slices.extract(supernet.shared()).items()}
    module = fill_skeleton(supernet.structure(subnet, True), tensors).eval()
    assert {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()} == {
        item.name: item.shape for item in slices
    }
    logits = module(images)
    torch.testing.assert_close(logits, supernet.build(subnet).eval()(images), atol=2e-5, rtol=1e-4)
    supernet.eval().zero_grad()
    supernet(images, subnet).square().sum().backward()
    logits.square().sum().backward()
    shared = {name: parameter.grad for name, parameter in supernet.network.named_parameters()}
    for name, parameter in module.named_parameters():
        expected = slices[name].extract(shared)
        torch.testing.assert_close(parameter.grad, expected, atol=1e-3, rtol=1e-3, msg=name)
        outside = torch.from_numpy(~slices[name].reach(STATES[family].tensors))
        assert ".depthwise." not in name or not shared[name][outside].any(), "what is left out has no gradient"


def test_exactly_what_a_small_kernel_reads_is_sent():
    supernet = SUPERNETS["mobilenet_v3"]
    name = "stages.1.0.depthwise"
    shapes = {}
    for kernel in (7, 5, 3):
        slices = supernet.slice_map(supernet.space.subnet(kernel=kernel), True)
        shapes[kernel] = {item.name.removeprefix(f"{name}."): item.shape for item in slices if name in item.name}
        shapes[kernel] = {key: value for key, value in shapes[kernel].items() if "norm" not in key}
    assert shapes[7] == {"conv.weight": (24, 1, 7, 7)}
    assert shapes[5] == {"conv.weight": (24, 1, 5, 5), "matrix_7to5": (25, 25)}
    assert shapes[3] == {"conv.weight": (24, 1, 5, 5), "matrix_7to5": (9, 25), "matrix_5to3": (9, 9)}


@every_family
@laws
@given(seeds, st.lists(example_counts, min_size=1, max_size=4), st.sampled_from([Plain(), Momentum(), Adaptive()]))
def test_law_1_zero_deltas_leave_every_bit(family, seed, counts, optimiser):
    deltas = cohort(family, seed, counts, mixed=True)
    zeros = [
        SubnetDelta("c", 1, d.subnet, "plan", 0, d.num_examples, 1, {n: 0 * v for n, v in d.weights.items()},
                    d.parametrised)
        for d in deltas
    ]  # fmt: skip
    after, _ = fold(family, zeros, optimiser)
    assert after.digest() == STATES[family].digest()


@every_family
@laws
@given(seeds, example_counts)
def test_law_2_put_get_holds_for_kernels_and_matrices(family, seed, count):
    (delta,) = cohort(family, seed, [count])
    after, report = fold(family, [delta])
    slices = SUPERNETS[family].slice_map(delta.subnet, True)
    before, got = (slices.extract(state.tensors) for state in (STATES[family], after))
    for name, change in delta.weights.items():
        np.testing.assert_allclose(got[name], before[name] + change, atol=1e-5)
    assert not report.truncated
    for name, tensor in STATES[family].tensors.items():
        outside = ~slices[name].reach(STATES[family].tensors) if name in delta.weights else np.ones(tensor.shape, bool)
        assert after.tensors[name][outside].tobytes() == tensor[outside].tobytes()


@every_family
@laws
@given(seeds, st.lists(example_counts, min_size=2, max_size=5))
def test_law_2_put_get_for_a_mixed_cohort_that_agrees(family, seed, counts):
    """Every client saw one change of the large kernels, and the matrices stayed: all of them get it back."""
    supernet, state = SUPERNETS[family], STATES[family]
    rng = np.random.default_rng(seed)
    change = {
        name: np.zeros_like(tensor) if ".matrix_" in name else rng.standard_normal(tensor.shape).astype(np.float32)
        for name, tensor in state.tensors.items()
    }
    deltas = []
    for number, count in enumerate(counts):
        subnet, plain = supernet.space.sample(rng), bool(number % 2)
        slices = supernet.slice_map(subnet, not plain)
        source = {**change, **{n: t for n, t in state.tensors.items() if ".matrix_" in n}} if plain else change
        weights = {name: np.ascontiguousarray(slices[name].extract(source)) for name in slices.trainable}
        deltas.append(SubnetDelta("c", 1, subnet, "plan", 0, count, 1, weights, not plain))
    after, _ = fold(family, deltas)
    for delta in deltas:
        slices = supernet.slice_map(delta.subnet, delta.parametrised)
        before, got = slices.extract(state.tensors), slices.extract(after.tensors)
        for name, expected in delta.weights.items():
            np.testing.assert_allclose(got[name], before[name] + expected, atol=5e-5)


@every_family
@laws
@given(seeds, st.lists(example_counts, min_size=1, max_size=5))
def test_law_3_each_coordinate_is_the_mean_over_the_clients_that_read_it(family, seed, counts):
    deltas = cohort(family, seed, counts)
    after, report = fold(family, deltas)
    for name, tensor in STATES[family].tensors.items():
        total, weight = np.zeros(tensor.shape), np.zeros(tensor.shape)
        for delta in deltas:
            if name in delta.weights:
                item = SUPERNETS[family].slice_map(delta.subnet, True)[name]
                total += delta.num_examples * item.lift(delta.weights[name], STATES[family].tensors)
                weight += delta.num_examples * item.lift(np.ones(item.shape), STATES[family].tensors)
        np.testing.assert_allclose(after.tensors[name] - tensor, total / np.maximum(weight, 1), atol=2e-6)
        assert after.tensors[name][weight == 0].tobytes() == tensor[weight == 0].tobytes()
        assert report.covered_fraction.get(name, 0.0) == pytest.approx((weight > 0).mean())


@every_family
@laws
@given(seeds, st.lists(example_counts, min_size=1, max_size=5))
def test_law_3_a_mixed_cohorts_kernel_is_the_least_squares_solution(family, seed, counts):
    """Plain and parametrised clients of one kernel: against a dense system solved channel by channel."""
    name = "stages.2.0.depthwise.conv.weight"
    state = STATES[family]
    deltas = cohort(family, seed, counts, mixed=True)
    after, _ = fold(family, deltas)
    tensors = {key: torch.from_numpy(value).double() for key, value in state.tensors.items()}
    jacobians = []
    for delta in deltas:
        item = SUPERNETS[family].slice_map(delta.subnet, delta.parametrised)[name]
        jacobian = torch.autograd.functional.jacobian(
            lambda w, item=item: item.extract({**tensors, name: w}), tensors[name], vectorize=True
        )
        jacobians.append(jacobian.reshape(int(np.prod(item.shape)), -1).numpy())
    a = np.concatenate([np.sqrt(d.num_examples) * j for d, j in zip(deltas, jacobians, strict=True)])
    b = np.concatenate([np.sqrt(d.num_examples) * d.weights[name].ravel() for d in deltas])
    shape = state.tensors[name].shape
    expected = np.zeros((shape[0], shape[2] * shape[3]))
    for channel, solution in enumerate(expected):
        own = slice(channel * solution.size, (channel + 1) * solution.size)
        rows = np.abs(a[:, own]).max(axis=1) > 0
        if rows.any():
            solution[:] = np.linalg.lstsq(a[rows, own], b[rows], rcond=1e-9)[0]
    np.testing.assert_allclose(after.tensors[name] - state.tensors[name], expected.reshape(shape), atol=5e-5, rtol=1e-3)


@every_family
@laws
@given(seeds, st.lists(example_counts, min_size=2, max_size=6), st.randoms(use_true_random=False))
def test_law_5_any_order_and_grouping_of_a_mixed_cohort_give_the_same_bits(family, seed, counts, random):
    deltas = cohort(family, seed, counts, mixed=True)
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
