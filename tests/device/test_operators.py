"""The index of operators against direct descriptions, and every cost model against what it stands for."""

from functools import partial

import numpy as np
import pytest
import torch
from cohorts import CHAIN_SPEC, LITE_SPEC, SPECS
from torch.utils.flop_counter import FlopCounterMode

from fedofa.device.cost import AnalyticCostModel, LocalWork
from fedofa.device.layers import layers_of
from fedofa.device.models import BytesDown, Macs, Parameters
from fedofa.device.operators import OperatorIndex, SubnetBatch, operator_of
from fedofa.device.training import BytesUp, PlannedPlaces, RoundCosts, memory_factors
from fedofa.finetune.plans import build_plan
from fedofa.finetune.sparse import BlockContribution, Contributions, WeightContribution
from fedofa.supernet.costs import place_parts
from fedofa.supernet.families import build_elastic, build_supernet
from fedofa.supernet.mobilenet_v3 import MobileNetV3Supernet
from fedofa.types.device import DeviceProfile
from fedofa.types.errors import ConfigError, SpaceError

FAMILIES = {**SPECS, "chain": CHAIN_SPEC, "lite": LITE_SPEC}
SUPERNETS = {name: build_elastic(spec, torch.Generator().manual_seed(0)) for name, spec in FAMILIES.items()}
INDICES = {name: OperatorIndex.of(supernet) for name, supernet in SUPERNETS.items()}
PROFILE = DeviceProfile("any", 1e9, 1e9, 1e6, 1e6)
families = pytest.mark.parametrize("family", list(FAMILIES))


def drawn(family, count, seed=0):
    space = SUPERNETS[family].space
    rng = np.random.default_rng(seed)
    return [space.largest(), space.smallest(), *(space.sample(rng) for _ in range(count))]


@families
def test_look_ups_are_the_subnets_own_operators(family):
    supernet, index = SUPERNETS[family], INDICES[family]
    subnets = drawn(family, 60, seed=5)
    for subnet, numbers in zip(subnets, index.batch(subnets).operators, strict=True):
        spec = supernet.network_spec(subnet)
        expected = {placed.part.name: operator_of(placed, spec.norm) for placed in place_parts(spec)}
        found = {
            place: index.operators[number] for place, number in zip(index.places, numbers, strict=True) if number >= 0
        }
        assert found == expected


def test_the_published_space_has_few_operators_and_they_are_found_at_once():
    index = OperatorIndex.of(MobileNetV3Supernet.published())
    rows = index.encoding.sample(np.random.default_rng(0), 5000)
    assert len(index.operators) == 627
    assert (index.look_up(rows) >= 0).any(axis=1).all()


@families
def test_counts_are_those_of_the_subnets_blocks(family):
    supernet, index = SUPERNETS[family], INDICES[family]
    subnets = drawn(family, 20)
    batch = index.batch(subnets)
    blocks = [supernet.block_costs(subnet) for subnet in subnets]
    assert Macs(index).predict(batch).tolist() == [sum(block.macs for block in row) for row in blocks]
    assert Parameters(index).predict(batch).tolist() == [sum(block.num_parameters for block in row) for row in blocks]
    values = [sum(block.num_parameters + block.num_statistics for block in row) for row in blocks]
    assert BytesDown(index, wire_bytes=2).predict(batch).tolist() == [2 * count for count in values]


@families
def test_macs_and_parameters_are_torchs(family):
    supernet, index = SUPERNETS[family], INDICES[family]
    for subnet in drawn(family, 3):
        module, side = supernet.build(subnet).eval(), supernet.resolution(subnet)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(torch.zeros(1, 1, side, side))
        assert Macs(index).predict_one(subnet).value == counter.get_total_flops() / 2
        assert Parameters(index).predict_one(subnet).value == sum(p.numel() for p in module.parameters())


def contributions(supernet) -> Contributions:
    """Every channel counts the same."""
    weights = {
        block.name: tuple(
            WeightContribution(item.name, 10, 10, (1.0,) * item.shape[0 if item.shape[1] == 1 else 1])
            for item in block.parameters
            if item.role == "weight"
        )
        for block in supernet.block_costs(supernet.space.largest())
    }
    return Contributions([BlockContribution(name, 1, 1, 1.0, own) for name, own in weights.items()])


CONTRIBUTIONS = {family: contributions(supernet) for family, supernet in SUPERNETS.items()}


@families
@pytest.mark.parametrize(
    "plan", ["full", "bias", "head", "last_blocks(1)", "last_blocks(2)", "lora(2)", "sparse(0.4)", "lite_residual"]
)
@pytest.mark.parametrize("recompute", [False, True])
def test_training_costs_are_those_of_the_round_model(family, plan, recompute):
    if plan == "lite_residual" and family != "lite":
        return
    supernet, index = SUPERNETS[family], INDICES[family]
    plan_of = partial(build_plan, plan, recompute=recompute, contributions=CONTRIBUTIONS[family])
    work = LocalWork(num_examples=40, num_samples=80, batch_size=8, optimiser_slots=1, wire_bytes=2)
    plans = PlannedPlaces(index, plan_of)
    subnets = drawn(family, 25)
    batch = index.batch(subnets)
    memory = RoundCosts(plans).features(batch).matrix() @ memory_factors(work)
    up = BytesUp(plans, wire_bytes=2).predict(batch)
    for subnet, memory_bytes, num_bytes in zip(subnets, memory, up, strict=True):
        blocks = supernet.block_costs(subnet)
        cost = AnalyticCostModel().cost(blocks, plan_of(blocks), PROFILE, work)
        assert memory_bytes == cost.training_bytes
        assert num_bytes == cost.upload_bytes


@families
def test_layers_have_the_operators_macs(family):
    index = INDICES[family]
    macs = index.operator_table(lambda cost: cost.macs)
    assert macs.tolist() == [sum(layer.macs for layer in layers_of(operator)) for operator in index.operators]


def test_counts_times_tables_prices_every_subnet_on_every_device():
    index = INDICES["mobilenet_v3"]
    rng = np.random.default_rng(0)
    batch = SubnetBatch(index, index.encoding.sample(rng, 50))
    tables = rng.random((len(index.operators), 7))
    together = batch.counts() @ tables
    for device in range(7):
        np.testing.assert_allclose(together[:, device], batch.total(tables[:, device]), rtol=1e-6)


def test_a_supernet_of_one_module_has_no_operators():
    fixed = build_supernet({"family": "fixed", "module": "two_conv_cnn", "input_shape": [1, 28, 28], "num_classes": 10})
    with pytest.raises(ConfigError, match="block by block"):
        OperatorIndex.of(fixed)


def test_sizes_that_everything_changes_are_refused():
    supernet = SUPERNETS["mobilenet_v3"]
    space = supernet.space

    def network(subnet):
        even = subnet == space.largest() or int(subnet.digest(), 16) % 2 == 0
        return supernet.network_spec(space.largest() if even else space.smallest())

    with pytest.raises(SpaceError, match="more than can be tabulated"):
        OperatorIndex(space, network)


def test_a_dependency_that_single_changes_do_not_show_is_refused():
    supernet = SUPERNETS["mobilenet_v3"]
    space = supernet.space

    def network(subnet):
        rare = subnet["kernel"][0] == subnet["kernel"][2] == subnet["expand"][0] == 1
        return supernet.network_spec(space.smallest() if rare else space.largest())

    with pytest.raises(SpaceError, match="more columns than"):
        OperatorIndex(space, network)
