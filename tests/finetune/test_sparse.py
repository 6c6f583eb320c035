"""What a sparse plan trains: contributions as they are measured, and the choice made of them under a budget."""

import itertools

import numpy as np
import pytest
import torch
from cohorts import build_supernet
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from fedofa.finetune.engine import planned
from fedofa.finetune.plans import build_plan
from fedofa.finetune.probing import measure_contributions
from fedofa.finetune.sparse import FRACTIONS, BlockContribution, Contributions, WeightContribution
from fedofa.types.errors import DatasetError

SUPERNET = build_supernet(norm="group")
SUBNET = SUPERNET.space.largest()
BLOCKS = SUPERNET.block_costs(SUBNET)
INPUTS = torch.randn(40, 1, 20, 20, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(40) % 5
gains = st.floats(0, 1e3).map(lambda value: round(value, 3))


@pytest.fixture(scope="module")
def measured() -> Contributions:
    return measure_contributions(SUPERNET.build(SUBNET), BLOCKS, INPUTS, LABELS)


def loss_of(model) -> torch.Tensor:
    return functional.cross_entropy(model(INPUTS.to(next(model.parameters()).dtype)), LABELS)


def test_a_contribution_is_the_loss_that_a_small_step_takes_away(measured):
    """Each weight alone, and its leading half: the loss falls by rate * squared norm, to first order."""
    for weight in (item for block in measured.blocks for item in block.weights if item.gain(1.0) > 1e-8):
        for fraction in (0.5, 1.0):
            model = SUPERNET.build(SUBNET).double().eval()
            before = loss_of(model)
            before.backward()
            parameter, count = model.get_parameter(weight.name), int(np.ceil(fraction * len(weight.squared)))
            part = (slice(count),) if parameter.shape[1] == 1 else (slice(None), slice(count))
            rate = 1e-6 / weight.gain(1.0) ** 0.5
            with torch.no_grad():
                parameter[part] -= rate * parameter.grad[part]
                fall = float(before - loss_of(model))
            assert fall == pytest.approx(rate * weight.gain(fraction), rel=2e-3), (weight.name, fraction)


def test_every_weight_and_bias_is_measured(measured):
    assert [block.name for block in measured.blocks] == [block.name for block in BLOCKS]
    weights = {item.name for block in BLOCKS for item in block.parameters if item.role == "weight"}
    assert {item.name for block in measured.blocks for item in block.weights} == weights
    by_name = {item.name: item for block in measured.blocks for item in block.weights}
    expand = by_name["stages.1.0.expand.conv.weight"]
    assert (expand.positions, expand.row_values, len(expand.squared)) == (100, 24, 8)
    depthwise = by_name["stages.1.0.depthwise.conv.weight"]
    assert (depthwise.positions, depthwise.row_values, len(depthwise.squared)) == (100, 49, 24)
    assert expand.cost(0.5) == 4 * (100 + 2 * 24)
    assert sum(block.kept_values for block in measured.blocks) > 0
    assert measured.blocks[-1].kept_values == 0, "the head's input is no bias's business"


def test_two_measurements_make_the_same_choices(measured):
    again = measure_contributions(SUPERNET.build(SUBNET), BLOCKS, INPUTS, LABELS)
    for fraction in (0.05, 0.2, 0.6):
        assert again.choice(fraction) == measured.choice(fraction)
    with pytest.raises(DatasetError, match="expected at least 1, found none"):
        measure_contributions(SUPERNET.build(SUBNET), BLOCKS, INPUTS[:0], LABELS[:0])


def cost_of(contributions: Contributions, choice) -> int:
    """What a choice takes, counted anew."""
    *body, head = contributions.blocks
    by_name = {weight.name: weight for block in body for weight in block.weights}
    biases = sum(block.bias_cost for block in body if block.name in choice.blocks)
    return head.full_cost + biases + sum(by_name[name].cost(part) for name, part in choice.fractions)


def gain_of(contributions: Contributions, choice) -> float:
    by_name = {weight.name: weight for block in contributions.blocks for weight in block.weights}
    biases = sum(block.bias_squared for block in contributions.blocks if block.name in choice.blocks)
    return biases + sum(by_name[name].gain(part) for name, part in choice.fractions)


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.25, 0.5, 0.75, 0.99])
def test_a_choice_keeps_to_its_budget_and_to_the_last_blocks(measured, fraction):
    choice = measured.choice(fraction)
    budget = fraction * sum(block.full_cost for block in measured.blocks)
    assert cost_of(measured, choice) <= max(budget, measured.blocks[-1].full_cost)
    names = [block.name for block in measured.blocks[:-1]]
    assert choice.blocks == frozenset(names[len(names) - len(choice.blocks) :])
    owners = {weight.name: block.name for block in measured.blocks for weight in block.weights}
    assert all(owners[name] in choice.blocks and part in FRACTIONS for name, part in choice.fractions)


def test_with_everything_allowed_all_that_contributes_trains_whole(measured):
    choice = measured.choice(1.0)
    contributing = [w.name for b in measured.blocks[:-1] for w in b.weights if w.gain(1.0) > 0]
    assert [name for name, _ in choice.fractions] == contributing
    assert {part for _, part in choice.fractions} == {1.0}
    plan = build_plan("sparse(1)", BLOCKS, contributions=measured)
    assert plan.fractions == ()
    assert {*contributing, "classifier.weight", "classifier.bias"} <= set(plan.trainable)


@st.composite
def small_contributions(draw) -> Contributions:
    """Up to three weights of up to eight channels in two blocks, and a head."""
    blocks = []
    for number in range(2):
        weights = [
            WeightContribution(
                f"b{number}.w{place}",
                draw(st.integers(1, 50)),
                draw(st.integers(1, 20)),
                tuple(draw(st.lists(gains, min_size=1, max_size=8))),
            )
            for place in range(draw(st.integers(0, 2)))
        ]
        blocks.append(BlockContribution(f"b{number}", draw(st.integers(0, 30)), 2, draw(gains), tuple(weights)))
    return Contributions([*blocks, BlockContribution("head", 0, 1, 1.0, ())])


@settings(max_examples=60, deadline=None)
@given(small_contributions(), st.floats(0.05, 1.0))
def test_the_greedy_choice_is_within_one_increment_of_the_best(contributions, fraction):
    """Against every combination; what greedy misses is less than the largest gain of one weight."""
    *body, head = contributions.blocks
    budget = fraction * sum(block.full_cost for block in contributions.blocks)
    found = contributions.choice(fraction)
    if found.blocks:
        assert cost_of(contributions, found) <= budget
    best = 0.0
    for start in range(len(body)):
        reached = body[start:]
        weights = [weight for block in reached for weight in block.weights]
        fixed = head.full_cost + sum(block.bias_cost for block in reached)
        biases = sum(block.bias_squared for block in reached)
        for parts in itertools.product((0.0, *FRACTIONS), repeat=len(weights)):
            taken = [(weight, part) for weight, part in zip(weights, parts, strict=True) if part]
            if fixed + sum(weight.cost(part) for weight, part in taken) <= budget:
                best = max(best, biases + sum(weight.gain(part) for weight, part in taken))
    slack = max((weight.gain(1.0) for block in body for weight in block.weights), default=0.0)
    assert best - slack - 1e-9 <= gain_of(contributions, found) <= best + 1e-9


def test_what_is_kept_of_a_sparse_plan_is_what_was_budgeted(measured):
    """One example through the network: autograd keeps no more values than the choice counts as kept."""
    plan = build_plan("sparse(0.3)", BLOCKS, statistics="frozen", lean=True, contributions=measured)
    model = SUPERNET.build(SUBNET)
    by_name = {weight.name: weight for block in measured.blocks for weight in block.weights}
    budget = sum(block.kept_values for block in measured.blocks if block.name in measured.choice(0.3).blocks)
    for name in plan.trainable:
        if name in by_name:
            weight = by_name[name]
            count = plan.part_shape(name, tuple(model.get_parameter(name).shape))
            budget += weight.positions * (count[0] if count[1] == 1 else count[1])
    kept, seen = 0, []
    with planned(model, plan):
        own = {item.untyped_storage().data_ptr() for item in (*model.parameters(), *model.buffers())}

        def pack(tensor):
            nonlocal kept
            if tensor.untyped_storage().data_ptr() not in own | {t.untyped_storage().data_ptr() for t in seen}:
                seen.append(tensor)
                kept += tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda item: item):
            model(INPUTS[:1])
    assert 0 < kept <= 4 * budget
