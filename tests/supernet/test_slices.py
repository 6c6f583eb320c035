"""Slices of shared tensors: what a slice can reach is what its lift can change."""

import numpy as np
import torch
from cohorts import build_supernet, seeds
from hypothesis import given, settings

from fedofa.supernet.slices import MAX_CONDITION, truncate

SUPERNET = build_supernet(norm="batch")
STATE = SUPERNET.state()


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_reach_of_a_slice_is_the_support_of_its_lift(seed):
    subnet = SUPERNET.space.sample(np.random.default_rng(seed))
    for item in SUPERNET.slice_map(subnet):
        reached = item.reach(STATE.tensors)
        assert reached.shape == item.shared_shape == STATE.tensors[item.name].shape
        if item.kernel is None:
            np.testing.assert_array_equal(reached, item.lift(np.ones(item.shape), STATE.tensors) != 0)
            assert reached.sum() == np.prod(item.shape)


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_reach_of_a_kernel_is_where_the_extracted_kernel_depends_on_the_shared_one(seed):
    """Against the derivative of the extraction, with dead columns in one matrix."""
    rng = np.random.default_rng(seed)
    subnet = SUPERNET.space.subnet(kernel=3, expand=int(rng.integers(1, 4)))
    tensors = {name: array.copy() for name, array in STATE.tensors.items()}
    tensors["stages.1.0.depthwise.matrix_5to3"][:, rng.integers(9, size=2)] = 0
    for name in ("stages.1.0.depthwise.conv.weight", "stages.2.0.depthwise.conv.weight"):
        item = SUPERNET.slice_map(subnet)[name]
        kernel = torch.from_numpy(tensors[name]).requires_grad_()
        shared = {key: torch.from_numpy(array) for key, array in tensors.items()} | {name: kernel}
        depends = np.zeros(item.shared_shape, bool)
        for weights in torch.eye(9):
            gradient = torch.autograd.grad((item.extract(shared).reshape(-1, 9) @ weights).sum(), kernel)[0]
            depends |= gradient.numpy() != 0
        reached = item.reach(tensors)
        np.testing.assert_array_equal(reached, depends)
        assert 0 < reached.sum() < reached.size
        lifted = item.lift(rng.standard_normal(item.shape), tensors)
        assert np.abs(lifted[~reached]).max() < 1e-12


def test_a_kernel_of_full_size_is_a_slice():
    item = SUPERNET.slice_map(SUPERNET.space.largest())["stages.1.0.depthwise.conv.weight"]
    assert item.kernel is None
    assert item.view == "weight"
    assert item.reach(STATE.tensors).all()


def test_numpy_and_torch_extract_alike():
    subnet = SUPERNET.space.subnet(kernel=3, expand=2)
    tensors = {name: torch.from_numpy(array) for name, array in STATE.tensors.items()}
    ours, theirs = (SUPERNET.slice_map(subnet).extract(source) for source in (STATE.tensors, tensors))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name].numpy(), atol=1e-5)


def test_truncate_drops_only_what_is_badly_conditioned():
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.standard_normal((5, 5)))
    good = u * [3, 2, 1, 0.5, 1.1 * 3 / MAX_CONDITION]
    assert truncate(good)[1] == 0
    bad, dropped = truncate(u * [3, 2, 1, 0.9 * 3 / MAX_CONDITION, 1e-9])
    assert dropped == 2
    np.testing.assert_allclose(bad, u * [3, 2, 1, 0, 0], atol=1e-12)


def test_the_trainable_names_leave_statistics_out():
    slices = SUPERNET.slice_map(SUPERNET.space.largest())
    expected = [name for name, _ in SUPERNET.build(SUPERNET.space.largest()).named_parameters()]
    assert sorted(slices.trainable) == sorted(expected)
    assert "stem.norm.running_mean" in slices
    assert "stem.norm.running_mean" not in slices.trainable
