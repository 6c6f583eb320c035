"""The frozen prefix's features: the same training, computed once, known by exactly what they depend on."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from cohorts import build_supernet
from torch import nn

from fedofa.finetune.engine import planned
from fedofa.finetune.features import FeatureCache, cut_of, feature_bytes
from fedofa.finetune.inputs import ImageForm, stored_inputs
from fedofa.finetune.memory import training_memory
from fedofa.finetune.plans import build_plan
from fedofa.finetune.recipe import LocalTraining
from fedofa.finetune.trainer import fine_tune
from fedofa.types.errors import ConfigError
from fedofa.types.plan import FineTunePlan

GROUP, BATCH = build_supernet(norm="group"), build_supernet(norm="batch")
SUBNET = GROUP.space.largest()
INPUTS = torch.randn(10, 1, 20, 20, generator=torch.Generator().manual_seed(7))
SGD = LocalTraining(batch_size=4, epochs=2, learning_rate=0.02)


def plan_of(supernet, name="last_blocks(1)", **levers):
    return replace(build_plan(name, supernet.block_costs(SUBNET), statistics="frozen"), **levers)


def trained(supernet, plan, *, cache=None, inputs=INPUTS, training=SGD, model=None):
    model = model or supernet.build(SUBNET)
    received = {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}
    torch.manual_seed(5)
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(len(inputs)) % 5
    return fine_tune(model, plan, received, inputs, labels, training, generator, features=cache)


class Counted(nn.Module):
    """Doubles its input and counts the examples that it sees."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([2.0]), requires_grad=False)
        self.seen = 0

    def forward(self, x):
        self.seen += len(x)
        return x * self.factor


@pytest.mark.parametrize("supernet", [GROUP, BATCH], ids=["group", "batch"])
@pytest.mark.parametrize("name", ["head", "last_blocks(1)", "last_blocks(3)"])
@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("largest", [1 << 20, 1 << 10], ids=["in memory", "in a file"])
def test_training_is_the_same_to_rounding(supernet, name, lean, largest):
    """Dropout behind the prefix included. Batches of another order may be rounded otherwise by torch's kernels."""
    plan = plan_of(supernet, name, lean=lean)
    double = INPUTS.double()
    expected = trained(supernet, plan, model=supernet.build(SUBNET).double(), inputs=double)
    cache = FeatureCache(memory_bytes=largest)
    for _ in range(2):
        model = supernet.build(SUBNET).double()
        found = trained(supernet, replace(plan, feature_cache=True), cache=cache, model=model, inputs=double)
        assert found.loss == pytest.approx(expected.loss, rel=1e-9)
        for key, change in expected.weights.items():
            np.testing.assert_allclose(found.weights[key], change, rtol=1e-6, atol=1e-12, err_msg=key)
    assert len(cache._entries) == 1


def test_examples_go_through_the_prefix_once_over_epochs_and_rounds():
    counted = Counted()
    model = nn.Sequential(counted, nn.Flatten(), nn.Linear(400, 5))
    plan, cache = FineTunePlan("head", ("2.weight", "2.bias"), feature_cache=True), FeatureCache()
    for _ in range(3):
        trained(GROUP, plan, cache=cache, model=model)
    assert counted.seen == 10
    trained(GROUP, plan, model=model)
    assert counted.seen == 20


@pytest.mark.parametrize("change", ["weight", "statistics", "example", "batch", "nothing", "suffix"])
def test_features_are_computed_anew_when_what_they_depend_on_changes(change):
    cache, supernet = FeatureCache(), BATCH
    plan = plan_of(supernet, feature_cache=True)
    trained(supernet, plan, cache=cache)
    model, inputs, training = supernet.build(SUBNET), INPUTS.clone(), SGD
    with torch.no_grad():
        if change == "weight":
            model.get_parameter("stages.0.0.project.conv.weight").view(-1)[3] += 1e-3
        if change == "statistics":
            model.get_buffer("stem.norm.running_mean")[0] += 1e-3
        if change == "suffix":
            model.get_parameter("classifier.bias")[0] += 1
        if change == "example":
            inputs[9, 0, 0, 0] += 1e-3
    if change == "batch":
        training = replace(SGD, batch_size=5)
    trained(supernet, plan, cache=cache, model=model, inputs=inputs, training=training)
    assert len(cache._entries) == (1 if change in ("nothing", "suffix") else 2)


def features_of(cache, number, size=100):
    prefix = nn.Sequential(Counted())
    return cache.features(prefix, torch.full((4, size), float(number)), 2, ""), prefix[0].seen


@pytest.mark.parametrize("on_disk", [False, True])
def test_the_longest_unused_clients_features_are_dropped(on_disk):
    bounds = {"memory_bytes": 0, "disk_bytes": 3200} if on_disk else {"memory_bytes": 3200, "disk_bytes": 0}
    cache = FeatureCache(**bounds)
    assert [features_of(cache, number)[1] for number in (0, 1, 0, 2, 0, 1, 2)] == [4, 4, 0, 4, 0, 4, 4]
    found, _ = features_of(cache, 2)
    assert torch.equal(found, torch.full((4, 100), 4.0))


def test_features_that_are_too_many_for_the_disk_are_given_and_not_kept():
    cache = FeatureCache(memory_bytes=0, disk_bytes=1000)
    for _ in range(2):
        found, seen = features_of(cache, 3)
        assert seen == 4
        assert torch.equal(found, torch.full((4, 100), 6.0))


def test_a_file_has_no_name_and_goes_with_its_features(tmp_path):
    cache = FeatureCache(memory_bytes=0, directory=tmp_path)
    found, _ = features_of(cache, 1)
    assert os.listdir(tmp_path) == []
    assert torch.equal(found.sum(1), torch.full((4,), 200.0))


def test_an_error_in_the_prefix_leaves_nothing_behind(tmp_path):
    class Failing(Counted):
        def forward(self, x):
            if self.seen:
                raise RuntimeError("out of memory")
            return super().forward(x)

    cache = FeatureCache(memory_bytes=0, directory=tmp_path)
    with pytest.raises(RuntimeError, match="out of memory"):
        cache.features(Failing(), torch.ones(4, 100), 2, "")
    assert not cache._entries
    assert os.listdir(tmp_path) == []


def test_random_augmentation_is_refused():
    with pytest.raises(ConfigError, match=r"plan 'last_blocks\(1\)': cached features .* found finetune.max_shift=1"):
        trained(GROUP, plan_of(GROUP, feature_cache=True), training=replace(SGD, max_shift=1))


def test_batch_statistics_in_the_prefix_are_refused_and_only_there():
    blocks = BATCH.block_costs(SUBNET)
    with pytest.raises(ConfigError, match="cached features would depend on the batch .* finetune.statistics=frozen"):
        build_plan("head", blocks, feature_cache=True)
    with pytest.raises(ConfigError, match="plan 'head': cached features would depend on the batch"):
        trained(BATCH, replace(build_plan("head", blocks), feature_cache=True))
    assert build_plan("head", GROUP.block_costs(SUBNET), feature_cache=True).feature_cache
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(648, 5))
    trained(GROUP, FineTunePlan("p", ("1.weight", "3.bias"), feature_cache=True), model=model)


@pytest.mark.parametrize("name", ["full", "bias"])
def test_a_plan_that_trains_from_the_first_layer_has_nothing_to_cache(name):
    assert not build_plan(name, GROUP.block_costs(SUBNET), feature_cache=True).feature_cache
    with pytest.raises(ConfigError, match="but there is none: the first layer trains"):
        trained(GROUP, plan_of(GROUP, name, feature_cache=True))


def test_a_segment_is_not_cut():
    segments = (("stages.0.0",), ("stages.1.0", "stages.1.1", "stages.2.0", "stages.2.1"))
    plan = plan_of(GROUP, "last_blocks(1)", recompute=segments)
    model = GROUP.build(SUBNET)
    with planned(model, plan):
        cut = cut_of(model, plan)
    assert len(cut.prefix) == 2  # stem and stages.0.0
    expected, found = trained(GROUP, plan), trained(GROUP, replace(plan, feature_cache=True))
    for key, change in expected.weights.items():
        np.testing.assert_allclose(found.weights[key], change, rtol=1e-3, atol=1e-6, err_msg=key)


def test_dropout_ends_the_prefix():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(400, 5))
    assert len(cut_of(model, FineTunePlan("p", ("2.weight",), feature_cache=True)).prefix) == 1


def test_features_count_in_the_memory_model():
    model, plan = GROUP.structure(SUBNET), plan_of(GROUP, "head", feature_cache=True, lean=True)
    few, many = (training_memory(model, plan, SGD, count, ImageForm((1, 20, 20))).total_bytes for count in (100, 1100))
    size = feature_bytes(model, plan, (1, 20, 20))
    assert size == 4 * dict(model.named_parameters())["classifier.weight"].shape[1]
    assert many - few == pytest.approx(1000 * (size + 400), abs=8192)


def test_stored_images_are_known_by_their_pixels_and_by_how_they_are_prepared():
    images = np.random.default_rng(0).integers(256, size=(10, 1, 16, 16), dtype=np.uint8)
    others = images.copy()
    others[3, 0, 5, 5] ^= 1
    forms = [(images, 0.5, 20), (others, 0.5, 20), (images, 0.25, 20), (images, 0.5, 24)]
    cache, prefix = FeatureCache(), Counted()
    seen = []
    for pixels, mean, side in [*forms, *forms]:
        inputs = stored_inputs(pixels, [mean], [0.5], side)
        features = cache.features(prefix, inputs, 4, "stock")
        assert torch.equal(features, 2 * inputs[:])
        seen.append(prefix.seen)
    assert seen == [10, 20, 30, 40, 40, 40, 40, 40]
