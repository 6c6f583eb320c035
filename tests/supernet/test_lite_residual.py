"""Lite residual branches: they add nothing at first, nest like everything else, fold, and train alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from cohorts import CHAIN_SPEC, LITE_SPEC, PROXYLESS_SPEC, SPEC, build_supernet, example_counts, random_delta, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from fedofa.aggregation.fold import FoldSums
from fedofa.aggregation.server_optimisers import Plain
from fedofa.device.latency import roofline_table
from fedofa.device.ofa_tables import ofa_entries
from fedofa.device.operators import OperatorIndex
from fedofa.finetune.engine import planned
from fedofa.finetune.plans import build_plan
from fedofa.finetune.recipe import LocalTraining
from fedofa.finetune.trainer import fine_tune
from fedofa.supernet.chain import ChainSupernet
from fedofa.supernet.chain_weights import load_weights
from fedofa.supernet.families import build_elastic
from fedofa.supernet.families import build_supernet as build_described
from fedofa.supernet.mobilenet_v3 import MobileNetV3Spec, MobileNetV3Supernet
from fedofa.supernet.network import is_lite
from fedofa.supernet.published import save_published
from fedofa.types.errors import CheckpointError, ConfigError, ProfileError
from server.weights import start_from, write_supernet

LITE = {
    "mobilenet_v3": LITE_SPEC,
    "proxyless": replace(PROXYLESS_SPEC, lite_residual=True),
    "chain": replace(CHAIN_SPEC, lite_residual=True),
}
SUPERNETS = {family: build_supernet(spec=spec) for family, spec in LITE.items()}
every_family = pytest.mark.parametrize("family", LITE)
laws = settings(max_examples=10, deadline=None)
counts_of = st.lists(example_counts, min_size=1, max_size=4)


def stirred(supernet, seed=0):
    """Its state with branches that add something."""
    rng, state = np.random.default_rng(seed), supernet.state()
    scales = {
        name: rng.standard_normal(tensor.shape).astype(np.float32)
        for name, tensor in state.tensors.items()
        if name.endswith(".lite.project.norm.weight")
    }
    return replace(state, tensors={**state.tensors, **scales})


def images(supernet, subnet, count=2):
    side = supernet.resolution(subnet)
    return torch.randn(count, 1, side, side, generator=torch.Generator().manual_seed(5))


@every_family
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_branch_adds_nothing_until_it_has_learned(family, norm):
    spec = replace(LITE[family], norm=norm)
    with_branches, without = (
        build_elastic(item, torch.Generator().manual_seed(0)) for item in (spec, replace(spec, lite_residual=False))
    )
    state = with_branches.state()
    common = {name: tensor for name, tensor in state.tensors.items() if not is_lite(name)}
    assert replace(state, tensors=common).digest() == without.state().digest(), "all else begins as without branches"
    for subnet in (without.space.largest(), without.space.smallest()):
        x = images(without, subnet)
        plain = with_branches.build(subnet).eval()(x)
        assert torch.equal(plain, without.build(subnet).eval()(x))
        changed = with_branches.build(subnet, stirred(with_branches).tensors).eval()(x)
        assert not torch.allclose(changed, plain, atol=1e-4)


@every_family
def test_every_elastic_block_has_one_and_subnets_take_those_of_their_blocks(family):
    supernet = SUPERNETS[family]
    for subnet in (supernet.space.largest(), supernet.space.smallest()):
        blocks = [block for block in supernet.network_spec(subnet).blocks if getattr(block, "has_lite", False)]
        names = {name for name in supernet.slice_map(subnet).trainable if is_lite(name)}
        assert {name.split(".lite.")[0] for name in names} == {block.name for block in blocks}
        assert len(names) == 6 * len(blocks) > 0


@every_family
@laws
@given(seeds)
def test_a_subnets_branches_are_the_largest_ones(family, seed):
    """What a block's branch computes does not depend on the subnet around it."""
    supernet = SUPERNETS[family]
    state = stirred(supernet)
    subnet = supernet.space.sample(np.random.default_rng(seed))
    own, whole = supernet.build(subnet, state.tensors), supernet.build(supernet.space.largest(), state.tensors)
    for block in supernet.network_spec(subnet).blocks:
        if getattr(block, "has_lite", False):
            x, beside = torch.randn(1, block.in_channels, 5, 5), torch.empty(1, block.out_channels, 5, 5)
            mine, theirs = (model.get_submodule(f"{block.name}.lite") for model in (own, whole))
            torch.testing.assert_close(mine(x, beside), theirs(x, beside))


def fold(family, deltas):
    sums = FoldSums(SUPERNETS[family].slice_map)
    for delta in deltas:
        sums.add(delta)
    return sums.finish(SUPERNETS[family].state(), Plain())[0]


def cohort(family, seed, counts):
    rng, supernet = np.random.default_rng(seed), SUPERNETS[family]
    deltas = []
    for count in counts:
        subnet = supernet.space.sample(rng)
        names = build_plan("lite_residual", supernet.block_costs(subnet)).trainable
        deltas.append(random_delta(supernet, subnet, rng, num_examples=count, names=names))
    return deltas


@every_family
@laws
@given(seeds, counts_of, st.randoms(use_true_random=False))
def test_laws_1_to_5_hold_for_what_the_plan_trains(family, seed, counts, random):
    """Means over who has the block, bit for bit in any order; untouched elsewhere; zero deltas change nothing."""
    deltas, state = cohort(family, seed, counts), SUPERNETS[family].state()
    after = fold(family, deltas)
    assert fold(family, random.sample(deltas, len(deltas))).digest() == after.digest()
    zeros = [replace(d, weights={n: np.zeros_like(v) for n, v in d.weights.items()}) for d in deltas]
    assert fold(family, zeros).digest() == state.digest()
    for name, tensor in state.tensors.items():
        total, weight = np.zeros(tensor.shape), np.zeros(tensor.shape)
        for delta in (item for item in deltas if name in item.weights):
            slices = SUPERNETS[family].slice_map(delta.subnet)[name]
            total += delta.num_examples * slices.lift(delta.weights[name], state.tensors)
            weight += delta.num_examples * slices.lift(np.ones(slices.shape), state.tensors)
        expected = tensor + total / np.maximum(weight, 1)
        np.testing.assert_allclose(after.tensors[name], expected, atol=1e-5)
        assert after.tensors[name][weight == 0].tobytes() == tensor[weight == 0].tobytes()
        if is_lite(name):
            assert np.ptp(weight) == 0, "no subnet is narrower in a branch: it has it whole or not at all"


def test_the_plan_trains_branches_biases_and_head_and_freezes_the_rest():
    supernet = SUPERNETS["mobilenet_v3"]
    subnet = supernet.space.largest()
    blocks = supernet.block_costs(subnet)
    plan = build_plan("lite_residual", blocks)
    names = supernet.slice_map(subnet).trainable
    assert plan.trainable == tuple(n for n in names if is_lite(n) or n.endswith(".bias") or n == "classifier.weight")
    with pytest.raises(ConfigError, match=r"set supernet\.lite_residual=true"):
        build_plan("lite_residual", build_supernet().block_costs(build_supernet().space.largest()))


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("lean", [False, True])
def test_training_moves_what_the_plan_names_and_lowers_the_loss(norm, lean):
    supernet = build_supernet(spec=replace(LITE_SPEC, norm=norm, dropout=0.0))
    subnet = supernet.space.largest()
    plan = build_plan("lite_residual", supernet.block_costs(subnet), statistics="frozen", lean=lean, micro_batch=4)
    model = supernet.build(subnet)
    received = {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}
    inputs, labels = images(supernet, subnet, 10), torch.arange(10) % 5
    losses = []
    for _ in range(2):
        training = LocalTraining(batch_size=10, epochs=10, learning_rate=0.05)
        result = fine_tune(model, plan, received, inputs, labels, training, torch.Generator().manual_seed(0))
        losses.append(result.loss)
    assert losses[1] < losses[0]
    assert set(result.weights) == set(plan.trainable)
    assert all(np.abs(change).max() > 0 for name, change in result.weights.items() if ".lite.project.norm" in name)
    for name, parameter in model.named_parameters():
        if name not in plan.trainable:
            assert np.array_equal(parameter.detach().numpy(), received[name]), name


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_lean_gradients_of_branches_are_stock_autograds(norm):
    supernet = build_supernet(spec=replace(LITE_SPEC, norm=norm, dropout=0.0))
    subnet = supernet.space.largest()
    plans = [build_plan("lite_residual", supernet.block_costs(subnet), statistics="frozen", lean=x) for x in (0, 1)]
    found = []
    for plan in plans:
        model = supernet.build(subnet, stirred(supernet).tensors).double()
        with planned(model, plan) as parameters:
            model(images(supernet, subnet).double()).square().sum().backward()
            found.append([parameter.grad.clone() for parameter in parameters])
    for name, stock, lean in zip(plans[0].trainable, *found, strict=True):
        torch.testing.assert_close(lean, stock, rtol=1e-6, atol=1e-9, msg=name)


def test_a_supernet_with_branches_is_made_again_from_its_description():
    supernet = SUPERNETS["proxyless"]
    again = build_described(supernet.description())
    assert {n: t.shape for n, t in again.shared().items()} == {n: t.shape for n, t in supernet.shared().items()}


def test_weights_without_branches_start_one_that_has_them(tmp_path):
    plain, lite = build_supernet(spec=SPEC), build_supernet(1, spec=LITE_SPEC)
    state = plain.state()
    write_supernet(tmp_path, state, plain.description(), {"mean": [0.5], "std": [0.5]})
    own = {name: tensor.clone() for name, tensor in lite.shared().items() if is_lite(name)}
    start_from(lite, tmp_path, torch.Generator())
    for name, tensor in lite.shared().items():
        expected = own[name] if is_lite(name) else torch.from_numpy(state.tensors[name])
        assert torch.equal(tensor, expected), name
    write_supernet(tmp_path, lite.state(), lite.description(), {"mean": [0.5], "std": [0.5]})
    with pytest.raises(CheckpointError, match="unknown or of another shape"):
        start_from(plain, tmp_path, torch.Generator())


def test_pretrained_files_hold_no_branches_and_fill_the_rest():
    plain = ChainSupernet(CHAIN_SPEC, torch.Generator().manual_seed(0))
    lite = ChainSupernet(replace(CHAIN_SPEC, lite_residual=True), torch.Generator().manual_seed(1))
    own = {name: tensor.clone() for name, tensor in lite.shared().items() if is_lite(name)}
    weights = {name: tensor for name, tensor in plain.shared().items() if ".matrix_" not in name}
    load_weights(lite, weights, {name: name for name in weights})
    for name, tensor in lite.shared().items():
        if ".matrix_" not in name:
            assert torch.equal(tensor, own[name] if is_lite(name) else weights[name]), name
    assert any(map(is_lite, own))


def test_published_files_hold_no_branches_and_say_so(tmp_path):
    supernet = MobileNetV3Supernet(MobileNetV3Spec(lite_residual=True))
    with pytest.raises(CheckpointError, match="published files hold no lite residual branches"):
        save_published(supernet, tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_published_latency_tables_do_not_speak_of_branches():
    index = OperatorIndex.of(SUPERNETS["mobilenet_v3"])
    rates = {"macs_per_second": 1e8, "bytes_per_second": 1e9, "launch_ms": 0.02}
    table = roofline_table(index, **rates, engine="x", source="made up")
    with pytest.raises(ProfileError, match=r"set supernet\.lite_residual=false"):
        ofa_entries(table, index)
