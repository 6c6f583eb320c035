"""One supernet beside sizes trained alone, on CIFAR-10: `python benchmarks/cifar_supernet.py`.

The supernet of EfficientNet-Lite0 at 96 px gets a classifier (the largest subnet's, all else frozen) and its channels
are ordered by their effect on the loss. Then a single stage of shrinking trains it: the largest, three random subnets
and the smallest learn in turn, one a step. Three sizes are cut from the same start and trained alone, each for as many
multiply-accumulates as the supernet's training took. The table gives the accuracy of ten subnets on the 10,000 test
images: before shrinking, after, and alone. Every part is a `fedofa shrink` in its own folder and goes on where it was
stopped; `train NAME` and `score NAME` do one part, so that parts can run side by side; `table` leaves out sizes that
were not trained alone. The last line is machine-readable.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conf.compose import compose_shrink_conf
from fedofa.device.allocator import keep_freed_memory
from fedofa.report.shrinking import plot_shrinking
from fedofa.supernet.base import Supernet
from fedofa.types.space import SearchSpace, SubnetConfig
from server.checkpoint import replace_file
from server.outputs import versions
from server.shrink import Run, build_run, run_shrinking

_LARGEST: dict[str, float] = {}
_HALF = {"depth": 3, "expand": 0.5}
_SMALLEST = {"depth": 1, "kernel": 3, "expand": 0.5}
ALONE = {"alone_largest": _LARGEST, "alone_half": _HALF, "alone_smallest": _SMALLEST}
"""Sizes that are trained alone; an axis left out stays at its largest value."""
_BETWEEN = ({"depth": 1, "expand": 0.75}, {"expand": 0.75})
_NUM_RANDOM = 5
_SUBNET_SEED = 11
PARTS = ("head", "supernet", *ALONE)
_ORDER_BATCHES = 30
"""By which the largest subnet, as it has its classifier, says which channels narrower ones keep."""
_RECIPES = {"sgd": ("shrinking.learning_rate=0.05",), "adamw": ("optimiser=adamw",)}
_TURNS = 3
"""Random subnets between the turns of the largest and of the smallest."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is trained where."""

    folder: Path
    steps: int
    head_steps: int
    teacher_share: float
    optimiser: str
    precision: str
    seed: int
    threads: int
    data_path: Path

    def common(self, part: str) -> list[str]:
        """Overrides that all parts share."""
        return [
            "supernet=efficientnet_lite0", "supernet.resolutions=[96]", "data=cifar10", f"data.path={self.data_path}",
            "data.test_examples=1000", "num_watched=0", "calibration_examples=500",
            f"num_threads={self.threads}", f"seed={self.seed}",
            f"output_dir={self.folder / part}", f"resume={str((self.folder / part / 'checkpoints').exists()).lower()}",
            "shrinking.max_shift=2", "shrinking.label_smoothing=0",
            f"shrinking.precision={self.precision}",
        ]  # fmt: skip

    def settings(self, part: str) -> list[str]:
        """The overrides of the part's `fedofa shrink`."""
        common = self.common(part)
        if part == "head":
            rate = ["shrinking.learning_rate=0.005", "shrinking.max_gradient_norm=0"]
            return [*common, *_alone(_LARGEST, self.head_steps), "shrinking.frozen=[stem,stages,mix]", *rate]
        common += [f"supernet_weights={self.folder / 'head'}", "shrinking.frozen=[stem,stages.0]"]
        common += [*_RECIPES[self.optimiser], f"shrinking.order_batches={_ORDER_BATCHES}"]
        if part == "supernet":
            rule = [f"shrinking.num_random={_TURNS}", f"shrinking.teacher_share={self.teacher_share}"]
            return [*common, "shrinking=turns", f"shrinking.steps={self.steps}", *rule]
        return [*common, *_alone(ALONE[part], self.steps_alone(part))]

    def steps_alone(self, part: str) -> int:
        """Steps in which a size alone takes as many multiply-accumulates as the supernet."""
        supernet = self.started("head").supernet
        space = supernet.space
        rng = np.random.default_rng(0)
        drawn = np.mean([macs(supernet, space.sample(rng)) for _ in range(2000)])
        ends = macs(supernet, space.largest()) + macs(supernet, space.smallest())
        whole = self.steps * (ends + _TURNS * drawn) / (2 + _TURNS)
        return round(whole / macs(supernet, space.subnet(**ALONE[part])))

    def claim(self) -> None:
        """Refuse a folder of other settings; its results would be printed as this job's."""
        own = {f"{part} {name}": value for part in PARTS[:2] for name, value in _computed(self.settings(part)).items()}
        kept = self.folder / "job.json"
        if kept.exists() and (found := json.loads(kept.read_text())) != own:
            differing = {name: (found.get(name), value) for name, value in own.items() if found.get(name) != value}
            raise SystemExit(f"{self.folder}: made with other settings (then, now): {differing}; give another --folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(kept, json.dumps(own).encode())

    def started(self, part: str) -> Run:
        """A run that would start from a part's weights; scores on all test images."""
        more = [f"supernet_weights={self.folder / part}", f"output_dir={self.folder / 'scores'}", "resume=false"]
        more += ["data.test_examples=10000", "calibration_examples=2000"]
        return build_run(compose_shrink_conf([*self.common(part), *more]), self.folder)

    def is_trained(self, part: str) -> bool:
        """Whether a part was trained to its end."""
        return (self.folder / part / "summary.json").exists()

    def train(self, part: str) -> None:
        """Train a part and what it starts from, unless that is done."""
        if part != "head":
            self.train("head")
        if not self.is_trained(part):
            run_shrinking(compose_shrink_conf(self.settings(part)))


def _computed(overrides: list[str]) -> dict[str, str]:
    """The settings that say what a part computes, wherever its files are, and however far it is."""
    given = dict(override.split("=", 1) for override in overrides)
    elsewhere = ("output_dir", "supernet_weights", "data.path", "resume")
    return {name: value for name, value in given.items() if name not in elsewhere}


def _alone(sizes: Mapping[str, float], steps: int) -> list[str]:
    """A schedule of one phase in which one subnet learns from the labels."""
    values = ",".join(f"{axis}:[{value}]" for axis, value in sizes.items())
    phase = f"{{name:alone,steps:{steps},elastic:{{{values}}},num_random:1,teacher:none}}"
    return ["shrinking.schedule=phases", f"shrinking.phases=[{phase}]"]


def macs(supernet: Supernet, subnet: SubnetConfig) -> int:
    """Multiply-accumulates of one example's forward pass."""
    return sum(block.macs for block in supernet.block_costs(subnet))


def subnets(space: SearchSpace) -> dict[str, SubnetConfig]:
    """Largest, smallest and eight between: three of even sizes, five drawn at random."""
    even = {"largest": _LARGEST, "half": _HALF, "smallest": _SMALLEST, "short": _BETWEEN[0], "narrow": _BETWEEN[1]}
    rng = np.random.default_rng(_SUBNET_SEED)
    named = {name: space.subnet(**sizes) for name, sizes in even.items()}
    return {**named, **{f"random {number}": space.sample(rng) for number in range(1, _NUM_RANDOM + 1)}}


def score(job: Job, part: str) -> dict[str, float]:
    """Accuracy on the 10,000 test images: of a size trained alone, else of every subnet; kept in the part's folder."""
    kept = job.folder / part / "scores.json"
    if not kept.exists():
        run = job.started(part)
        chosen = subnets(run.supernet.space)
        if part in ALONE:
            chosen = {name: subnet for name, subnet in chosen.items() if part == f"alone_{name}"}
        found = run.scorer.score(run.supernet.state(), chosen)
        replace_file(kept, json.dumps({name: score.accuracy for name, score in found.items()}).encode())
    return json.loads(kept.read_text())


def measure(job: Job) -> dict[str, Any]:
    """Accuracy of every subnet before and after, and of the sizes that were trained alone."""
    before, after = score(job, "head"), score(job, "supernet")
    alone = {name: value for part in ALONE if job.is_trained(part) for name, value in score(job, part).items()}
    supernet = job.started("supernet").supernet
    rows = [
        {
            "name": name,
            "macs": macs(supernet, subnet),
            "accuracy_before": before[name],
            "accuracy": after[name],
            "accuracy_alone": alone.get(name),
        }
        for name, subnet in subnets(supernet.space).items()
    ]
    rows.sort(key=lambda row: row["macs"])
    spent = {part: _spent(job.folder / part) for part in PARTS if job.is_trained(part)}
    described = {"schedule": "turns", "steps": job.steps, "seed": job.seed, "precision": job.precision}
    described |= {"teacher_share": job.teacher_share, "optimiser": job.optimiser}
    return {**described, "subnets": rows, "parts": spent, "versions": versions()}


def _spent(folder: Path) -> dict[str, float]:
    summary = json.loads((folder / "summary.json").read_text())
    return {"steps": summary["steps"], "cpu_minutes": summary["cpu_seconds"] / 60}


def print_table(result: Mapping[str, Any]) -> None:
    """Print what `measure` found; the last line is machine-readable."""
    print(f"{'subnet':<10} {'MMACs':>6} {'before':>7} {'after':>7} {'alone':>7}")
    for row in result["subnets"]:
        alone = "" if row["accuracy_alone"] is None else f"{row['accuracy_alone']:.4f}"
        figures = f"{row['accuracy_before']:7.4f} {row['accuracy']:7.4f} {alone:>7}"
        print(f"{row['name']:<10} {row['macs'] / 1e6:6.1f} {figures}")
    for part, spent in result["parts"].items():
        print(f"{part}: {spent['steps']:,} steps, {spent['cpu_minutes']:.1f} CPU minutes")
    print("versions:", ", ".join(f"{name} {version}" for name, version in result["versions"].items()))
    rows = {row["name"]: row for row in result["subnets"]}
    largest = rows["largest"]["accuracy"]
    lower_half = [row for row in rows.values() if row["macs"] <= 0.53 * rows["largest"]["macs"]]
    gaps = {name: row["accuracy"] - row["accuracy_alone"] for name, row in rows.items() if row["accuracy_alone"]}
    named = " ".join(f"over_alone_{name}={gap:+.4f}" for name, gap in gaps.items())
    half = largest - rows["half"]["accuracy"]
    least = largest - min(row["accuracy"] for row in lower_half)
    print(f"largest={largest:.4f} largest_minus_half={half:.4f} largest_minus_least={least:.4f} {named}")


def main() -> None:
    """Train what is missing, then measure; `train` and `score` only do that to the parts named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", nargs="?", choices=("all", "train", "score", "table"), default="all")
    parser.add_argument("parts", nargs="*", help=f"of `train` and `score`: {', '.join(PARTS)}")
    parser.add_argument("--folder", type=Path, default=Path("runs/cifar_supernet"))
    parser.add_argument("--steps", type=int, default=8400, help="of the single stage, 64 images each")
    parser.add_argument("--head-steps", type=int, default=200)
    parser.add_argument("--teacher-share", type=float, default=0.0, help="of the loss: what the largest answered")
    parser.add_argument("--optimiser", choices=tuple(_RECIPES), default="sgd")
    parser.add_argument("--precision", default="float32", help="bfloat16 where the processor multiplies it itself")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-path", type=Path, default=Path("../shared/data/cifar10_jpegpack.npz"))
    given = parser.parse_args()
    keep_freed_memory()
    names = ("steps", "head_steps", "teacher_share", "optimiser", "precision", "seed", "threads")
    settings = {name: getattr(given, name) for name in names}
    job = Job(given.folder.resolve(), data_path=given.data_path.resolve(), **settings)
    unknown = sorted(set(given.parts) - set(PARTS))
    if unknown:
        parser.error(f"unknown parts {unknown}; expected some of {list(PARTS)}")
    job.claim()
    parts = given.parts or PARTS
    if given.action == "score":
        untrained = [part for part in parts if not job.is_trained(part)]
        if untrained:
            parser.error(f"{job.folder}: untrained parts {untrained}; run `train {' '.join(untrained)}` first")
        for part in parts:
            score(job, part)
        return
    if given.action != "table":
        for part in parts:
            job.train(part)
    if given.action == "train":
        return
    result = measure(job)
    replace_file(job.folder / "result.json", json.dumps(result, indent=1).encode())
    plot_shrinking(result, job.folder / "accuracy_vs_macs.png")
    print_table(result)


if __name__ == "__main__":
    main()
