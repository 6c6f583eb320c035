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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conf.compose import compose_shrink_conf
from fedofa.device.allocator import keep_freed_memory
from fedofa.report.shrinking import plot_shrinking
from fedofa.shrinking.sampling import PhaseSampler
from fedofa.shrinking.schedule import ShrinkPhase
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
_SIDES = (64, 80, 96)
"""Of growing images; the last one is what is scored."""
_ORDER_BATCHES = 30
"""By which the largest subnet, as it has its classifier, says which channels narrower ones keep."""
_TURNS = 3
"""Random subnets between the turns of the largest and of the smallest."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is trained where."""

    folder: Path
    steps: int
    head_steps: int
    teacher_share: float
    growing_images: bool
    precision: str
    seed: int
    threads: int
    data_path: Path

    def common(self, part: str) -> list[str]:
        """Overrides that all parts share."""
        return [
            "supernet=efficientnet_lite0", f"supernet.resolutions={list(self.sides)}",
            "data=cifar10", f"data.path={self.data_path}", "data.test_examples=1000",
            "num_watched=0", "calibration_examples=500", f"num_threads={self.threads}", f"seed={self.seed}",
            f"output_dir={self.folder / part}", f"resume={str((self.folder / part / 'checkpoints').exists()).lower()}",
            "shrinking.learning_rate=0.05", "shrinking.max_shift=2", "shrinking.label_smoothing=0",
            f"shrinking.precision={self.precision}",
        ]  # fmt: skip

    def settings(self, part: str) -> list[str]:
        """The overrides of the part's `fedofa shrink`."""
        common = self.common(part)
        if part == "head":
            rate = ["shrinking.learning_rate=0.005", "shrinking.max_gradient_norm=0"]
            return [*common, *_alone(_LARGEST, self.head_steps), "shrinking.frozen=[stem,stages,mix]", *rate]
        common += [f"supernet_weights={self.folder / 'head'}", "shrinking.frozen=[stem,stages.0]"]
        common += [f"shrinking.order_batches={_ORDER_BATCHES}"]
        if part == "supernet":
            rule = [f"shrinking.num_random={_TURNS}", f"shrinking.teacher_share={self.teacher_share}"]
            rule += [f"shrinking.growing_images={str(self.growing_images).lower()}"]
            return [*common, "shrinking=turns", f"shrinking.steps={self.steps}", *rule]
        return [*common, *_alone(ALONE[part], self.steps_alone(part), self.sides)]

    @property
    def sides(self) -> tuple[int, ...]:
        """Of the images, in the order in which they are trained on."""
        return _SIDES if self.growing_images else _SIDES[-1:]

    def steps_alone(self, part: str) -> int:
        """Steps in which a size alone takes as many multiply-accumulates as the supernet."""
        supernet = self.started("head").supernet
        space = supernet.space
        rng = np.random.default_rng(0)
        drawn = np.mean([macs(supernet, space.sample(rng)) for _ in range(2000)])
        ends = sum(self._mean_macs(supernet, sizes) for sizes in (_LARGEST, _SMALLEST))
        whole = self.steps * (ends + _TURNS * drawn) / (2 + _TURNS)
        return round(whole / self._mean_macs(supernet, ALONE[part]))

    def _mean_macs(self, supernet: Supernet, sizes: Mapping[str, float]) -> float:
        """Of a subnet over the sides that it trains on."""
        return float(np.mean([macs(supernet, supernet.space.subnet(**sizes, resolution=side)) for side in self.sides]))

    def claim(self) -> None:
        """Refuse a folder of other settings; its results would be printed as this job's."""
        kept, own = self.folder / "job.json", {**asdict(self), "folder": None, "data_path": None, "threads": None}
        if kept.exists() and (found := json.loads(kept.read_text())) != own:
            differing = {name: (found.get(name), value) for name, value in own.items() if found.get(name) != value}
            raise SystemExit(f"{self.folder}: made with other settings (then, now): {differing}; give another --folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(kept, json.dumps(own).encode())

    def started(self, part: str) -> Run:
        """A run that would start from a part's weights; scores on all test images."""
        more = [f"supernet_weights={self.folder / part}", "data.test_examples=10000", "calibration_examples=2000"]
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


def _alone(sizes: Mapping[str, float], steps: int, sides: Sequence[int] = _SIDES[-1:]) -> list[str]:
    """A schedule of one phase in which one subnet learns from the labels."""
    values = ",".join(f"{axis}:[{value}]" for axis, value in sizes.items())
    values += f",resolution:{list(sides)}" if values else f"resolution:{list(sides)}"
    growing = str(len(sides) > 1).lower()
    phase = f"{{name:alone,steps:{steps},elastic:{{{values}}},num_random:1,teacher:none,growing_images:{growing}}}"
    return ["shrinking.schedule=phases", f"shrinking.phases=[{phase}]"]


def macs(supernet: Supernet, subnet: SubnetConfig) -> int:
    """Multiply-accumulates of one example's forward pass."""
    return sum(block.macs for block in supernet.block_costs(subnet))


def subnets(space: SearchSpace) -> dict[str, SubnetConfig]:
    """Largest, smallest and eight between: three of even sizes, five drawn at random."""
    even = {"largest": _LARGEST, "half": _HALF, "smallest": _SMALLEST, "short": _BETWEEN[0], "narrow": _BETWEEN[1]}
    named = {name: space.subnet(**sizes) for name, sizes in even.items()}
    at_last_side = ShrinkPhase("any", 1, {axis.name: axis.values for axis in space.axes if not axis.is_input})
    sampler, rng = PhaseSampler(space, at_last_side, lambda _: 0), np.random.default_rng(_SUBNET_SEED)
    return {**named, **{f"random {number}": sampler.draw(rng)[0] for number in range(1, _NUM_RANDOM + 1)}}


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
    described |= {"teacher_share": job.teacher_share, "growing_images": job.growing_images}
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
    growing = "64, 80, then 96 pixels, not 96 throughout"
    parser.add_argument("--growing-images", action=argparse.BooleanOptionalAction, default=False, help=growing)
    parser.add_argument("--precision", default="float32", help="bfloat16 where the processor multiplies it itself")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-path", type=Path, default=Path("../shared/data/cifar10_jpegpack.npz"))
    given = parser.parse_args()
    keep_freed_memory()
    names = ("steps", "head_steps", "teacher_share", "growing_images", "precision", "seed", "threads")
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
