"""What each trainable set reaches and takes: `python benchmarks/finetune_accuracy.py`, EfficientNet-Lite0 on CIFAR-10.

Every row is a federation of 20 clients (Dirichlet 0.5) that fine-tune the largest network at 96 px, the same rounds,
steps and batches for all, averaged plainly; statistics of batch norm stay ImageNet's. All begin with the classifier
that a first federation trained alone on ImageNet's features. The learning rate is the best of the row's by the
accuracy on the global test set. Memory and time are those of two steps of 16 images in a process of their own (see
`finetune_memory`), above the process just before them, medians of three; rows that begin with "stock" run plain torch
on the whole batch and glibc's allocator as it is, the others lean operations, one image at a time, and sum gradients
in the momentum. Rows that end with "steps of one" see as many images, but step after each, without momentum: neither
that nor gradients take memory then, but for one parameter's.

Other levers do not change what is trained (lean operations and micro-batches have stock's gradients): federations
train without micro-batches, and rows of one trainable set share them. Those that are there already are not run again; a
folder of other settings is refused.
The last line is machine-readable: how far the best lean row within a 1/25 of stock's memory is from the best stock row,
in points.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from finetune_memory import measure_training, save_largest

from fedofa.device.allocator import tune_allocator
from fedofa.finetune.plans import build_plan, choose_segments, needs_contributions
from fedofa.finetune.probing import measure_contributions
from fedofa.report import style
from fedofa.supernet.chain import ChainSpec, ChainSupernet
from fedofa.supernet.ready_made import READY_MADE
from fedofa.types.plan import FineTunePlan
from server.checkpoint import replace_file
from server.outputs import versions

_RESOLUTION = 96
_STOCK, _STOCK_KINDS = "stock", ("full", "bias")
_BATCH = 16
_MEASURED = 3
"""Processes that measure a row: the peak of stock training varies by a tenth from one to the next."""
_HEAD_ROUNDS, _HEAD_COHORT, _HEAD_RATE = 15, 5, 1e-3
"""Of the federation that trains the classifier alone, with as many steps a client as the others."""


@dataclass(frozen=True, slots=True)
class Row:
    """A trainable set under its plan's levers, and the learning rates that it is tried with."""

    name: str
    kind: str
    rates: tuple[float, ...]
    lean: bool = True
    segments: bool = False
    single: bool = False

    def overrides(self) -> list[str]:
        """The settings of its federations that differ from row to row."""
        lean = str(self.kind not in _STOCK_KINDS).lower()
        lite = str(self.kind == "lite_residual").lower()
        return [f"finetune.plans=['{self.kind}']", f"finetune.lean={lean}", f"supernet.lite_residual={lite}"]


_FULL, _SPARSE, _BIAS, _SINGLE = (2e-3, 3e-3, 5e-3), (2e-3, 3e-3, 4e-3), (1e-2, 2e-2), (8e-4,)
ROWS = (
    Row("stock full", "full", _FULL, lean=False),
    Row("stock bias", "bias", _BIAS, lean=False),
    Row("full", "full", _FULL),
    Row("last 4 blocks", "last_blocks(4)", (1e-2,)),
    Row("sparse(0.2)", "sparse(0.2)", _SPARSE),
    Row("sparse(0.2), segments", "sparse(0.2)", _SPARSE, segments=True),
    Row("full, steps of one", "full", _SINGLE, single=True),
    Row("full, segments, steps of one", "full", _SINGLE, segments=True, single=True),
    Row("sparse(0.5), steps of one", "sparse(0.5)", _SINGLE, single=True),
    Row("sparse(0.1)", "sparse(0.1)", (3e-3, 4e-3, 6e-3)),
    Row("lora(4)", "lora(4)", (3e-2, 1e-1)),
    Row("lite residual", "lite_residual", (1e-2, 2e-2)),
    Row("bias", "bias", _BIAS),
    Row("head", "head", (1e-2,)),
)
"""Rates are around the best of a coarser grid, a factor of three from one to the next."""


@dataclass(frozen=True, slots=True)
class Study:
    """What all rows share."""

    folder: Path
    rounds: int
    cohort: int
    steps: int
    test_examples: int
    seed: int
    workers: int
    data_path: Path

    def claim(self) -> None:
        """Refuse a folder of other settings; its results would be printed as this study's."""
        kept, own = self.folder / "study.json", self.identity()
        if not kept.exists() and any(self.folder.glob("*/")):
            raise SystemExit(f"{self.folder}: holds runs, but no study.json with their settings; give another --folder")
        if kept.exists() and (found := json.loads(kept.read_text())) != own:
            names = sorted(name for name in {*found, *own} if found.get(name) != own.get(name))
            differing = {name: (found.get(name), own.get(name)) for name in names}
            raise SystemExit(f"{self.folder}: made with other settings (then, now): {differing}; give another --folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(kept, json.dumps(own, indent=1).encode())

    def identity(self) -> dict[str, Any]:
        """All that changes results but what rows differ by: that, and the rate, is in the names of their folders."""
        shared = dict(item.split("=", 1) for item in self.settings())
        elsewhere = ("data.path", "runtime.num_workers")
        head = {"head_rounds": _HEAD_ROUNDS, "head_cohort": _HEAD_COHORT, "head_rate": _HEAD_RATE}
        own = {"rounds": self.rounds, "cohort": self.cohort, **head}
        return own | {name: value for name, value in shared.items() if name not in elsewhere}

    def run(self, row: Row, rate: float) -> dict[str, Any]:
        """The summary of the row's federation, run unless it is there."""
        single = [f"finetune.max_steps={_BATCH * self.steps}", "finetune.batch_size=1", "finetune.momentum=0"]
        folder = self.folder / re.sub("[^a-z0-9.]+", "_", f"{row.kind}{' single' * row.single} {rate:g}")
        own = [f"supernet_weights={self.start()}", f"finetune.learning_rate={rate}", *(single if row.single else ())]
        return self.federation(folder, self.rounds, self.cohort, [*row.overrides(), *own])

    def start(self) -> Path:
        """The folder of the federation that trained the classifier."""
        folder = self.folder / "start"
        own = [*Row("head", "head", ()).overrides(), f"finetune.learning_rate={_HEAD_RATE}"]
        self.federation(folder, _HEAD_ROUNDS, _HEAD_COHORT, own)
        return folder

    def federation(self, folder: Path, rounds: int, cohort: int, own: Sequence[str]) -> dict[str, Any]:
        """A federation's summary; it is run, or resumed, unless it is there."""
        if not (folder / "summary.json").exists():
            shared = [f"rounds={rounds}", f"evaluation.every={rounds}", f"fleet.clients_per_round={cohort}"]
            begun = str((folder / "checkpoints").exists()).lower()
            where = [f"output_dir={folder}", f"resume={begun}"]
            command = [sys.executable, "-m", "server", "simulate", *self.settings(), *shared, *where, *own]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads((folder / "summary.json").read_text())

    def settings(self) -> list[str]:
        """The overrides that all federations share."""
        return [
            "supernet=efficientnet_lite0", f"supernet.resolutions=[{_RESOLUTION}]", "supernet.dropout=0",
            "data=cifar10", f"data.path={self.data_path}", f"data.test_examples={self.test_examples}",
            "supernet.kernels=[5]", "supernet.fractions=[1]", "supernet.min_depth=4",  # the largest subnet alone
            "partition.alpha=0.5", "fleet=unlimited", "fleet.num_clients=20", "aggregation=plain",
            "evaluation.calibration=none", "data.calibration_examples=200",  # for what layers contribute
            "finetune.statistics=frozen", "finetune.recompute=never", "finetune.max_shift=0",
            f"finetune.batch_size={_BATCH}", f"finetune.max_steps={self.steps}",
            "evaluation.comparison=false", "evaluation.clients=false", f"seed={self.seed}",
            f"runtime.num_workers={self.workers}",
        ]  # fmt: skip

    def best(self, row: Row) -> dict[str, Any]:
        """The row's most accurate run, with what its training takes."""
        runs = {rate: self.run(row, rate) for rate in row.rates}
        accuracy = {rate: _largest(summary)["accuracy"] for rate, summary in runs.items()}
        rate = max(row.rates, key=lambda rate: accuracy[rate])
        uploads = self.rounds * self.cohort
        taken = {"accuracy": accuracy[rate], "learning_rate": rate, "bytes_up": runs[rate]["bytes_up"] / uploads}
        return {"name": row.name, **taken, **self.memory(row)}

    def memory(self, row: Row) -> dict[str, float]:
        """Peak memory and time of the row's training, medians of three processes of its own."""
        with TemporaryDirectory() as folder:
            weights = Path(folder, "largest.safetensors")
            save_largest(build_supernet(row), weights)
            given = ["--plan", json.dumps(make_plan(row).to_json()), "--weights", str(weights)]
            command = [sys.executable, __file__, "--measure", row.name, *given]
            done = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(_MEASURED)]
        found = [json.loads(item.stdout.splitlines()[-1]) for item in done]
        return {name: statistics.median(item[name] for item in found) for name in found[0]}


def _largest(summary: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(row for row in summary["subnets"] if row["name"] == "largest")


def spec_of(row: Row) -> ChainSpec:
    """The row's network."""
    more = {"num_classes": 10, "resolutions": (_RESOLUTION,), "lite_residual": row.kind == "lite_residual"}
    return replace(READY_MADE["efficientnet_lite0"], **more)


def build_supernet(row: Row) -> ChainSupernet:
    """The network with random weights, which take what trained ones do."""
    return ChainSupernet(spec_of(row), torch.Generator().manual_seed(0))


def make_plan(row: Row) -> FineTunePlan:
    """The row's plan for the largest subnet; contributions are those of random images, which take as much memory."""
    supernet = build_supernet(row)
    subnet = supernet.space.largest()
    blocks = supernet.block_costs(subnet)
    levers = {"statistics": "frozen", "lean": row.lean, "micro_batch": int(row.lean and not row.single)}
    contributions = None
    if needs_contributions([row.kind]):
        images = torch.randn(10, 3, _RESOLUTION, _RESOLUTION, generator=torch.Generator().manual_seed(1))
        contributions = measure_contributions(supernet.build(subnet), blocks, images, torch.arange(10))
    plan = replace(build_plan(row.kind, blocks, contributions=contributions, **levers), fused_step=row.lean)
    return replace(plan, recompute=choose_segments(blocks, plan.changes)) if row.segments else plan


def measure(row: Row, plan: FineTunePlan, weights: Path) -> dict[str, float]:
    """What two steps take in this process."""
    torch.set_num_threads(1)
    if not row.name.startswith(_STOCK):
        tune_allocator()
    return measure_training(ChainSupernet(spec_of(row)), plan, _RESOLUTION, weights, single=row.single)


_LABELS = {
    "sparse(0.2), segments": ((-4, 8), "right"),
    "full, segments, steps of one": ((-6, 6), "right"),
    "sparse(0.5), steps of one": ((-6, -12), "right"),
    "sparse(0.1)": ((-6, -4), "right"),
    "lite residual": ((-4, -14), "right"),
}
"""Where names stand that would cover others: offset in points, and the side that is at it."""


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy against the memory of training."""
    figure = style.new_figure("What trains, what it takes, what it reaches", 5.0)
    axes = figure.add_axes((style.LEFT, 0.13, style.RIGHT - style.LEFT, 0.7))
    style.style_axes(axes, "Accuracy on the global test set (%) against peak memory of training (MB, logarithmic)")
    axes.set_xscale("log")
    for row in rows:
        colour = style.PALETTE[1 if row["name"].startswith(_STOCK) else 0]
        axes.plot(row["peak"], 100 * row["accuracy"], "o", color=colour)
        offset, side = _LABELS.get(row["name"], ((6, 5), "left"))
        at = row["peak"], 100 * row["accuracy"]
        axes.annotate(row["name"], at, offset, textcoords="offset points", fontsize=9, ha=side)
    style.scale_percent(axes, [100 * row["accuracy"] for row in rows], padding=0.12, least_padding=1.5)
    axes.set_xlim(min(row["peak"] for row in rows) / 2.7, max(row["peak"] for row in rows) * 1.6)
    style.save_png(figure, path)


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print what was found; the last line is machine-readable."""
    print(f"{'trains':<22}{'accuracy':>9}{'kB up':>8}{'peak MB':>9}{'time':>6}{'rate':>7}")
    stock = rows[0]
    for row in rows:
        figures = f"{row['accuracy']:9.3f}{row['bytes_up'] / 1e3:8.0f}{row['peak']:9.1f}"
        print(f"{row['name']:<22}{figures}{row['seconds'] / stock['seconds']:6.2f}{row['learning_rate']:7g}")
    print("versions:", ", ".join(f"{name} {version}" for name, version in versions().items()))
    best = max((row for row in rows if row["name"].startswith(_STOCK)), key=lambda row: row["accuracy"], default=None)
    lean = [row for row in rows if row["peak"] * 25 <= best["peak"]] if best else []
    if best and lean:
        top = max(lean, key=lambda row: row["accuracy"])
        points, memory = 100 * (best["accuracy"] - top["accuracy"]), best["peak"] / top["peak"]
        print(f"best_lean={top['name'].replace(' ', '_')} points_below_stock={points:.2f} memory_ratio={memory:.1f}")
    else:
        print("best_lean=none")


def main() -> None:
    """Run what is missing, then print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/finetune_accuracy"))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--cohort", type=int, default=4, help="clients a round, of 20")
    parser.add_argument("--steps", type=int, default=10, help="of 16 images, a client and round")
    parser.add_argument("--test-examples", type=int, default=10000)
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS], default=[row.name for row in ROWS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="processes that train clients; 0: one a core")
    parser.add_argument("--data-path", type=Path, default=Path("../shared/data/cifar10_jpegpack.npz"))
    parser.add_argument("--measure", choices=[row.name for row in ROWS], help="measure one row in this process")
    parser.add_argument("--plan", help="of that row, as JSON")
    parser.add_argument("--weights", type=Path, help="of the largest subnet, as safetensors")
    given = parser.parse_args()
    named = {row.name: row for row in ROWS}
    if given.measure:
        print(json.dumps(measure(named[given.measure], FineTunePlan.from_json(json.loads(given.plan)), given.weights)))
        return
    paths = {"folder": given.folder.resolve(), "data_path": given.data_path.resolve()}
    settings = {
        name: getattr(given, name) for name in ("rounds", "cohort", "steps", "test_examples", "seed", "workers")
    }
    study = Study(**paths, **settings)
    study.claim()
    rows = [study.best(named[name]) for name in given.rows]
    replace_file(study.folder / "result.json", json.dumps(rows, indent=1).encode())
    draw(rows, study.folder / "accuracy_vs_memory.png")
    print_table(rows)


if __name__ == "__main__":
    main()
