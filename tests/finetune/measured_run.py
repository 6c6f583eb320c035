"""Trains random subnets under random budgets and prints what was planned and what was measured: `{"seeds": [...]}`.

Memory is read from /proc of this process, which is reset before every run.
"""

import gc
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fedofa.finetune.budget import plan_for_budget
from fedofa.finetune.memory import tune_allocator
from fedofa.finetune.plans import build_plan
from fedofa.finetune.recipe import LocalTraining
from fedofa.finetune.trainer import fine_tune
from fedofa.supernet.base import Supernet
from fedofa.supernet.mobilenet_v3 import MobileNetV3Spec, MobileNetV3Supernet
from fedofa.types.errors import InfeasibilityError
from fedofa.types.plan import FineTunePlan
from fedofa.types.space import SubnetConfig

TRAINING = LocalTraining(batch_size=8, max_steps=2)
NUM_EXAMPLES = 16


def build(norm: str, width: float) -> Supernet:
    spec = replace(MobileNetV3Spec(), norm=norm, num_classes=20, resolutions=(64, 96, 128, 160))
    return MobileNetV3Supernet(spec.scaled(width), torch.Generator().manual_seed(0))


def train(supernet: Supernet, subnet: SubnetConfig, plan: FineTunePlan, num_examples: int) -> None:
    """As a client does: a model, the received weights beside it, all examples in memory."""
    model, side = supernet.build(subnet), supernet.resolution(subnet)
    received = {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}
    inputs, labels = torch.zeros(num_examples, 3, side, side), torch.arange(num_examples) % 20
    fine_tune(model, plan, received, inputs, labels, TRAINING, torch.Generator().manual_seed(0))


def resident(field: str) -> int:
    """Bytes, "VmRSS" now or "VmHWM" at most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(seed: int) -> dict:
    """One random subnet under one random budget."""
    rng = np.random.default_rng(seed)
    supernet = build(str(rng.choice(["group", "batch"])), float(rng.choice([0.35, 0.6, 1.0])))
    subnet = supernet.space.sample(rng)
    side = supernet.resolution(subnet)
    budget, found = int(10 ** rng.uniform(7.3, 8.5)), None
    while found is None:
        try:
            found = plan_for_budget(supernet, subnet, TRAINING, NUM_EXAMPLES, (3, side, side), budget)
        except InfeasibilityError:
            budget *= 2
    gc.collect()
    base = resident("VmRSS")
    forget_peak()
    train(supernet, subnet, found.plan, NUM_EXAMPLES)
    measured = resident("VmHWM") - base
    levers = sorted(found.plan.levers)
    figure = found.memory.total_bytes
    return {
        "seed": seed,
        "budget": budget,
        "plan": found.plan.name,
        "levers": levers,
        "figure": figure,
        "measured": measured,
    }


def main() -> None:
    torch.set_num_threads(1)
    tune_allocator()
    warm = build("group", 0.35)
    smallest = warm.space.smallest()
    train(warm, smallest, build_plan("full", warm.block_costs(smallest), lean=True), 8)  # loads torch's kernels
    for seed in json.loads(sys.argv[1])["seeds"]:
        print(json.dumps(measure(seed)), flush=True)


if __name__ == "__main__":
    main()
