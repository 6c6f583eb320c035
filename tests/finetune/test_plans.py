"""Plans by name: exactly which parameters of a subnet they train."""

import pytest
import torch
from cohorts import SPECS, build_supernet

from fedofa.finetune.engine import planned
from fedofa.finetune.plans import build_plan, in_backward
from fedofa.supernet.families import two_conv_cnn
from fedofa.supernet.fixed import FixedSupernet
from fedofa.types.errors import ConfigError

SUPERNET = build_supernet()
SUBNET = SUPERNET.space.subnet(depth=[1, 2])
BLOCKS = SUPERNET.block_costs(SUBNET)
NAMES = SUPERNET.slice_map(SUBNET).trainable
CNN = FixedSupernet(two_conv_cnn(), (1, 28, 28))
CNN_BLOCKS = CNN.block_costs(CNN.space.largest())
STAGES = ["stages.0.0", "stages.1.0", "stages.2.0", "stages.2.1"]


def of_blocks(*names: str) -> tuple[str, ...]:
    return tuple(name for name in NAMES if name.startswith(tuple(f"{block}." for block in names)))


@pytest.mark.parametrize(
    ("name", "trainable"),
    [
        ("full", NAMES),
        ("head", ("classifier.weight", "classifier.bias")),
        ("bias", tuple(n for n in NAMES if n.endswith(".bias") or n == "classifier.weight")),
        ("last_blocks(1)", of_blocks("stages.2.1", "final", "mix", "classifier")),
        ("last_blocks(2)", of_blocks("stages.2.0", "stages.2.1", "final", "mix", "classifier")),
        ("last_blocks( 4 )", of_blocks(*STAGES, "final", "mix", "classifier")),
    ],
)
def test_a_plan_trains_exactly_these_in_the_subnets_order(name, trainable):
    plan = build_plan(name, BLOCKS, statistics="frozen")
    assert plan.trainable == trainable
    assert (plan.name, plan.recompute, plan.statistics) == (name, (), "frozen")


@pytest.mark.parametrize(
    ("name", "recompute"),
    [("full", STAGES), ("last_blocks(2)", STAGES[2:]), ("head", []), ("bias", STAGES)],
)
def test_recomputation_covers_the_elastic_blocks_in_the_backward_pass(name, recompute):
    plan = build_plan(name, BLOCKS, recompute=True)
    assert plan.recompute == tuple((name,) for name in recompute)
    assert plan.trainable == build_plan(name, BLOCKS).trainable
    assert plan.digest() != build_plan(name, BLOCKS).digest() or not recompute


@pytest.mark.parametrize(
    ("name", "trainable"),
    [
        ("head", ["9.weight", "9.bias"]),
        ("bias", ["0.bias", "3.bias", "7.bias", "9.weight", "9.bias"]),
        ("last_blocks(2)", ["7.weight", "7.bias", "9.weight", "9.bias"]),
        ("last_blocks(4)", ["0.weight", "0.bias", "3.weight", "3.bias", "7.weight", "7.bias", "9.weight", "9.bias"]),
    ],
)
def test_a_module_without_elastic_blocks_counts_its_parametrised_children(name, trainable):
    plan = build_plan(name, CNN_BLOCKS, recompute=True)
    assert plan.trainable == tuple(trainable)
    assert plan.recompute == ()


def test_the_backward_pass_begins_at_the_first_block_that_trains():
    assert [block.name for block in in_backward(BLOCKS, ("mix.conv.weight",))] == ["mix", "classifier"]
    assert in_backward(BLOCKS, ("classifier.bias", "stem.norm.bias")) == BLOCKS
    assert in_backward(BLOCKS, ()) == ()


def test_more_last_blocks_than_there_are_is_all_of_them():
    assert build_plan("last_blocks(5)", BLOCKS).trainable == build_plan("last_blocks(4)", BLOCKS).trainable


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "some"}, r"finetune\.plans: unknown plan 'some'; known: full, last_blocks\(k\), head, bias"),
        ({"name": "last_blocks(x)"}, "unknown plan"),
        ({"name": "last_blocks(0)"}, r"expected last_blocks\(1\) or more, found last_blocks\(0\)"),
        ({"name": "full", "statistics": "running"}, r"finetune\.statistics: expected 'batch' or 'frozen', found 'run"),
    ],
)
def test_what_is_no_plan_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        build_plan(blocks=BLOCKS, **arguments)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("name", ["full", "last_blocks(1)", "bias", "head"])
def test_every_plan_trains_in_every_family(spec, name):
    """What a plan trains gets a gradient, in the subnet that the cost model's blocks speak of."""
    supernet = build_supernet(spec=spec)
    subnet = supernet.space.smallest()
    plan = build_plan(name, supernet.block_costs(subnet), recompute=name == "full")
    model, side = supernet.build(subnet), supernet.resolution(subnet)
    with planned(model, plan) as parameters:
        model(torch.randn(2, 1, side, side)).square().sum().backward()
        assert len(parameters) == len(plan.trainable) > 0
        assert all(parameter.grad is not None for parameter in parameters)
