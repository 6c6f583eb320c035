"""Plans that fit a budget, and the memory model behind them, against processes that are measured (law 8)."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cohorts import build_supernet

from fedofa.finetune.budget import plan_for_budget
from fedofa.finetune.memory import LiveBytes, training_memory
from fedofa.finetune.plans import build_plan, choose_segments
from fedofa.finetune.recipe import LocalTraining
from fedofa.types.errors import ConfigError, InfeasibilityError

SUPERNET = build_supernet(norm="group")
SUBNET = SUPERNET.space.largest()
BLOCKS = SUPERNET.block_costs(SUBNET)
SHAPE = (1, 24, 24)
TRAINING = LocalTraining(batch_size=8)
MEASURE = Path(__file__).with_name("measured_run.py")


def plan_in(memory_bytes: int, **settings):
    return plan_for_budget(SUPERNET, SUBNET, TRAINING, 16, SHAPE, memory_bytes, **settings)


def test_live_bytes_follow_every_tensor_once_from_first_to_last():
    known = torch.zeros(1000)
    with LiveBytes([known]) as live:
        a = known + 1  # 4000
        b = a.view(10, 100)[1:].t()  # a view
        c = torch.cat([a, a])  # 8000
        assert live.live == live.peak == 12000
        del a
        assert live.live == 12000
        del b, c
        assert live.live == 0
        known.add_(1)
    assert live.peak == 12000


def test_a_large_budget_trains_whole_batches_and_a_smaller_one_halves_them():
    lean = plan_in(10**10)
    assert (lean.plan.name, lean.plan.levers) == ("full", frozenset({"lean"}))
    assert plan_in(lean.memory.total_bytes) == lean
    halved = plan_in(lean.memory.total_bytes - 1)
    assert (halved.plan.name, halved.plan.micro_batch) == ("full", 4)
    assert halved.memory.total_bytes < lean.memory.total_bytes


def test_a_budget_that_nothing_fits_names_the_smallest_that_would_do():
    message = r"no plan trains .* in 1,000 bytes; plan 'head' would in ([\d,]+):"
    with pytest.raises(InfeasibilityError, match=message) as caught:
        plan_in(1000, kinds=("head",))
    least = int(re.search(message, str(caught.value))[1].replace(",", ""))
    assert plan_in(least, kinds=("head",)).memory.total_bytes == least
    with pytest.raises(ConfigError, match="at least one kind"):
        plan_in(1000, kinds=())


def test_estimating_leaves_the_weights_alone():
    model = SUPERNET.build(SUBNET)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    training_memory(model, build_plan("full", BLOCKS, lean=True, micro_batch=2), TRAINING, 16, SHAPE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


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
def test_law_8_the_measured_peak_never_exceeds_the_figure():
    """20 random (subnet, budget) pairs, each trained in a process of its own."""
    rows = []
    for seed in range(20):
        command = [sys.executable, str(MEASURE), json.dumps({"seeds": [seed]})]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
        assert done.returncode == 0, done.stderr[-2000:]
        rows += [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 20
    over = [row for row in rows if row["measured"] > row["figure"]]
    assert not over
    assert min(row["measured"] for row in rows) > 0
