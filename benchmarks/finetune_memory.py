"""What fine-tuning MobileNetV2 takes under each plan: `python benchmarks/finetune_memory.py`, one thread.

Width 1.0, 224 pixels, 100 classes, batch 16, each row in processes of its own, medians of three. `saved` is what
autograd keeps of one forward pass; `peak` the most resident memory of two steps above that of the process just before
them, model, examples and torch's kernels included in the latter; `process` the most of the whole process, which gets
its weights as a client does, from outside; `time` the CPU time of a step over that of the first row, once features are
cached where they are. Rows that begin with "stock" run with glibc's allocator as it is, the others with
`tune_allocator`. In rows with "steps of one" every image is a step, without momentum; time is still that of 16 images.

The last lines are for machines. `best_mb` is the least peak of a row that is not slower than the first and whose
gradients are exact: one line for everything trained, one for sparse updates, and last one for any trainable set but the
head alone.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch import Tensor, nn

from fedofa.device.allocator import tune_allocator
from fedofa.finetune.engine import planned
from fedofa.finetune.features import FeatureCache, cut_of
from fedofa.finetune.holding import hold
from fedofa.finetune.inputs import Inputs, stored_inputs
from fedofa.finetune.plans import build_plan, choose_segments, needs_contributions
from fedofa.finetune.probing import measure_contributions
from fedofa.finetune.recipe import LocalTraining
from fedofa.finetune.sparse import Contributions
from fedofa.finetune.trainer import fine_tune
from fedofa.supernet.chain import ChainSpec, ChainSupernet
from fedofa.supernet.ready_made import READY_MADE
from fedofa.types.plan import FineTunePlan

_BATCH = 16
_STEPS = 2
_PROBED = 4
_TURNS = 3


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: the kind of plan and its levers; `segments` stands for chosen checkpoint segments."""

    name: str
    kind: str
    levers: dict[str, Any] = field(hash=False)
    each_block: bool = False
    segments: bool = False
    single: bool = False

    @property
    def is_exact(self) -> bool:
        """Whether gradients are those of stock autograd."""
        return self.levers.get("kept", "float32") == "float32" and self.levers.get("kept_fraction", 1.0) == 1


_FROZEN, _LEAN = {"statistics": "frozen"}, {"statistics": "frozen", "lean": True}
_ONE = {**_LEAN, "micro_batch": 1}
_SUMMED = {**_ONE, "fused_step": True}
"""Gradients are added to the momentum, example after example."""
_FUSED = {**_LEAN, "fused_step": True}
ROWS = (
    Row("stock full, batch statistics", "full", {"statistics": "batch"}),
    Row("stock full, each block checkpointed", "full", {"statistics": "batch"}, each_block=True),
    Row("stock bias", "bias", _FROZEN),
    Row("stock full, micro-batch 1", "full", {**_FROZEN, "micro_batch": 1}),
    Row("full, lean, batch statistics", "full", {"statistics": "batch", "lean": True}),
    Row("full, lean", "full", _LEAN),
    Row("full, lean, fused step", "full", _FUSED),
    Row("full, lean, int8", "full", {**_LEAN, "kept": "int8"}),
    Row("full, lean, micro-batch 4", "full", {**_LEAN, "micro_batch": 4}),
    Row("full, lean, micro-batch 1", "full", _ONE),
    Row("the same, fused step", "full", _SUMMED),
    Row("the same, fused step, segments", "full", _SUMMED, segments=True),
    Row("the same, fused step, int8", "full", {**_SUMMED, "kept": "int8"}),
    Row("the same, fused step, int4", "full", {**_SUMMED, "kept": "int4"}),
    Row("the same, fused step, a fifth kept", "full", {**_SUMMED, "kept_fraction": 0.2}),
    Row("full, lean, steps of one", "full", _FUSED, single=True),
    Row("the same, segments", "full", _FUSED, segments=True, single=True),
    Row("full, steps of one, segments", "full", {**_FROZEN, "fused_step": True}, segments=True, single=True),
    Row("bias, lean", "bias", _LEAN),
    Row("bias, lean, micro-batch 4", "bias", {**_LEAN, "micro_batch": 4}),
    Row("bias, lean, micro-batch 1", "bias", _SUMMED),
    Row("last 4 blocks, lean, micro-batch 1", "last_blocks(4)", _SUMMED),
    Row("the same, features cached", "last_blocks(4)", {**_SUMMED, "feature_cache": True}),
    Row("head, lean, micro-batch 1", "head", _SUMMED),
    Row("the same, features cached", "head", {**_SUMMED, "feature_cache": True}),
    Row("lite residual, lean, micro-batch 1", "lite_residual", _SUMMED),
    Row("lora(4), lean, micro-batch 1", "lora(4)", _SUMMED),
    Row("sparse(0.25), lean, micro-batch 1", "sparse(0.25)", _SUMMED),
    Row("sparse(0.1), lean, micro-batch 1", "sparse(0.1)", _SUMMED),
)


def resident(field: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at most since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def saved_bytes(model: nn.Module, plan: FineTunePlan, inputs: Tensor) -> int:
    """What autograd keeps of one forward pass, parameters left out."""
    own = {item.untyped_storage().data_ptr() for item in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        planned(model, plan, torch.Generator().manual_seed(0)),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda item: item),
    ):
        images, trained = inputs[: plan.micro_batch or len(inputs)], model
        if plan.feature_cache:
            cut = cut_of(model, plan)
            with torch.no_grad():
                images, trained = cut.prefix(images), cut.suffix
            own.add(images.untyped_storage().data_ptr())
        kept = trained(images)
    del kept
    return sum(size for pointer, size in sizes.items() if pointer not in own)


def spec_of(row: Row) -> ChainSpec:
    """MobileNetV2, with lite residual branches for the plan that trains them."""
    return replace(READY_MADE["mobilenet_v2"], num_classes=100, lite_residual=row.kind == "lite_residual")


def build_supernet(row: Row) -> ChainSupernet:
    """The row's network with random weights."""
    return ChainSupernet(spec_of(row), torch.Generator().manual_seed(0))


@cache
def contributions() -> Contributions:
    """Of the network's layers, on a few random images."""
    supernet = build_supernet(ROWS[0])
    subnet = supernet.space.largest()
    images = torch.randn(_PROBED, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(_PROBED)
    return measure_contributions(supernet.build(subnet), supernet.block_costs(subnet), images, labels)


def make_plan(row: Row) -> FineTunePlan:
    """A row's plan; made outside of the measured process, since measuring contributions takes memory."""
    supernet = build_supernet(row)
    blocks = supernet.block_costs(supernet.space.largest())
    measured = contributions() if needs_contributions([row.kind]) else None
    plan = replace(build_plan(row.kind, blocks, recompute=row.each_block, contributions=measured), **row.levers)
    return replace(plan, recompute=choose_segments(blocks, plan.changes)) if row.segments else plan


def measure(row: Row, plan: FineTunePlan, weights: Path) -> dict[str, float]:
    """One row, in this process."""
    torch.set_num_threads(1)
    if not row.name.startswith("stock"):
        tune_allocator()
    return measure_training(ChainSupernet(spec_of(row)), plan, 224, weights, single=row.single)


def save_largest(supernet: ChainSupernet, path: Path) -> None:
    """The largest subnet's tensors as a file, unless it is there."""
    if not path.exists():
        save_file(supernet.cut(supernet.space.largest()), path)


def measure_training(
    structure: ChainSupernet, plan: FineTunePlan, resolution: int, weights: Path, *, single: bool = False
) -> dict[str, float]:
    """Train the largest subnet for two steps of 16 random RGB images, in this process: MB and CPU seconds a step.

    Args:
        structure: a supernet without weights.
        plan: of the training.
        resolution: of the images.
        weights: the file of `save_largest`.
        single: every image is a step of its own, without momentum; seconds are those of 16 all the same.
    """
    received = load_file(weights)
    model = hold(structure.structure(structure.space.largest()), received, plan)
    features = FeatureCache()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (_BATCH, 3, resolution, resolution), dtype=torch.uint8, generator=generator).numpy()
    inputs, few = (stored_inputs(images, [0.5] * 3, [0.25] * 3) for images in (pixels, pixels[:2, :, :32, :32]))
    labels = torch.arange(_BATCH) % 10

    def train(images: Inputs, steps: int) -> None:
        training = LocalTraining(batch_size=len(images), max_steps=steps, learning_rate=1e-3)
        if single:
            training = replace(training, batch_size=1, max_steps=steps * len(images), momentum=0.0)
        generator = torch.Generator().manual_seed(0)
        fine_tune(model, plan, received, images, labels[: len(images)], training, generator, features=features)

    train(few, 1)  # loads the kernels
    gc.collect()
    base = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    if plan.feature_cache:
        train(inputs, 1)
    began = time.thread_time()
    train(inputs, _STEPS)
    seconds = (time.thread_time() - began) / _STEPS
    peak = resident("VmHWM")
    return {
        "saved": saved_bytes(model, plan, inputs[: 1 if single else _BATCH]) / 1e6,
        "peak": (peak - base) / 1e6,
        "process": peak / 1e6,
        "seconds": seconds,
    }


def print_best(name: str, found: Mapping[Row, Mapping[str, float]], chosen: Callable[[Row], bool]) -> None:
    """One line for machines: the least peak of some rows that are exact and not slower than stock."""
    stock = found[ROWS[0]]
    fast = [item for row, item in found.items() if row.is_exact and chosen(row) and item["seconds"] <= stock["seconds"]]
    if not fast:
        print(
            f"{name}full_mb={stock['peak']:.1f} best_mb=nan ratio=nan time_ratio=nan (no such row is as fast as stock)"
        )
        return
    best = min(fast, key=lambda item: item["peak"])
    print(
        f"{name}full_mb={stock['peak']:.1f} best_mb={best['peak']:.1f} ratio={stock['peak'] / best['peak']:.1f} "
        f"time_ratio={best['seconds'] / stock['seconds']:.2f}"
    )


def measure_all() -> dict[Row, dict[str, float]]:
    """Every row in processes of its own, medians of `_TURNS`: what page faults cost changes from minute to minute."""
    from rich.progress import track  # not in the measured processes

    found: dict[Row, list[dict[str, float]]] = {row: [] for row in ROWS}
    with TemporaryDirectory() as folder:
        for _, (number, row) in track(list(itertools.product(range(_TURNS), enumerate(ROWS))), "measuring"):
            weights = Path(folder, "lite.safetensors" if row.kind == "lite_residual" else "plain.safetensors")
            save_largest(build_supernet(row), weights)
            command = [sys.executable, __file__, str(number), json.dumps(make_plan(row).to_json()), str(weights)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[row].append(json.loads(done.stdout))
    return {
        row: {name: statistics.median(item[name] for item in results) for name in results[0]}
        for row, results in found.items()
    }


def main() -> None:
    """Measure every row and print the table; with three arguments, which the table gives itself, one row."""
    match sys.argv[1:]:
        case [number, plan, weights]:
            print(json.dumps(measure(ROWS[int(number)], FineTunePlan.from_json(json.loads(plan)), Path(weights))))
            return
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"python {platform.python_version()}, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    found = measure_all()
    print(f"{'plan':40} {'saved MB':>9} {'peak MB':>9} {'process MB':>11} {'time':>6}")
    for row, result in found.items():
        ratio = result["seconds"] / found[ROWS[0]]["seconds"]
        print(f"{row.name:40} {result['saved']:9.1f} {result['peak']:9.1f} {result['process']:11.1f} {ratio:6.2f}")
    print_best("everything: ", found, lambda row: row.kind == "full")
    print_best("sparse: ", found, lambda row: row.kind.startswith("sparse"))
    print_best("", found, lambda row: row.kind != "head")


if __name__ == "__main__":
    main()
