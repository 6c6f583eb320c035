"""Training the leading part of weights, and factors of them: what is learned, sent back, kept and refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from cohorts import SPECS, build_supernet

from fedofa.finetune.budget import plan_for_budget
from fedofa.finetune.engine import planned
from fedofa.finetune.inputs import ImageForm
from fedofa.finetune.plans import build_plan
from fedofa.finetune.probing import measure_contributions
from fedofa.finetune.recipe import LocalTraining
from fedofa.finetune.trainer import fine_tune
from fedofa.supernet.families import two_conv_cnn
from fedofa.supernet.fixed import FixedSupernet
from fedofa.types.errors import ConfigError
from fedofa.types.plan import FineTunePlan

GROUP, BATCH = build_supernet(norm="group"), build_supernet(norm="batch")
SUBNET = GROUP.space.largest()
BLOCKS = GROUP.block_costs(SUBNET)
INPUTS = torch.randn(10, 1, 20, 20, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
LABELS = torch.arange(10) % 5
SGD = LocalTraining(batch_size=4, epochs=2, learning_rate=0.02)
FULL = build_plan("full", BLOCKS, statistics="frozen")
WEIGHTS = tuple(item.name for block in BLOCKS for item in block.parameters if item.role == "weight")
LEVERS = [
    {},
    {"lean": True},
    {"lean": True, "micro_batch": 2},
    {"lean": True, "fused_step": True},
    {"lean": True, "recompute": (("stages.1.0", "stages.1.1"), ("stages.2.0",))},
]


def model_of(supernet=GROUP):
    model = supernet.build(SUBNET).double()
    model.dropout.p = 0.0
    return model


def trained(plan, supernet=GROUP, training=SGD, model=None):
    model = model or model_of(supernet)
    received = {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}
    return fine_tune(model, plan, received, INPUTS, LABELS, training, torch.Generator().manual_seed(3))


def parts(fraction: float, *names: str) -> FineTunePlan:
    return replace(FULL, fractions=tuple((name, fraction) for name in names))


@pytest.mark.parametrize("supernet", [GROUP, BATCH], ids=["group", "batch"])
@pytest.mark.parametrize("levers", LEVERS, ids=str)
def test_the_whole_of_every_weight_is_the_dense_plan(supernet, levers):
    dense, found = trained(FULL, supernet), trained(replace(parts(1.0, *WEIGHTS), **levers), supernet)
    for name, change in dense.weights.items():
        np.testing.assert_allclose(found.weights[name], change, rtol=1e-6, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("training", [SGD, replace(SGD, optimiser="adamw", learning_rate=1e-3)], ids=["sgd", "adamw"])
@pytest.mark.parametrize("supernet", [GROUP, BATCH], ids=["group", "batch"])
@pytest.mark.parametrize("lean", [False, True])
def test_a_part_trains_as_a_weight_whose_other_gradients_are_zero(supernet, lean, training):
    names = ("stages.1.0.expand.conv.weight", "stages.2.0.depthwise.conv.weight", "final.conv.weight")
    plan = replace(FULL, trainable=(*names, "classifier.bias"), fractions=tuple((name, 0.3) for name in names))
    model = model_of(supernet)
    start = {name: item.detach().clone() for name, item in model.named_parameters()}
    found = trained(replace(plan, lean=lean), supernet, training, model)

    masked, hooks = model_of(supernet), []
    for name in names:
        weight = masked.get_parameter(name)
        mask = torch.zeros_like(weight)
        mask[tuple(map(slice, plan.part_shape(name, weight.shape)))] = 1
        hooks.append(weight.register_hook(lambda grad, mask=mask: grad * mask))
    expected = trained(replace(plan, fractions=()), supernet, training, masked)
    for name in plan.trainable:
        part = tuple(map(slice, found.weights[name].shape))
        np.testing.assert_allclose(found.weights[name], expected.weights[name][part], rtol=1e-6, atol=1e-10)
    for name, parameter in model.named_parameters():
        if name in names:
            part = tuple(map(slice, found.weights[name].shape))
            change = torch.zeros_like(parameter)
            change[part] = torch.from_numpy(found.weights[name])
            torch.testing.assert_close(parameter.detach(), start[name] + change)
        elif name != "classifier.bias":
            assert torch.equal(parameter, start[name]), name


class _Product(torch.nn.Module):
    """Torch's own way to have a weight computed from others; the reference."""

    def __init__(self, weight, left, right):
        super().__init__()
        self.register_buffer("base", weight.detach().clone())
        self.left, self.right = torch.nn.Parameter(left.clone()), torch.nn.Parameter(right.clone())

    def forward(self, _):
        return self.base + (self.left @ self.right).view(self.base.shape)


@pytest.mark.parametrize("levers", LEVERS, ids=str)
@pytest.mark.parametrize("supernet", [GROUP, BATCH], ids=["group", "batch"])
def test_factors_train_as_torchs_parametrisation_of_the_weight_does(supernet, levers):
    plan = replace(build_plan("lora(2)", BLOCKS, statistics="frozen"), **levers)
    with planned(model_of(supernet), plan, torch.Generator().manual_seed(3 ^ 1)) as parameters:
        first = [item.detach().clone() for item in parameters]
    reference, factors = model_of(supernet).train(), []
    for module in reference.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    for name, left, right in zip(plan.low_rank, first[::2], first[1::2], strict=True):
        layer = reference.get_submodule(name.removesuffix(".weight"))
        product = _Product(layer.weight, left, right)
        torch.nn.utils.parametrize.register_parametrization(layer, "weight", product)
        factors += [product.left, product.right]
    optimiser = torch.optim.SGD(factors, SGD.learning_rate, SGD.momentum)
    generator = torch.Generator().manual_seed(3)
    for _ in range(SGD.epochs):
        order = torch.randperm(10, generator=generator)
        for batch in order.split(4):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(reference(INPUTS[batch]), LABELS[batch]).backward()
            optimiser.step()
    model = model_of(supernet)
    base = {name: item.detach().clone() for name, item in model.named_parameters()}
    found = trained(plan, supernet, model=model)
    assert found.weights == {}
    assert tuple(found.low_rank) == plan.low_rank
    moved = 0.0
    for name, left, right in zip(plan.low_rank, factors[::2], factors[1::2], strict=True):
        pair = found.low_rank[name]
        np.testing.assert_allclose(pair.left, left.detach().numpy(), rtol=1e-5, atol=1e-9, err_msg=name)
        np.testing.assert_allclose(pair.right, right.detach().numpy(), rtol=1e-5, atol=1e-9, err_msg=name)
        product = torch.from_numpy(pair.product(tuple(base[name].shape)))
        torch.testing.assert_close(model.get_parameter(name).detach(), base[name] + product)
        moved += float(product.norm())
    assert moved > 0
    frozen = [name for name in base if name not in plan.low_rank]
    assert all(torch.equal(model.get_parameter(name), base[name]) for name in frozen)


def test_lora_covers_linear_and_pointwise_weights_and_nothing_else():
    plan = build_plan("lora(3)", BLOCKS, recompute=True)
    assert plan.trainable == ()
    assert set(plan.low_rank) == {
        name for name in WEIGHTS if ".depthwise." not in name and name not in ("stem.conv.weight",)
    }
    assert plan.factor_shapes((8, 40, 1, 1)) == ((8, 3), (3, 40))
    assert plan.factor_shapes((2, 40)) == ((2, 2), (2, 40))
    assert plan.recompute == (("stages.0.0",), ("stages.1.0",), ("stages.1.1",), ("stages.2.0",), ("stages.2.1",))


def contributions(supernet=GROUP):
    subnet = supernet.space.largest()
    side = supernet.resolution(subnet) or 28
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(12, 1, side, side, generator=generator)
    return measure_contributions(supernet.build(subnet), supernet.block_costs(subnet), inputs, torch.arange(12) % 5)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("name", ["sparse(0.3)", "sparse(0.7)", "lora(2)"])
def test_every_family_trains_so_in_every_subnet(spec, name):
    supernet = build_supernet(spec=spec)
    given = contributions(supernet)
    for subnet in (supernet.space.smallest(), supernet.space.largest()):
        blocks = supernet.block_costs(subnet)
        plan = build_plan(name, blocks, statistics="frozen", lean=True, contributions=given)
        model, side = supernet.build(subnet), supernet.resolution(subnet)
        with planned(model, plan, torch.Generator().manual_seed(0)) as parameters:
            model(torch.randn(2, 1, side, side)).square().sum().backward()
            assert all(parameter.grad is not None for parameter in parameters)
        shapes = {item.name: item.shape for block in blocks for item in block.parameters}
        count = sum(plan.num_trained(item, shapes[item]) for item in plan.changes)
        assert count == sum(parameter.numel() for parameter in parameters)


def test_a_fixed_network_trains_sparsely():
    cnn = FixedSupernet(two_conv_cnn(), (1, 28, 28))
    blocks = cnn.block_costs(cnn.space.largest())
    plan = build_plan("sparse(0.5)", blocks, contributions=contributions(cnn), lean=True)
    model = cnn.build(cnn.space.largest())
    with planned(model, plan) as parameters:
        model(torch.randn(2, 1, 28, 28)).sum().backward()
        assert all(parameter.grad is not None for parameter in parameters)
    whole = sum(parameter.numel() for parameter in model.parameters())
    head = sum(item.numel for item in blocks[-1].parameters)
    assert head < sum(parameter.numel() for parameter in parameters) < whole


@pytest.mark.parametrize("kind", ["sparse(0.3)", "lora(2)"])
def test_a_budget_is_planned_for_with_these_kinds(kind):
    sizes = {"num_examples": 8, "form": ImageForm((1, 20, 20))}
    given = {"kinds": (kind, "head"), "contributions": contributions()}
    found = plan_for_budget(GROUP, SUBNET, SGD, memory_bytes=10**9, **sizes, **given)
    assert found.plan.name == kind
    assert plan_for_budget(GROUP, SUBNET, SGD, memory_bytes=found.memory.total_bytes, **sizes, **given) == found


def test_estimating_leaves_weights_that_train_by_factors_alone():
    model = GROUP.build(SUBNET)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    received = {}
    plan = build_plan("lora(2)", BLOCKS, statistics="frozen", lean=True)
    still = LocalTraining(learning_rate=0.0, max_steps=2, batch_size=4)
    fine_tune(model, plan, received, INPUTS.float(), LABELS, still, torch.Generator().manual_seed(0))
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fractions": (("classifier.weight", 0.0),)}, r"expected a trainable weight and a number in \(0, 1\]"),
        ({"fractions": (("nope", 0.5),)}, "expected a trainable weight .* found 'nope' and 0.5"),
        ({"low_rank": ("final.conv.weight",)}, "rank: expected at least 1 .* found 0 for 1"),
        ({"rank": 2}, "rank: expected .* 0 without any, found 2 for 0"),
        ({"low_rank": ("final.conv.weight",), "rank": 2}, "train as they are and by factors"),
    ],
)
def test_a_plan_that_contradicts_itself_cannot_be_made(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(FULL, **changes)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sparse(0.0)", r"expected sparse\(f\) with f in \(0, 1\], found 'sparse\(0\.0\)'"),
        ("sparse(1.5)", r"with f in \(0, 1\]"),
        ("sparse(0.5)", "chosen by contributions, which were not measured"),
        ("lora(0)", r"expected lora\(1\) or more, found lora\(0\)"),
        ("lora", r"unknown plan 'lora'; known: .*sparse\(f\), lora\(r\)"),
    ],
)
def test_a_name_that_makes_no_plan_is_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        build_plan(name, BLOCKS)


def test_kernel_matrices_do_not_train_sparsely():
    with pytest.raises(ConfigError, match="trains no kernel matrices"):
        build_plan("lora(2)", BLOCKS, parametrised=True)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (FineTunePlan("p", (), low_rank=("stem.conv.weight",), rank=1), "'stem.conv.weight' is no pointwise"),
        (FineTunePlan("p", (), low_rank=("stages.9.0.conv.weight",), rank=1), "which this subnet does not have"),
        (replace(FULL, fractions=(("stem.norm.weight", 0.5),)), "'stem.norm.weight' is no weight of a plain"),
    ],
)
def test_weights_that_cannot_train_so_are_refused_and_nothing_changes(plan, message):
    model = GROUP.build(SUBNET)
    layers = dict(model.named_modules())
    with pytest.raises(ConfigError, match=message):
        planned(model, plan, torch.Generator()).__enter__()
    assert dict(model.named_modules()) == layers


def test_factors_have_no_proximal_term():
    with pytest.raises(ConfigError, match=r"set finetune\.proximal_mu=0, found 0\.1"):
        trained(build_plan("lora(2)", BLOCKS), training=replace(SGD, proximal_mu=0.1))
