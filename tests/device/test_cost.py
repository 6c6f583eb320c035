"""The counted cost of a round: one example by hand, and what must hold for every subnet and plan."""

from dataclasses import replace

import numpy as np
import pytest
from cohorts import build_supernet, seeds
from hypothesis import given, settings

from fedofa.device.cost import AnalyticCostModel, LocalWork, RoundCost
from fedofa.finetune.plans import build_plan
from fedofa.supernet.costs import BlockCost
from fedofa.supernet.network import ParameterSpec
from fedofa.types.device import DeviceProfile
from fedofa.types.plan import FineTunePlan

PROFILE = DeviceProfile("board", 1e9, 1000.0, 10.0, 40.0)
WORK = LocalWork(num_examples=6, num_samples=12, batch_size=4, optimiser_slots=1, wire_bytes=2)
SUPERNET = build_supernet()
MODEL = AnalyticCostModel()
TOTALS = ("macs", "num_parameters", "training_bytes", "download_bytes", "upload_bytes", "round_seconds")


def block(name: str, macs: int, saved: int, inputs: int, outputs: int, widest: int, parameters: int) -> BlockCost:
    return BlockCost(
        name, macs, saved, inputs, outputs, widest, (ParameterSpec(f"{name}.w", (parameters,), (None,), "weight"),)
    )


BLOCKS = (
    block("stem", 100, 7, 5, 6, 11, 20),
    block("stages.0.0", 200, 30, 6, 8, 17, 50),
    block("head", 10, 8, 8, 2, 8, 9),
)


def test_a_full_round_by_hand():
    cost = MODEL.cost(BLOCKS, FineTunePlan("full", ("stem.w", "stages.0.0.w", "head.w")), PROFILE, WORK)
    values = 2 * 79 + 79 * (1 + 1)  # weights, received copy, gradients, momentum
    assert cost == RoundCost(
        macs=310,
        num_parameters=79,
        training_bytes=4 * (values + (4 + 1) * (7 + 30 + 8 + 2 * 17) + WORK.num_examples * BLOCKS[0].input_elements),
        download_bytes=158,
        upload_bytes=158,
        download_seconds=158 / 40,
        compute_seconds=3 * 310 * 12 / 1000,
        upload_seconds=158 / 10,
    )
    assert cost.round_seconds == pytest.approx(3.95 + 11.16 + 15.8)
    assert cost.longest_part == "uplink"


def test_a_teacher_by_hand():
    """It comes with the subnet, sees every example once, and only its tensors and logits stay."""
    plan = FineTunePlan("full", ("stem.w", "stages.0.0.w", "head.w"))
    teacher = (block("stem", 1000, 70, 9, 60, 110, 200), block("head", 100, 80, 80, 2, 80, 90))
    alone, taught = MODEL.cost(BLOCKS, plan, PROFILE, WORK), MODEL.cost(BLOCKS, plan, PROFILE, WORK, teacher)
    assert taught.download_bytes == alone.download_bytes + 2 * 290
    assert (taught.upload_bytes, taught.macs, taught.num_parameters) == (158, 310, 79)
    assert taught.compute_seconds == pytest.approx(alone.compute_seconds + 1100 * 6 / 1000)
    forward = 4 * (2 * 290 + 79 + (9 + 4 * 110) * 5 + 6 * (9 + 2))
    assert forward > alone.training_bytes + 4 * (290 + 6 * 2)
    assert taught.training_bytes == forward
    small = (block("head", 100, 80, 8, 2, 8, 5),)
    stays = MODEL.cost(BLOCKS, plan, PROFILE, WORK, small).training_bytes
    assert stays == alone.training_bytes + 4 * (5 + 6 * 2)


def test_composed_kernels_count_once_a_step_with_their_gradients():
    plan = FineTunePlan("full", ("stem.w", "stages.0.0.w", "head.w"))
    composed = (BLOCKS[0], replace(BLOCKS[1], step_elements=13), BLOCKS[2])
    plain, more = (MODEL.cost(blocks, plan, PROFILE, WORK).training_bytes for blocks in (BLOCKS, composed))
    assert more - plain == 4 * 2 * 13


@settings(max_examples=15, deadline=None)
@given(seeds)
def test_a_parametrised_subnets_bytes_are_those_of_its_tensors(seed):
    subnet = SUPERNET.space.sample(np.random.default_rng(seed))
    blocks, slices = SUPERNET.costs(subnet, True), SUPERNET.slice_map(subnet, True)
    cost = MODEL.cost(blocks, build_plan("full", blocks, parametrised=True), PROFILE, WORK)
    values = sum(int(np.prod(item.shape)) for item in slices)
    assert cost.download_bytes == cost.upload_bytes == 2 * values
    assert cost.num_parameters == values


def test_a_recomputed_partial_round_by_hand():
    plan = FineTunePlan("last", ("stages.0.0.w", "head.w"), (("stages.0.0",),))
    cost = MODEL.cost(BLOCKS, plan, PROFILE, replace(WORK, optimiser_slots=2, num_examples=3))
    batch = 3  # the client has no more
    values = 2 * 79 + 59 * (1 + 2)
    inputs = 3 * BLOCKS[0].input_elements
    assert cost.training_bytes == 4 * (values + batch * (6 + (30 - 6) + 8 + 2 * 17) + inputs)
    assert cost.upload_bytes == 59 * 2
    assert cost.download_bytes == 79 * 2
    assert cost.compute_seconds == pytest.approx((310 + 3 * 200 + 2 * 10) * 12 / 1000)


@pytest.mark.parametrize(
    ("profile", "part"),
    [
        (replace(PROFILE, uplink_bytes_per_second=1e-3), "uplink"),
        (replace(PROFILE, downlink_bytes_per_second=1e-3), "downlink"),
        (replace(PROFILE, macs_per_second=1e-3), "compute"),
    ],
)
def test_the_longest_part_is_named(profile, part):
    assert MODEL.cost(BLOCKS, FineTunePlan("full", ("head.w",)), profile, WORK).longest_part == part


def price(subnet, name: str = "full", **settings_of_plan) -> RoundCost:
    blocks = SUPERNET.block_costs(subnet)
    return MODEL.cost(blocks, build_plan(name, blocks, **settings_of_plan), PROFILE, WORK)


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_a_larger_subnet_never_costs_less(seed):
    """Along every step that raises one choice; each total grows or stays, and one of them grows."""
    rng = np.random.default_rng(seed)
    space = SUPERNET.space
    subnet = space.sample(rng)
    for name in ("full", "last_blocks(2)", "bias"):
        for recompute in (False, True):
            cost = price(subnet, name, recompute=recompute)
            for neighbour in space.neighbours(subnet, rng):
                smaller, larger = price(neighbour, name, recompute=recompute), cost
                if sum(map(sum, (row for _, row in neighbour.choices))) > sum(
                    map(sum, (row for _, row in subnet.choices))
                ):
                    smaller, larger = larger, smaller
                fields = TOTALS if name != "last_blocks(2)" else ("macs", "num_parameters", "download_bytes")
                pairs = [(getattr(smaller, field), getattr(larger, field)) for field in fields]
                assert all(a <= b for a, b in pairs), (subnet, neighbour)
                assert any(a < b for a, b in pairs)


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_recomputation_trades_time_for_memory_and_partial_plans_cost_less(seed):
    subnet = SUPERNET.space.sample(np.random.default_rng(seed))
    plain, again, head = price(subnet), price(subnet, recompute=True), price(subnet, "head")
    last, bias = price(subnet, "last_blocks(1)"), price(subnet, "bias")
    assert again.training_bytes < plain.training_bytes
    assert again.compute_seconds > plain.compute_seconds
    assert (again.upload_bytes, again.macs) == (plain.upload_bytes, plain.macs)
    for cheaper, dearer in ((head, last), (last, plain), (head, bias), (bias, plain)):
        assert cheaper.training_bytes < dearer.training_bytes
        assert cheaper.upload_bytes < dearer.upload_bytes
        assert cheaper.compute_seconds <= dearer.compute_seconds
        assert cheaper.download_bytes == dearer.download_bytes
    assert head.compute_seconds < last.compute_seconds < plain.compute_seconds


def test_the_download_is_the_payloads_values():
    supernet = build_supernet(norm="batch")
    subnet = supernet.space.largest()
    blocks = supernet.block_costs(subnet)
    payload = sum(tensor.numel() for tensor in supernet.build(subnet).state_dict().values()) * WORK.wire_bytes
    assert MODEL.cost(blocks, build_plan("full", blocks), PROFILE, WORK).download_bytes == payload


def test_micro_batches_keep_less_and_the_batch_waits_beside_them():
    plan = FineTunePlan("full", ("stem.w", "stages.0.0.w", "head.w"))
    whole, micro = (MODEL.cost(BLOCKS, replace(plan, micro_batch=size), PROFILE, WORK) for size in (0, 2))
    per_example = 7 + 30 + 8 + 2 * 17
    waiting = 3 * BLOCKS[0].input_elements
    assert whole.training_bytes - micro.training_bytes == 4 * (3 * per_example - waiting)
    assert micro.compute_seconds == whole.compute_seconds


def test_what_trains_in_part_or_by_factors_is_counted_as_it_travels():
    weight = ParameterSpec("head.w", (4, 6), (None, None), "weight")
    head = BlockCost("head", 10, 8, 8, 2, 8, (weight,))
    blocks = (BLOCKS[0], head)
    whole = MODEL.cost(blocks, FineTunePlan("whole", ("head.w",)), PROFILE, WORK)
    part = MODEL.cost(blocks, FineTunePlan("part", ("head.w",), fractions=(("head.w", 0.5),)), PROFILE, WORK)
    pair = MODEL.cost(blocks, FineTunePlan("pair", (), low_rank=("head.w",), rank=1), PROFILE, WORK)
    assert [cost.upload_bytes for cost in (whole, part, pair)] == [2 * 24, 2 * 12, 2 * (4 + 6)]
    assert whole.training_bytes - part.training_bytes == 4 * 2 * 12  # gradients and momentum
    assert pair.compute_seconds == whole.compute_seconds
