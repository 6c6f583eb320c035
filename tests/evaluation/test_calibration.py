"""Calibration: pooled statistics over uneven batches, sums that merge, and subnets that regain accuracy by them."""

import itertools

import numpy as np
import pytest
import torch
from cohorts import build_supernet
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from fedofa.data.sources import load_source
from fedofa.evaluation.calibration import apply_sums, calibrate, channel_sums, merge_sums, statistic_sums
from fedofa.evaluation.metrics import evaluate
from fedofa.finetune.inputs import prepare_inputs
from fedofa.shrinking.central import CentralShrinking
from fedofa.shrinking.recipe import CentralTraining
from fedofa.shrinking.schedule import ShrinkSchedule
from fedofa.supernet.mobilenet_v3 import MobileNetV3Spec, MobileNetV3Supernet, StageSpec
from fedofa.types.errors import DatasetError, SpaceError
from fedofa.types.statistics import ChannelSums

SUPERNET = build_supernet(norm="batch")
SUBNET = SUPERNET.space.smallest()


def images(batch: int = 23) -> torch.Tensor:
    return 3 + 2 * torch.randn(batch, 1, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sizes", [[23], [10, 10, 3], [2, 21], [1] * 23])
def test_the_first_norms_statistics_are_those_of_all_data_at_once(sizes):
    model = SUPERNET.build(SUBNET)
    seen = []
    model.stem.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    assert calibrate(model, images().split(sizes))
    everything = torch.cat(seen).double().transpose(0, 1).flatten(1)
    assert everything.shape[1] == 23 * 8 * 8
    torch.testing.assert_close(model.stem.norm.running_mean, everything.mean(1).float())
    torch.testing.assert_close(model.stem.norm.running_var, everything.var(1, correction=0).float())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.running_var > 0).all()


@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=5),
    st.sampled_from([torch.float16, torch.float32, torch.float64]),
    st.floats(-30, 30),
)
def test_sums_of_channels_are_those_in_float64(shape, dtype, offset):
    x = (offset + torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    exact = x.double().transpose(0, 1).flatten(1)
    total, squares = channel_sums(x)
    assert total.dtype == squares.dtype == torch.float64
    assert ((total - exact.sum(1)).abs() <= 1e-6 * exact.abs().sum(1)).all()
    torch.testing.assert_close(squares, exact.square().sum(1), rtol=1e-6, atol=0.0)
    if len(shape) == 4:
        turned = channel_sums(x.contiguous(memory_format=torch.channels_last))
        assert ((turned[0] - exact.sum(1)).abs() <= 1e-6 * exact.abs().sum(1)).all()
        torch.testing.assert_close(turned[1], exact.square().sum(1), rtol=1e-6, atol=0.0)


def test_deeper_norms_see_inputs_normalised_by_the_batch():
    """With one batch: the statistics that training mode shows, whatever the wrong running ones were."""
    model, reference = SUPERNET.build(SUBNET), SUPERNET.build(SUBNET).train()
    with torch.no_grad():
        model.stem.norm.running_mean.fill_(100.0)
    seen = {}
    for name, module in reference.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda module, inputs, name=name: seen.update({name: inputs[0]}))
    with torch.no_grad():
        reference(images())
    calibrate(model, [images()])
    assert len(seen) > 5
    for name, x in seen.items():
        norm = model.get_submodule(name)
        torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(norm.running_var, x.var((0, 2, 3), correction=0), atol=1e-5, rtol=1e-4)


def test_without_batch_norm_nothing_happens():
    model = build_supernet(norm="group").build(SUBNET)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert calibrate(model, [images()]) is False
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_only_statistics_change_and_momentum_mode_and_hooks_are_as_before():
    model = SUPERNET.build(SUBNET).train()
    model.stem.norm.momentum = 0.03
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibrate(model, [images()])
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name, _ in model.named_buffers()}
    assert model.stem.norm.momentum == 0.03
    assert model.stages[0][0].depthwise.norm.momentum == 0.1
    assert not any(module.training or module._forward_pre_hooks for module in model.modules())
    first = dict(model.named_buffers())["stem.norm.running_mean"].clone()
    with torch.no_grad():
        model(10 * images())
    assert torch.equal(first, model.stem.norm.running_mean)


def test_an_error_on_the_way_restores_momentum_and_removes_hooks():
    model = SUPERNET.build(SUBNET)
    with pytest.raises(RuntimeError):
        calibrate(model, [images(), torch.zeros(2, 5, 16, 16)])
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(m.momentum == 0.1 for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def stripes(num_examples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two classes, horizontal and vertical stripes, in noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_examples) % 2
    wave = torch.sin(torch.arange(16) * (np.pi / 2)).repeat(16, 1)
    pictures = torch.stack([wave if label else wave.T for label in labels]).unsqueeze(1)
    return pictures + 0.5 * torch.randn(num_examples, 1, 16, 16, generator=generator), labels


def test_a_subnet_with_wrong_statistics_regains_its_accuracy():
    supernet = build_supernet(norm="batch").train()
    subnet = supernet.space.smallest()
    inputs, labels = stripes(64, seed=1)
    torch.manual_seed(0)
    optimiser = torch.optim.SGD(supernet.parameters(), lr=0.05, momentum=0.9)
    for _ in range(25):
        optimiser.zero_grad()
        functional.cross_entropy(supernet(inputs, subnet), labels).backward()
        optimiser.step()
    with torch.no_grad():
        for name, tensor in supernet.shared().items():
            if name.endswith("running_mean"):
                tensor.fill_(3.0)
    model = supernet.build(subnet)
    test = stripes(200, seed=2)
    assert evaluate(model, *test).accuracy < 0.7
    calibrate(model, inputs.split(20))
    assert evaluate(model, *test).accuracy > 0.95


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=5), st.lists(st.integers(0, 4), max_size=4), st.data())
def test_sums_of_parts_merge_to_those_of_one_pass(sizes, cuts, data):
    """The batches of a stream, dealt out to parts in any way and merged in any order."""
    model = SUPERNET.build(SUBNET)
    batches = images(sum(sizes)).split(sizes)
    whole = statistic_sums(model, batches)
    bounds = [0, *sorted(min(cut, len(sizes)) for cut in cuts), len(sizes)]
    parts = [batches[start:end] for start, end in itertools.pairwise(bounds)]
    order = data.draw(st.permutations(range(len(parts))))
    merged = merge_sums(statistic_sums(model, parts[index]) for index in order)
    assert set(merged) == set(whole) != set()
    for name, sums in whole.items():
        assert merged[name].count == sums.count
        np.testing.assert_allclose(merged[name].total, sums.total, rtol=1e-10, atol=1e-9)
        np.testing.assert_allclose(merged[name].squares, sums.squares, rtol=1e-12)
    apply_sums(model, merged)
    once = SUPERNET.build(SUBNET)
    calibrate(once, batches)
    for (name, got), (_, expected) in zip(model.named_buffers(), once.named_buffers(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7, msg=name)


def test_sums_are_those_of_the_values():
    values = np.random.default_rng(0).normal(50.0, 0.01, (1000, 3))
    sums = ChannelSums(1000, values.sum(0), np.square(values).sum(0))
    np.testing.assert_allclose(sums.mean, values.mean(0))
    np.testing.assert_allclose(sums.variance, values.var(0), rtol=1e-6)
    assert (ChannelSums(2, np.array([0.2]), np.array([0.02 - 1e-18])).variance >= 0).all()


def test_sums_of_another_subnet_or_of_nothing_are_refused():
    small, large = SUPERNET.build(SUBNET), SUPERNET.build(SUPERNET.space.largest())
    sums = statistic_sums(small, [images()])
    with pytest.raises(SpaceError, match="two subnets cannot be merged"):
        merge_sums([sums, statistic_sums(large, [images()])])
    with pytest.raises(SpaceError, match="another subnet"):
        apply_sums(large, sums)
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    with pytest.raises(DatasetError, match="at least one batch"):
        calibrate(small, [])
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())


@pytest.mark.slow
def test_ten_random_subnets_of_a_trained_supernet_before_and_after(tmp_path):
    """Digits; "before" has the largest subnet's calibrated statistics, as published supernets carry them."""
    digits = load_source("mnist5k", None, tmp_path)
    order = np.random.default_rng(0).permutation(len(digits.labels))
    train, test = order[:2000], order[2000:2500]
    stages = (StageSpec(16, 2, "relu", True), StageSpec(24, 2, "h_swish", False))
    spec = MobileNetV3Spec(
        in_channels=1, num_classes=10, stem_width=8, first_width=8, stages=stages, final_width=32, feature_width=32,
        expands=(2, 3, 4), depths=(1, 2), resolutions=(20,), norm="batch", dropout=0.0,
    )  # fmt: skip
    supernet = MobileNetV3Supernet(spec, torch.Generator().manual_seed(0))
    schedule = ShrinkSchedule.sandwich(supernet.space, 150)
    recipe = CentralTraining(learning_rate=0.3, batch_size=32, label_smoothing=0.0, max_gradient_norm=5.0)
    shrinking = CentralShrinking(
        supernet, schedule, recipe, digits.images[train], digits.labels[train], digits.mean, digits.std, seed=0
    )
    for _ in range(schedule.num_steps):
        shrinking.advance()

    seen = prepare_inputs(digits.images[train], digits.mean, digits.std, 20).split(100)
    sorted_images = digits.images[train][np.argsort(digits.labels[train], kind="stable")]
    one_or_two_labels_each = prepare_inputs(sorted_images, digits.mean, digits.std, 20).split(50)
    unseen = prepare_inputs(digits.images[test], digits.mean, digits.std, 20), torch.from_numpy(digits.labels[test])
    largest = supernet.build(supernet.space.largest())
    calibrate(largest, seen)
    with torch.no_grad():
        for name, statistic in supernet.network.named_buffers():
            statistic.copy_(largest.state_dict()[name])
    rng, before, after, by_clients = np.random.default_rng(1), [], [], []
    for _ in range(10):
        module = supernet.build(supernet.space.sample(rng))
        before.append(evaluate(module, *unseen).accuracy)
        calibrate(module, seen)
        after.append(evaluate(module, *unseen).accuracy)
        apply_sums(module, merge_sums(statistic_sums(module, [part]) for part in one_or_two_labels_each))
        by_clients.append(evaluate(module, *unseen).accuracy)
    for name, accuracies in (("before", before), ("after", after), ("by clients of one or two labels", by_clients)):
        print(f"{name}: {np.round(accuracies, 3).tolist()}, mean {np.mean(accuracies):.3f}")
    assert all(late > early for early, late in zip(before, after, strict=True))
    assert min(after) > 0.8
    assert min(by_clients) > 0.8
    assert np.mean(after) - np.mean(before) > 0.1
