"""Plans that fit a budget, and the memory model behind them, against processes that are measured (law 8)."""

import copy
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cohorts import build_supernet
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from fedofa.device.allocator import resident_bytes
from fedofa.finetune.budget import KINDS, BudgetError, plan_for_budget
from fedofa.finetune.inputs import ImageForm
from fedofa.finetune.memory import LiveBytes, TrainingMemory, scratch_bytes
from fedofa.finetune.plans import build_plan, choose_segments
from fedofa.finetune.recipe import LocalTraining
from fedofa.finetune.trainer import label_objective, run_steps
from fedofa.types.errors import ConfigError, InfeasibilityError

SUPERNET = build_supernet(norm="group")
BATCH_NORM = build_supernet(norm="batch")
SUBNET = SUPERNET.space.largest()
BLOCKS = SUPERNET.block_costs(SUBNET)
SHAPE = (1, 24, 24)
FORM = ImageForm(SHAPE)
TRAINING = LocalTraining(batch_size=8)
BENCHMARK = Path(__file__).parents[2] / "benchmarks/memory_budgets.py"


def plan_in(memory_bytes: int, **settings):
    return plan_for_budget(SUPERNET, SUBNET, TRAINING, 16, FORM, memory_bytes, **settings)


def test_live_bytes_follow_every_tensor_once_from_first_to_last():
    known = torch.zeros(100_000)
    one, two = resident_bytes(400_000), resident_bytes(800_000)
    with LiveBytes([known]) as live:
        a = known + 1
        b = a.view(10, 10_000)[1:].t()  # a view
        c = torch.cat([a, a])
        assert live.live == live.peak == one + two
        del a
        assert live.live == one + two
        del b, c
        assert live.live == 0
        known.add_(1)
    assert live.peak == one + two


def test_what_lite_residual_branches_bring_into_memory_counts_where_they_run():
    x = torch.zeros(1, 4, 8, 8, device="meta")
    with LiveBytes([x]) as plain:
        torch.nn.functional.avg_pool2d(x, 2)
    with LiveBytes([x]) as resizing:
        torch.nn.functional.interpolate(x, size=(16, 16), mode="bilinear", align_corners=False)
    assert (plain.resizes, resizing.resizes) == (False, True)
    without, beside = (TrainingMemory(1, 2, 3, 4, resizes) for resizes in (False, True))
    assert beside.total_bytes - without.total_bytes == 3 << 20


def test_planning_leaves_the_structures_that_share_parameters_as_they_were():
    plan_in(10**9, kinds=("head",))
    parameters = list(SUPERNET.structure(SUBNET).parameters())
    assert all(parameter.requires_grad and parameter.is_contiguous() for parameter in parameters)


def test_large_allocations_take_whole_pages_and_a_header():
    assert resident_bytes(1000) == 1000 + 96
    assert resident_bytes(10 * 4096 * 16) == (10 * 16 + 1) * 4096


def _measured_scratch(func, args):
    """What torch's profiler sees an operation take beside its results."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        results = func(*args)
    live = peak = 0
    for event in seen.profiler.kineto_results.events():
        live += event.nbytes() if event.name() == "[memory]" else 0
        peak = max(peak, live)
    results = results if isinstance(results, tuple) else (results,)
    return peak - sum(item.nbytes for item in results if item is not None)


@pytest.mark.parametrize(
    ("shape", "kernel", "stride"),
    [((960, 1, 1), 1, 1), ((80, 16, 16), 1, 1), ((64, 16, 16), 1, 2), ((64, 16, 16), 3, 1), ((64, 16, 16), 3, 2)],
)
def test_convolutions_of_one_small_example_take_columns_and_no_layouts_of_onednn(shape, kernel, stride):
    x = torch.randn(1, *shape).contiguous(memory_format=torch.channels_last)
    weight, aten = torch.randn(32, shape[0], kernel, kernel), torch.ops.aten
    geometry = ([stride] * 2, [kernel // 2] * 2, [1, 1], False, [0, 0], 1)
    forward = (x, weight, None, *geometry)
    assert scratch_bytes(aten.convolution.default, forward) == _measured_scratch(aten.convolution.default, forward)
    grad = aten.convolution.default(*forward).contiguous(memory_format=torch.channels_last)
    backward = (grad, x, weight, [32], *geometry, [False, True, False])
    found = scratch_bytes(aten.convolution_backward.default, backward)
    assert found == _measured_scratch(aten.convolution_backward.default, backward)


def test_a_large_budget_trains_whole_batches_and_a_smaller_one_halves_them():
    lean = plan_in(10**10)
    assert (lean.plan.name, lean.plan.levers) == ("full", frozenset({"lean"}))
    assert plan_in(lean.memory.total_bytes) == lean
    halved = plan_in(lean.memory.total_bytes - 1)
    assert (halved.plan.name, halved.plan.micro_batch) == ("full", 4)
    assert halved.memory.total_bytes < lean.memory.total_bytes


def test_a_budget_that_nothing_fits_names_the_smallest_that_would_do():
    message = r"no plan trains .* in 1,000 bytes; plan 'head.*' would in ([\d,]+):"
    with pytest.raises(InfeasibilityError, match=message) as caught:
        plan_in(1000, kinds=("head",))
    assert int(re.search(message, str(caught.value))[1].replace(",", "")) == caught.value.smallest_bytes
    with pytest.raises(ConfigError, match="at least one kind"):
        plan_in(1000, kinds=())


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=2, unique=True),
    statistics=st.sampled_from(["frozen", "batch"]),
    batch_size=st.integers(1, 9),
    num_examples=st.integers(1, 20),
    momentum=st.sampled_from([0.0, 0.9]),
    seed=st.integers(0, 100),
)
def test_exactly_the_smallest_budget_that_an_error_names_succeeds(
    kinds, statistics, batch_size, num_examples, momentum, seed
):
    supernet = SUPERNET if seed % 2 else BATCH_NORM
    subnet = supernet.space.sample(np.random.default_rng(seed))
    training = LocalTraining(batch_size=batch_size, momentum=momentum)

    def plan(memory_bytes):
        options = {"kinds": kinds, "statistics": statistics}
        return plan_for_budget(supernet, subnet, training, num_examples, FORM, memory_bytes, **options)

    with pytest.raises(BudgetError) as caught:
        plan(0)
    smallest = caught.value.smallest_bytes
    assert plan(smallest).memory.total_bytes == smallest
    with pytest.raises(BudgetError):
        plan(smallest - 1)


def test_levers_come_in_the_order_of_their_cost_and_the_plan_says_why():
    budget, names = 10**10, []
    while True:
        try:
            found = plan_in(budget, kinds=("full",))
        except BudgetError:
            break
        assert budget == 10**10 or f"of {budget:,} bytes" in found.reason
        names.append(found.plan)
        budget = found.memory.total_bytes - 1
    assert [plan.micro_batch for plan in names] == [0, 4, 2, 1, 1, 1]
    assert [plan.kept for plan in names] == [*4 * ["float32"], "bfloat16", "int8"]  # segments gain nothing here
    assert all("recompute" in plan.levers for plan in names[4:])
    alone = plan_for_budget(SUPERNET, SUBNET, TRAINING, 1, FORM, 10**10)
    fused = plan_for_budget(SUPERNET, SUBNET, TRAINING, 1, FORM, alone.memory.total_bytes - 1)
    assert (alone.plan.levers, fused.plan.levers) == (frozenset({"lean"}), frozenset({"lean", "fused_step"}))


@pytest.mark.parametrize(
    "levers", [{}, {"micro_batch": 2}, {"recompute": True}, {"kept": "int8"}, {"fused_step": True}]
)
def test_shapes_alone_tell_what_a_real_step_takes(levers):
    """The same steps on the meta device and on the CPU, whose convolutions may lay their results out otherwise."""
    plan = build_plan("full", BLOCKS, lean=True)
    levers = {**levers, "recompute": choose_segments(BLOCKS, plan.trainable)} if "recompute" in levers else levers
    meta, real = _peaks(SUPERNET, replace(plan, **levers))
    assert meta == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize("statistics", ["frozen", "batch"])
def test_shapes_alone_tell_what_batch_norm_takes(statistics):
    blocks = BATCH_NORM.block_costs(BATCH_NORM.space.largest())
    meta, real = _peaks(BATCH_NORM, build_plan("full", blocks, statistics=statistics, lean=True))
    assert meta == pytest.approx(real, rel=0.05)


def _peaks(supernet, plan):
    """Of a step of the largest subnet, on the meta device and on the CPU."""
    subnet = supernet.space.largest()
    recipe = LocalTraining(batch_size=4, momentum=0.0, max_steps=1)
    peaks = []
    for device, model in (("meta", copy.deepcopy(supernet.structure(subnet))), ("cpu", supernet.build(subnet))):
        inputs, labels = torch.zeros(4, *SHAPE, device=device), torch.zeros(4, dtype=torch.int64, device=device)
        with LiveBytes((inputs, *model.parameters(), *model.buffers())) as live:
            run_steps(model, plan, inputs, recipe, torch.Generator(), label_objective(labels, 0.0))
        peaks.append(live.peak)
    return peaks


def test_segments_cover_the_chain_in_order_and_keep_less_than_one_or_all():
    segments = choose_segments(BLOCKS, build_plan("full", BLOCKS).trainable)
    covered = [name for segment in segments for name in segment]
    chain = [block for block in BLOCKS if block.name in covered]
    assert covered == [block.name for block in chain]
    assert covered[-1].startswith("stages.")

    def kept(parts):
        inside = max(sum(block.saved_elements for block in part) for part in parts)
        return sum(part[0].input_elements for part in parts) + inside

    named = {block.name: block for block in BLOCKS}
    best = kept([[named[name] for name in segment] for segment in segments])
    assert best <= min(kept([chain]), kept([[block] for block in chain]))


@pytest.mark.slow
@pytest.mark.timeout(1800)  # 20 processes that train, one after the other
def test_law_8_the_measured_peak_never_exceeds_the_figure(tmp_path):
    """20 random (subnet, budget) pairs, each trained in a process of its own."""
    command = [sys.executable, str(BENCHMARK), "--pairs", "20", "--rows", str(tmp_path / "rows.jsonl")]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARK.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = dict(item.split("=") for item in done.stdout.splitlines()[-1].split())
    assert counts["pairs"] == "20"
    assert counts["exceeded"] == "0", done.stdout
    assert int(counts["within"]) >= 18, done.stdout
