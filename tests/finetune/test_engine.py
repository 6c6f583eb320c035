"""Putting a plan onto a module and taking it off again."""

import pytest
import torch
from cohorts import SPEC, build_supernet
from torch import nn

from fedofa.finetune.engine import planned
from fedofa.finetune.plans import build_plan
from fedofa.supernet.mobilenet_v3 import MobileNetV3Spec, MobileNetV3Supernet
from fedofa.types.errors import ConfigError
from fedofa.types.plan import FineTunePlan

SUPERNET = build_supernet(norm="batch")
SUBNET = SUPERNET.space.largest()
BLOCKS = SUPERNET.block_costs(SUBNET)
X = torch.randn(4, 1, 20, 20, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["full", "last_blocks(2)", "bias", "head"])
def test_only_the_plans_parameters_get_gradients(name):
    model, plan = SUPERNET.build(SUBNET), build_plan(name, BLOCKS)
    with planned(model, plan) as parameters:
        model(X).square().sum().backward()
    named = dict(model.named_parameters())
    assert [id(parameter) for parameter in parameters] == [id(named[key]) for key in plan.trainable]
    assert {key for key, parameter in named.items() if parameter.grad is not None} == set(plan.trainable)


def test_a_second_plan_replaces_the_first_ones_freezing_and_gradients():
    model = SUPERNET.build(SUBNET)
    with planned(model, build_plan("full", BLOCKS)):
        model(X).sum().backward()
    with planned(model, build_plan("head", BLOCKS)):
        assert all(parameter.grad is None for parameter in model.parameters())
        assert {name for name, p in model.named_parameters() if p.requires_grad} == {
            "classifier.weight",
            "classifier.bias",
        }


@pytest.mark.parametrize("statistics", ["batch", "frozen"])
def test_running_statistics_never_move_and_normalise_only_when_frozen(statistics):
    model, reference = SUPERNET.build(SUBNET), SUPERNET.build(SUBNET).eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.dropout.p = 0.0
    with planned(model, build_plan("full", BLOCKS, statistics=statistics)):
        logits = model(X)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert torch.allclose(logits, reference(X), atol=1e-5) == (statistics == "frozen")
    assert all(module.momentum == 0.1 for module in model.modules() if isinstance(module, nn.BatchNorm2d))


def test_recomputed_blocks_run_twice_and_are_restored():
    model = SUPERNET.build(SUBNET).eval()
    expected = model(X)
    calls = []
    for name in ("stages.1.0", "stages.2.1", "final"):
        layer = model.get_submodule(f"{name}.expand.conv" if name != "final" else "final.conv")
        layer.register_forward_hook(lambda module, inputs, output, name=name: calls.append(name))
    plan = FineTunePlan("full", ("stem.conv.weight",), (("stages.1.0",), ("stages.2.1",)), "frozen")
    with planned(model, plan):
        model.dropout.p = 0.0
        model(X).sum().backward()
    assert calls == ["stages.1.0", "stages.2.1", "final", "stages.2.1", "stages.1.0"]
    assert not [name for name, module in model.named_modules() if "forward" in module.__dict__]
    torch.testing.assert_close(model.eval()(X), expected)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_training_leaves_no_block_checkpointed(error):
    model = SUPERNET.build(SUBNET)
    with pytest.raises(error), planned(model, build_plan("full", BLOCKS, recompute=True)):
        assert "forward" in model.get_submodule("stages.1.0").__dict__
        raise error
    assert not [name for name, module in model.named_modules() if "forward" in module.__dict__]


def test_names_that_the_subnet_does_not_have_are_refused_and_leave_no_block_checkpointed():
    model = SUPERNET.build(SUBNET)
    with pytest.raises(ConfigError, match=r"plan 'p' trains \['nope'\], which this subnet does not have"):
        planned(model, FineTunePlan("p", ("stem.conv.weight", "nope"))).__enter__()
    plan = FineTunePlan("p", ("stem.conv.weight",), (("stages.1.0",), ("stages.9.0",)))
    with pytest.raises(ConfigError, match=r"plan 'p' recomputes 'stages\.9\.0', which this subnet does not have"):
        planned(model, plan).__enter__()
    assert not [name for name, module in model.named_modules() if "forward" in module.__dict__]


def test_recomputation_updates_the_running_statistics_once():
    models = [SUPERNET.build(SUBNET) for _ in range(2)]
    for model, recompute in zip(models, (False, True), strict=True):
        with planned(model, build_plan("full", BLOCKS, recompute=recompute)):
            model.dropout.p = 0.0
            model(X).sum().backward()
    for (name, plain), (_, again) in zip(*(model.named_buffers() for model in models), strict=True):
        torch.testing.assert_close(again, plain, msg=name)


@pytest.mark.parametrize("plan", ["bias", "head", "last_blocks(1)", "full"])
@pytest.mark.parametrize("recompute", [False, True])
def test_every_plan_trains_with_channels_innermost(plan, recompute):
    """Colour images make the layout real; torch's group norm crashes there when its input needs no gradient."""
    spec = MobileNetV3Spec.from_json({**SPEC.to_json(), "in_channels": 3, "norm": "group", "dropout": 0.0})
    supernet = MobileNetV3Supernet(spec, torch.Generator().manual_seed(0))
    subnet = supernet.space.largest()
    model = supernet.build(subnet)
    x = torch.randn(4, 3, 20, 20).contiguous(memory_format=torch.channels_last)
    with planned(model, build_plan(plan, supernet.block_costs(subnet), recompute=recompute)) as parameters:
        model(x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in parameters)
    assert not x.requires_grad
    reference = supernet.build(subnet)
    reference(x.contiguous()).square().mean().backward()
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-5)


def test_linear_weights_pass_through_as_they_are():
    model = nn.Sequential(nn.Linear(3, 2))
    with planned(model, FineTunePlan("p", ("0.bias",))) as parameters:
        assert [tuple(parameter.shape) for parameter in parameters] == [(2,)]
