"""Law 8: does training stay within the memory that its plan says? `python benchmarks/memory_budgets.py --pairs 200`.

Every row is a random subnet of a random family under a random budget. Every second one trains a set beside the weights
themselves: `sparse`, `lora` or `lite_residual`. Every fifth one takes steps of one image, without momentum. The planner
makes a plan for it; a process of its own trains it as a client does: the received weights in one buffer, a module
filled from it, uint8 images made into inputs, some steps, the delta. `measured` is the most resident memory above what
that process held after `warm_up`, with the allocator tuned; `figure` is what the plan said. A row is within where they
differ by at most 10 % of the measured or 8 MB.

Rows go to a file of JSON lines as they are measured; a run goes on where another one stopped. The last line is for
machines.
"""

import argparse
import gc
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.progress import Progress

from fedofa.device.allocator import tune_allocator
from fedofa.finetune.budget import KINDS, BudgetError, plan_for_budget
from fedofa.finetune.holding import hold
from fedofa.finetune.inputs import ImageForm, stored_inputs
from fedofa.finetune.memory import warm_up
from fedofa.finetune.plans import needs_contributions
from fedofa.finetune.probing import measure_contributions
from fedofa.finetune.sparse import Contributions
from fedofa.finetune.trainer import LocalTraining, fine_tune
from fedofa.supernet.base import Supernet
from fedofa.supernet.chain import ChainSpec
from fedofa.supernet.elastic import ElasticSpec
from fedofa.supernet.families import build_elastic, build_supernet
from fedofa.supernet.mobilenet_v3 import MobileNetV3Spec
from fedofa.supernet.proxyless import ProxylessSpec
from fedofa.supernet.ready_made import READY_MADE
from fedofa.supernet.resnet import ResNetSpec
from fedofa.types.plan import FineTunePlan
from fedofa.types.space import SubnetConfig

_RESOLUTIONS = (64, 96, 128, 160, 192)
_NUM_CLASSES = 20
_WITHIN_FRACTION, _WITHIN_BYTES = 0.1, 8_000_000
_MEGABYTE = 1_000_000
_SETS = ("sparse(0.25)", "lora(4)", "lite_residual")


def draw_spec(rng: np.random.Generator) -> ElasticSpec:
    """A random family, width and norm."""
    family = str(rng.choice(["mobilenet_v3", "proxyless", "chain", "resnet"]))
    norm, width = str(rng.choice(["group", "batch"])), float(rng.choice([0.35, 0.6, 1.0]))
    common: dict[str, Any] = {"norm": norm, "num_classes": _NUM_CLASSES, "resolutions": _RESOLUTIONS}
    match family:
        case "mobilenet_v3":
            return replace(MobileNetV3Spec(), **common).scaled(width)
        case "proxyless":
            return replace(ProxylessSpec(), **common).scaled(width)
        case "chain":
            name = str(rng.choice(["efficientnet_lite0", "mobilenet_v2"]))
            return replace(READY_MADE[name], **common)
    stages = tuple(replace(stage, width=stage.width // 4) for stage in ResNetSpec().stages)
    return replace(ResNetSpec(), stem_width=32, stages=stages, **common)


def draw_pair(number: int) -> dict[str, Any]:
    """The pair of that number: what a client is sent to train, and what the planner says that it takes."""
    rng = np.random.default_rng([8, number])
    spec = draw_spec(rng)
    has_lite = isinstance(spec, MobileNetV3Spec | ProxylessSpec | ChainSpec)
    sets = _SETS if has_lite else _SETS[:2]
    chosen = sets[number // 2 % len(sets)] if number % 2 else ""
    if has_lite and chosen == "lite_residual":
        spec = replace(spec, lite_residual=True)
    supernet = build_elastic(spec, torch.Generator().manual_seed(0))
    subnet = supernet.space.sample(rng)
    side = supernet.resolution(subnet) or 0
    training = LocalTraining(batch_size=int(rng.choice([2, 4, 8])), max_steps=2)
    if number % 5 == 4:
        training = replace(training, batch_size=1, momentum=0.0, max_steps=8)
    num_examples = int(rng.integers(8, 32))
    first, budget = int(rng.integers(len(KINDS))), int(10 ** rng.uniform(7.2, 8.2))
    settings: dict[str, Any] = {"kinds": (chosen,) if chosen else KINDS[first:]}
    if needs_contributions(settings["kinds"]):
        settings["contributions"] = contributions(supernet)
    form = ImageForm((3, side, side))
    while True:
        try:
            found = plan_for_budget(supernet, subnet, training, num_examples, form, budget, **settings)
            break
        except BudgetError as error:
            budget = error.smallest_bytes
    return {
        "pair": number,
        "family": supernet.space.family,
        "supernet": supernet.description(),
        "subnet": subnet.to_json(),
        "training": asdict(training),
        "num_examples": num_examples,
        "plan": found.plan.to_json(),
        "levers": sorted(found.plan.levers),
        "reason": found.reason,
        "budget": budget,
        "figure": found.memory.total_bytes,
        "parts": asdict(found.memory),
    }


def contributions(supernet: Supernet) -> Contributions:
    """What the largest subnet's layers contribute to the loss on two images of noise."""
    subnet = supernet.space.largest()
    side = supernet.resolution(subnet) or 0
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    return measure_contributions(supernet.build(subnet), supernet.block_costs(subnet), images, torch.arange(2))


def train(supernet: Supernet, subnet: SubnetConfig, row: dict[str, Any], images: np.ndarray) -> None:
    """As a client does: a module filled from the received buffer, inputs made of its images, two steps, the delta."""
    plan = FineTunePlan.from_json(row["plan"])
    slices = list(supernet.slice_map(subnet, plan.parametrised))
    sizes = [int(np.prod(item.shape)) for item in slices]
    packed = np.full(sum(sizes), 0.01, np.float32)
    parts = np.split(packed, np.cumsum(sizes)[:-1])
    received = {item.name: part.reshape(item.shape) for item, part in zip(slices, parts, strict=True)}
    model = hold(supernet.structure(subnet, plan.parametrised), received, plan)
    inputs = stored_inputs(images, [0.5] * 3, [0.25] * 3, supernet.resolution(subnet))
    labels = torch.arange(len(inputs)) % _NUM_CLASSES
    training = LocalTraining(**row["training"])
    fine_tune(model, plan, received, inputs, labels, training, torch.Generator().manual_seed(0))


def resident(field: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at most since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(row: dict[str, Any]) -> int:
    """Peak resident bytes of the row's training in this process, above its floor."""
    torch.set_num_threads(1)
    tune_allocator()
    subnet = SubnetConfig.from_json(row["subnet"])
    supernet = build_supernet(row["supernet"])
    side = supernet.resolution(subnet) or 0
    warm_up()
    gc.collect()
    base = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    images = np.random.default_rng(0).integers(256, size=(row["num_examples"], 3, side, side), dtype=np.uint8)
    train(supernet, subnet, row, images)
    return resident("VmHWM") - base


def num_exceeded(rows: Sequence[dict[str, Any]]) -> int:
    """How many rows took more than their figure."""
    return sum(row["measured"] > row["figure"] for row in rows)


def is_within(row: dict[str, Any]) -> bool:
    """Whether the figure is close enough to what was measured."""
    return abs(row["figure"] - row["measured"]) <= max(_WITHIN_FRACTION * row["measured"], _WITHIN_BYTES)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that a file holds; a line that was cut off is dropped."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def run(pairs: int, path: Path) -> list[dict[str, Any]]:
    """Measure the pairs that the file does not hold yet."""
    rows = {row["pair"]: row for row in read_rows(path)}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    with Progress(disable=not sys.stderr.isatty()) as progress, path.open("a") as file:
        task = progress.add_task("pairs", total=pairs, completed=len(rows))
        for number in range(pairs):
            if number in rows:
                continue
            row = draw_pair(number)
            command = [sys.executable, __file__, "--train"]
            done = subprocess.run(command, input=json.dumps(row), capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"pair {number}: the process ended with {done.returncode}: {done.stderr[-2000:]}")
            rows[number] = {**row, "measured": int(done.stdout)}
            del rows[number]["supernet"]
            file.write(json.dumps(rows[number]) + "\n")
            file.flush()
            progress.update(task, advance=1)
    return [rows[number] for number in range(pairs)]


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The figure against what was measured, a colour a family."""
    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.add_subplot()
    for family in sorted({row["family"] for row in rows}):
        own = [row for row in rows if row["family"] == family]
        measured, figures = ([row[name] / _MEGABYTE for row in own] for name in ("measured", "figure"))
        axes.scatter(measured, figures, s=14, label=family)
    most = max(row["figure"] for row in rows) / _MEGABYTE
    axes.plot([0, most], [0, most], color="#666666", linewidth=1, label="measured = figure")
    axes.set(xlabel="measured peak above the floor, MB", ylabel="the plan's figure, MB", xscale="log", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure the pairs, each in a process of its own, and print how many keep to their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--rows", type=Path, default=Path("memory_budgets.jsonl"))
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--train", action="store_true", help="train the row on standard input and print its peak")
    chosen = parser.parse_args()
    if chosen.train:
        print(measure(json.load(sys.stdin)))
        return
    rows = run(chosen.pairs, chosen.rows)
    print(f"{'family':14} {'pairs':>6} {'exceeded':>9} {'within':>7} {'figure/measured':>16}")
    for family in sorted({row["family"] for row in rows}):
        own = [row for row in rows if row["family"] == family]
        ratio = float(np.median([row["figure"] / row["measured"] for row in own]))
        print(f"{family:14} {len(own):6} {num_exceeded(own):9} {sum(map(is_within, own)):7} {ratio:16.2f}")
    if chosen.picture:
        draw(rows, chosen.picture)
    print(f"pairs={len(rows)} exceeded={num_exceeded(rows)} within={sum(map(is_within, rows))}")


if __name__ == "__main__":
    main()
