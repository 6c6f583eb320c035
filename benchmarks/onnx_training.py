"""What training takes without torch: `python benchmarks/onnx_training.py`, one thread, micro-batch 1.

MobileNetV2-like networks of 100 classes; each row is a process of its own. `engine` is what the process holds before
it has a task: the interpreter, numpy and ONNX Runtime or torch; `process` the most of the whole process; `step` the
CPU time of one example's forward and backward pass, the least of several, and `ratio` that over torch's of the same
plan with lean operations and micro-batch 1. No measured process makes its own task or plan: a sparse plan is chosen
by what layers contribute on random images, which takes memory.

The last line is for machines.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

_CLASSES, _EXAMPLES, _REPEATS = 100, 4, 4
SIZES = ((0.35, 96), (1.0, 224))
_PROBED = 8
"""Random examples on which the layers' contributions are measured."""
PLANS = ("head", "bias", "last_blocks(4)", "sparse(0.1)", "sparse(0.25)", "full")


def resident(field: str) -> float:
    """Megabytes of this process: "VmRSS" now, "VmHWM" at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(field))


def least_seconds(train: Callable[[], object]) -> float:
    """CPU seconds that one example takes."""
    train()
    seconds = []
    for _ in range(_REPEATS):
        began = time.thread_time()
        train()
        seconds.append((time.thread_time() - began) / _EXAMPLES)
    return min(seconds)


def examples(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Stored images and labels."""
    images = np.random.default_rng(0).integers(0, 256, (_EXAMPLES, 3, side, side)).astype(np.uint8)
    return images, np.arange(_EXAMPLES) % _CLASSES


def recipe():
    """One epoch, one step."""
    from fedofa.finetune.recipe import LocalTraining

    return LocalTraining(batch_size=_EXAMPLES, learning_rate=1e-3)


NORMALISATION = {"mean": [0.5] * 3, "std": [0.25] * 3}


def build(width: float, side: int):
    """The supernet."""
    from dataclasses import replace

    import torch

    from fedofa.supernet.chain import ChainSupernet
    from fedofa.supernet.network import make_divisible
    from fedofa.supernet.ready_made import READY_MADE

    torch.set_num_threads(1)
    whole = READY_MADE["mobilenet_v2"]
    blocks = tuple(replace(block, width=make_divisible(block.width * width)) for block in whole.blocks)
    sizes = {"stem_width": make_divisible(whole.stem_width * width), "resolutions": (side,), "fractions": (1.0,)}
    spec = replace(whole, num_classes=_CLASSES, blocks=blocks, **sizes)
    return ChainSupernet(spec, torch.Generator().manual_seed(0))


def make_plan(kind: str, supernet, side: int):
    """The largest subnet's plan."""
    import torch

    from fedofa.finetune.plans import build_plan, needs_contributions
    from fedofa.finetune.probing import measure_contributions

    subnet = supernet.space.largest()
    blocks, contributions = supernet.block_costs(subnet), None
    if needs_contributions([kind]):
        images = torch.randn(_PROBED, 3, side, side, generator=torch.Generator().manual_seed(1))
        contributions = measure_contributions(supernet.build(subnet), blocks, images, torch.arange(_PROBED))
    return build_plan(kind, blocks, statistics="frozen", lean=True, contributions=contributions)


def compile_task(kind: str, width: float, side: int, folder: str) -> None:
    """Write what the server would send, the task with its graph and tensors, and beside it the plan."""
    from dataclasses import asdict

    from fedofa.finetune.onnx_network import compile_step
    from fedofa.update.exchange import ClientTask, encode_task

    supernet = build(width, side)
    subnet, plan = supernet.space.largest(), make_plan(kind, supernet, side)
    step = compile_step(supernet.network_spec(subnet), plan)
    tensors = {name: tensor.detach().numpy() for name, tensor in supernet.build(subnet).state_dict().items()}
    training = asdict(recipe())
    task = ClientTask(1, 0, subnet, plan, supernet.description(), training, NORMALISATION, 0, graph=step.graph)
    Path(folder, "task").write_bytes(encode_task(task, step.feed(tensors)))
    Path(folder, "plan.json").write_text(json.dumps(plan.to_json()))


def run_onnxruntime(folder: str, side: int) -> dict[str, float]:
    """Train as a client without torch does."""
    from clients import onnx_engine
    from fedofa.data.federation import Examples
    from fedofa.update.exchange import decode_task

    engine = resident("VmRSS")
    task, received = decode_task(Path(folder, "task").read_bytes())
    held = Examples(*examples(side))
    seconds = least_seconds(lambda: onnx_engine.train(held, task, received, "client"))
    found = {"engine": engine, "process": resident("VmHWM"), "step": 1e3 * seconds}
    if "torch" in sys.modules:
        raise RuntimeError("torch was imported; expected a process without it")
    return found


def run_torch(folder: str, width: float, side: int) -> dict[str, float]:
    """Train the same with torch, lean operations, micro-batch 1."""
    from dataclasses import replace

    import torch

    from fedofa.device.allocator import tune_allocator
    from fedofa.finetune.inputs import prepare_inputs
    from fedofa.finetune.trainer import fine_tune
    from fedofa.types.plan import FineTunePlan

    tune_allocator()
    engine = resident("VmRSS")
    supernet = build(width, side)
    plan = FineTunePlan.from_json(json.loads(Path(folder, "plan.json").read_text()))
    plan, model = replace(plan, micro_batch=1), supernet.build(supernet.space.largest())
    received = {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}
    images, labels = examples(side)

    def train() -> None:
        inputs = prepare_inputs(images, NORMALISATION["mean"], NORMALISATION["std"], side)
        fine_tune(model, plan, received, inputs, torch.from_numpy(labels), recipe(), torch.Generator().manual_seed(0))

    seconds = least_seconds(train)
    return {"engine": engine, "process": resident("VmHWM"), "step": 1e3 * seconds}


def in_process(*arguments: object) -> str:
    """Run this script with arguments; returns what it prints."""
    command = [sys.executable, __file__, *(str(item) for item in arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Print the table."""
    import argparse  # not in the measured processes

    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(
        f"{'width, side':14} {'plan':16} {'engine':12} {'engine MB':>9} {'process MB':>10} {'step ms':>8} {'ratio':>6}"
    )
    peaks = {}
    for width, side in SIZES:
        for kind in PLANS:
            with tempfile.TemporaryDirectory() as folder:
                in_process("compile", kind, width, side, folder)
                rows = {
                    "onnxruntime": json.loads(in_process("onnxruntime", folder, side)),
                    "torch": json.loads(in_process("torch", folder, width, side)),
                }
            for name, row in rows.items():
                ratio = row["step"] / rows["torch"]["step"]
                print(
                    f"{f'{width}, {side} px':14} {kind:16} {name:12} {row['engine']:9.0f} {row['process']:10.0f} "
                    f"{row['step']:8.1f} {ratio:6.2f}",
                    flush=True,
                )
            peaks[width, side, kind] = rows["onnxruntime"]["process"]
    print(" ".join(f"w{width}_{side}_{kind}_mb={peak:.0f}" for (width, side, kind), peak in peaks.items()))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["compile", kind, width, side, folder]:
            compile_task(kind, float(width), int(side), folder)
        case ["onnxruntime", folder, side]:
            print(json.dumps(run_onnxruntime(folder, int(side))))
        case ["torch", folder, width, side]:
            print(json.dumps(run_torch(folder, float(width), int(side))))
        case _:
            main()
