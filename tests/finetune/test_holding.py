"""Received subnets in modules that train: nothing that stays frozen is copied, nothing received is written to."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from cohorts import LITE_SPEC, build_supernet

from fedofa.device.allocator import resident_bytes
from fedofa.finetune.holding import held_bytes, hold, is_shared
from fedofa.finetune.plans import build_plan
from fedofa.finetune.probing import measure_contributions
from fedofa.finetune.recipe import LocalTraining
from fedofa.finetune.trainer import fine_tune
from fedofa.types.errors import SpaceError

SUPERNET = build_supernet(norm="batch", spec=LITE_SPEC)
SUBNET = SUPERNET.space.largest()
BLOCKS = SUPERNET.block_costs(SUBNET)
INPUTS = torch.randn(9, 1, 20, 20, generator=torch.Generator().manual_seed(7))
LABELS = torch.arange(9) % 5
SGD = LocalTraining(batch_size=4, epochs=2, learning_rate=0.02)
KINDS = ("full", "bias", "head", "last_blocks(1)", "lite_residual", "lora(2)", "sparse(0.3)")


def received():
    slices = SUPERNET.slice_map(SUBNET)
    return {name: np.array(values, order="C") for name, values in slices.extract(SUPERNET.state().tensors).items()}


def plan_of(kind, **levers):
    measured = measure_contributions(SUPERNET.build(SUBNET), BLOCKS, INPUTS, LABELS) if "sparse" in kind else None
    return replace(build_plan(kind, BLOCKS, contributions=measured), **levers)


def trained(model, plan, tensors):
    torch.manual_seed(5)
    return fine_tune(model, plan, tensors, INPUTS, LABELS, SGD, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "levers",
    [{"statistics": "batch"}, {"statistics": "frozen", "lean": True, "micro_batch": 1}],
    ids=["stock", "lean"],
)
def test_training_gives_the_bits_of_a_copy_and_leaves_what_was_received(kind, levers):
    plan, tensors = plan_of(kind, **levers), received()
    kept = {name: values.copy() for name, values in tensors.items()}
    copy = SUPERNET.assemble(SUBNET, {name: torch.from_numpy(values.copy()) for name, values in kept.items()})
    expected = trained(copy, plan, kept)
    module = SUPERNET.structure(SUBNET)
    for _ in range(2):  # the module as it is, and one that trained
        found = trained(hold(module, tensors, plan), plan, tensors)
        assert found.loss == expected.loss
        assert found.weights.keys() == expected.weights.keys()
        for name, values in expected.weights.items():
            np.testing.assert_array_equal(found.weights[name], values, err_msg=name)
        for name, factors in expected.low_rank.items():
            np.testing.assert_array_equal(found.low_rank[name].left, factors.left)
        for name, values in kept.items():
            np.testing.assert_array_equal(tensors[name], values, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_shared_where_it_is_counted_so(kind):
    plan, tensors = plan_of(kind, statistics="frozen"), received()
    module = hold(SUPERNET.structure(SUBNET), tensors, plan)
    state = module.state_dict()
    shared = {name for name, tensor in state.items() if np.shares_memory(tensor.numpy(), tensors[name])}
    assert shared == {name for name, tensor in state.items() if is_shared(name, tensor, plan)}
    assert not shared & set(plan.changes)
    assert bool(shared) == (kind != "full")
    sizes = {name: resident_bytes(tensor.nbytes) for name, tensor in state.items()}
    copies = sum(size for name, size in sizes.items() if name not in shared)
    assert held_bytes(state, plan) == sum(sizes.values()) + copies


def test_tensors_of_another_subnet_are_refused():
    tensors = received()
    tensors.pop(next(iter(tensors)))
    with pytest.raises(SpaceError):
        hold(SUPERNET.structure(SUBNET), tensors, plan_of("full"))
