"""Trains a received subnet on 16 images, as a client does, in the memory that the process has.

`stock` is plain torch: everything trains, in batches of 16. `lean` prints the bytes that the process holds before it
trains, reads a plan from standard input and trains under it. Both print a JSON line when the steps are done.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedofa.device.allocator import tune_allocator
from fedofa.finetune.holding import hold
from fedofa.finetune.inputs import stored_inputs
from fedofa.finetune.memory import warm_up
from fedofa.finetune.trainer import LocalTraining, fine_tune
from fedofa.supernet.families import build_supernet
from fedofa.types.plan import FineTunePlan

NUM_EXAMPLES, SIDE, BATCH_SIZE = 16, 128, 16


def held_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def stock(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> None:
    optimiser = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    model.train()
    for _ in range(2):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimiser.step()
    print(json.dumps({"done": True}))


def main() -> None:
    torch.set_num_threads(1)
    tune_allocator()
    warm_up()
    print(held_bytes(), flush=True)
    plan = sys.stdin.readline()
    supernet = build_supernet(json.loads(sys.argv[2]))
    subnet = supernet.space.largest()
    rng = np.random.default_rng(0)
    received = {
        item.name: np.full(item.shape, 1, np.float32)
        if item.role == "statistic" or len(item.shape) == 1
        else rng.normal(0, np.sqrt(2 / np.prod(item.shape[1:])), item.shape).astype(np.float32)
        for item in supernet.slice_map(subnet)
    }
    inputs = stored_inputs(rng.integers(256, size=(NUM_EXAMPLES, 3, SIDE, SIDE), dtype=np.uint8), [0.5] * 3, [0.25] * 3)
    labels = torch.arange(NUM_EXAMPLES) % 10
    if sys.argv[1] == "stock":
        model = supernet.assemble(subnet, {name: torch.tensor(values) for name, values in received.items()})
        stock(model, inputs[:], labels)
        return
    training = LocalTraining(batch_size=BATCH_SIZE, max_steps=2, learning_rate=0.01)
    chosen = FineTunePlan.from_json(json.loads(plan))
    model = hold(supernet.structure(subnet), received, chosen)
    result = fine_tune(model, chosen, received, inputs, labels, training, torch.Generator().manual_seed(0))
    moved = sum(float(np.abs(values).max()) > 0 for values in result.weights.values())
    print(
        json.dumps({"done": True, "steps": result.num_steps, "moved": moved, "finite": np.isfinite(result.loss).item()})
    )


if __name__ == "__main__":
    main()
