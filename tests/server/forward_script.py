"""Prints the peak of a client's scoring and observing, the subnet's tensors included, and what is counted (bytes).

Arguments: the supernet's settings as overrides, joined by spaces; "smallest" or "largest"; examples; a batch's.
"""

import gc
import sys
from dataclasses import replace
from pathlib import Path

from fedofa.device.allocator import tune_allocator

tune_allocator()
import numpy as np  # noqa: E402
import torch  # noqa: E402

from conf.compose import compose_conf  # noqa: E402
from fedofa.device.cost import LocalWork, forward_bytes  # noqa: E402
from fedofa.evaluation.calibration import statistic_sums  # noqa: E402
from fedofa.evaluation.metrics import evaluate  # noqa: E402
from fedofa.finetune.inputs import stored_inputs  # noqa: E402
from fedofa.finetune.recipe import batch_bounds  # noqa: E402
from fedofa.supernet.families import build_supernet  # noqa: E402
from server.structure import describe_structure  # noqa: E402


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def main(overrides: str, which: str, num_examples: int, batch_size: int) -> None:
    torch.set_num_threads(1)
    conf = compose_conf(overrides.split())
    supernet = build_supernet(describe_structure(conf.supernet, 1, 10), torch.Generator().manual_seed(0))
    subnet = supernet.space.smallest() if which == "smallest" else supernet.space.largest()
    images = np.random.default_rng(0).integers(0, 256, (num_examples, 1, 28, 28), dtype=np.uint8)
    model = supernet.build(subnet)

    def observe(number: int) -> None:
        inputs = stored_inputs(images[:number], [0.5], [0.25], supernet.resolution(subnet))
        statistic_sums(model, (inputs[start:end] for start, end in batch_bounds(number, batch_size)))
        evaluate(model, inputs, torch.zeros(number, dtype=torch.int64), batch_size=batch_size)

    observe(num_examples)  # kernels are loaded, the code for the shapes is made
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    observe(num_examples)
    work = replace(LocalWork(num_examples, num_examples, 1), batch_size=batch_size)
    counted = forward_bytes(supernet.block_costs(subnet), work)
    print(resident("VmHWM") - before + sum(4 * item.numel() for item in model.state_dict().values()), counted)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
