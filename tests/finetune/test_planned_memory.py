"""Training memory put together from operators, against steps of whole subnets on the meta device."""

from functools import partial

import numpy as np
import pytest
from cohorts import SPECS

from fedofa.device.cost import LocalWork
from fedofa.device.operators import OperatorIndex, SubnetBatch
from fedofa.device.training import PlannedPlaces
from fedofa.finetune.inputs import ImageForm
from fedofa.finetune.memory import training_memory
from fedofa.finetune.planned_memory import PlannedTrainingMemory
from fedofa.finetune.plans import build_plan
from fedofa.finetune.recipe import LocalTraining
from fedofa.supernet.families import build_elastic

SUPERNETS = {name: build_elastic(spec) for name, spec in SPECS.items()}
INDICES = {name: OperatorIndex.of(supernet) for name, supernet in SUPERNETS.items()}
LEVERS = {
    "stock": {},
    "lean": {"lean": True, "micro_batch": 1},
    "recomputed": {"lean": True, "micro_batch": 3, "recompute": True},
}
NUM_EXAMPLES, BATCH_SIZE = 30, 7


def model_of(name, plan_of, slots=1):
    work = LocalWork(NUM_EXAMPLES, NUM_EXAMPLES, BATCH_SIZE, slots)
    return PlannedTrainingMemory(PlannedPlaces(INDICES[name], plan_of), work)


def drawn(name, count, seed=5):
    index = INDICES[name]
    return SubnetBatch(index, index.encoding.sample(np.random.default_rng(seed), count))


@pytest.mark.parametrize("name", sorted(SPECS))
@pytest.mark.parametrize("kind", ["full", "bias", "last_blocks(2)", "head"])
@pytest.mark.parametrize("levers", LEVERS)
def test_it_is_what_a_step_of_the_whole_subnet_takes(name, kind, levers):
    plan_of = partial(build_plan, kind, statistics="frozen", **LEVERS[levers])
    batch, supernet = drawn(name, 3), SUPERNETS[name]
    for row, megabytes in zip(batch.rows, model_of(name, plan_of).predict(batch), strict=True):
        subnet = batch.index.encoding.subnet(row)
        network = supernet.network_spec(subnet)
        shape = (network.in_channels, network.resolution, network.resolution)
        plan, training = plan_of(supernet.block_costs(subnet)), LocalTraining(batch_size=BATCH_SIZE)
        figure = training_memory(supernet.structure(subnet), plan, training, NUM_EXAMPLES, ImageForm(shape))
        assert 0.999 <= megabytes * 1e6 / figure.total_bytes <= 1.015


def test_thousands_at_once_are_priced_as_one_by_one():
    plan_of = partial(build_plan, "last_blocks(2)", statistics="frozen", lean=True, micro_batch=1)
    batch = drawn("mobilenet_v3", 2000)
    whole = model_of("mobilenet_v3", plan_of).predict(batch)
    alone = model_of("mobilenet_v3", plan_of)
    for place in range(0, 2000, 50):
        assert alone.predict(SubnetBatch(batch.index, batch.rows[place : place + 1]))[0] == whole[place]


def test_optimiser_state_and_larger_batches_take_more():
    plan_of = partial(build_plan, "full", statistics="frozen", lean=True)
    batch = drawn("mobilenet_v3", 4)
    none, adam = (model_of("mobilenet_v3", plan_of, slots).predict(batch) for slots in (0, 2))
    micro = model_of("mobilenet_v3", partial(plan_of, micro_batch=1)).predict(batch)
    assert (none < adam).all() and (micro < none).all()
