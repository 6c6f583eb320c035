"""What training takes without torch: `python benchmarks/onnx_training.py`, one thread, micro-batch 1.

MobileNetV2-like networks of 100 classes; each row is a process of its own. `engine` is what the process holds before
it has a task: the interpreter, numpy and ONNX Runtime or torch; `process` the most of the whole process; `step` the
CPU time of one example's forward and backward pass, the least of several, and `ratio` that over torch's of the same
plan with lean operations and micro-batch 1. No process that trains without torch makes its own task.

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
PLANS = ("head", "bias", "last_blocks(4)", "full")


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


def build(kind: str, width: float, side: int):
    """The supernet, its largest subnet and the plan."""
    from dataclasses import replace

    import torch

    from fedofa.finetune.plans import build_plan
    from fedofa.supernet.chain import ChainSupernet
    from fedofa.supernet.network import make_divisible
    from fedofa.supernet.pretrained import READY_MADE

    torch.set_num_threads(1)
    whole = READY_MADE["mobilenet_v2"]
    blocks = tuple(replace(block, width=make_divisible(block.width * width)) for block in whole.blocks)
    sizes = {"stem_width": make_divisible(whole.stem_width * width), "resolutions": (side,), "fractions": (1.0,)}
    spec = replace(whole, num_classes=_CLASSES, blocks=blocks, **sizes)
    supernet = ChainSupernet(spec, torch.Generator().manual_seed(0))
    subnet = supernet.space.largest()
    return supernet, subnet, build_plan(kind, supernet.block_costs(subnet), statistics="frozen", lean=True)


def compile_task(kind: str, width: float, side: int, path: str) -> None:
    """Write what the server would send: the task with its graph and tensors."""
    from dataclasses import asdict

    from fedofa.finetune.onnx_network import compile_step
    from fedofa.update.exchange import ClientTask, encode_task

    supernet, subnet, plan = build(kind, width, side)
    step = compile_step(supernet.network_spec(subnet), plan.trainable)
    tensors = {name: tensor.detach().numpy() for name, tensor in supernet.build(subnet).state_dict().items()}
    training = asdict(recipe())
    task = ClientTask(1, 0, subnet, plan, supernet.description(), training, NORMALISATION, 0, graph=step.graph)
    Path(path).write_bytes(encode_task(task, step.feed(tensors)))


def run_onnxruntime(path: str, side: int) -> dict[str, float]:
    """Train as a client without torch does."""
    from clients import onnx_engine
    from fedofa.data.federation import Examples
    from fedofa.update.exchange import decode_task

    engine = resident("VmRSS")
    task, received = decode_task(Path(path).read_bytes())
    held = Examples(*examples(side))
    seconds = least_seconds(lambda: onnx_engine.train(held, task, received, "client"))
    found = {"engine": engine, "process": resident("VmHWM"), "step": 1e3 * seconds}
    if "torch" in sys.modules:
        raise RuntimeError("torch was imported; expected a process without it")
    return found


def run_torch(kind: str, width: float, side: int) -> dict[str, float]:
    """Train the same with torch, lean operations, micro-batch 1."""
    from dataclasses import replace

    import torch

    from fedofa.finetune.inputs import prepare_inputs
    from fedofa.finetune.memory import tune_allocator
    from fedofa.finetune.trainer import fine_tune

    tune_allocator()
    engine = resident("VmRSS")
    supernet, subnet, plan = build(kind, width, side)
    plan, model = replace(plan, micro_batch=1), supernet.build(subnet)
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
    print(
        f"{'width, side':14} {'plan':16} {'engine':12} {'engine MB':>9} {'process MB':>10} {'step ms':>8} {'ratio':>6}"
    )
    peaks = {}
    for width, side in SIZES:
        for kind in PLANS:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "task"
                in_process("compile", kind, width, side, path)
                rows = {
                    "onnxruntime": json.loads(in_process("onnxruntime", path, side)),
                    "torch": json.loads(in_process("torch", kind, width, side)),
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
        case ["compile", kind, width, side, path]:
            compile_task(kind, float(width), int(side), path)
        case ["onnxruntime", path, side]:
            print(json.dumps(run_onnxruntime(path, int(side))))
        case ["torch", kind, width, side]:
            print(json.dumps(run_torch(kind, float(width), int(side))))
        case _:
            main()
