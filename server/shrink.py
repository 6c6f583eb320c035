"""`fedofa shrink`: trains a supernet on this machine, keeps checkpoints, leaves weights, a summary and a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clients.examples import load_examples
from conf.compose import encode_conf
from conf.schema import ShrinkConf
from fedofa.data.federation import Examples, FederatedData
from fedofa.device.allocator import keep_freed_memory
from fedofa.evaluation.metrics import Score
from fedofa.report.shrinking import plot_shrinking
from fedofa.shrinking.central import CentralShrinking, ShrinkStep
from fedofa.shrinking.recipe import CentralTraining
from fedofa.supernet.base import Supernet
from fedofa.types.errors import ConfigError, DivergenceError
from fedofa.types.space import SearchSpace, SubnetConfig
from fedofa.types.state import SharedState
from server.checkpoint import Checkpoint, CheckpointStore, Totals, replace_file
from server.federation import build_first, describe_supernet, flat_settings
from server.outputs import exclusive, set_aside, subnet_row, versions
from server.progress import StepProgress, say
from server.resources import Stopwatch
from server.rounds import RoundLog
from server.schedules import build_schedule
from server.scoring import Scorer
from server.starting import check_start, fingerprint
from server.weights import normalisation_for, start_from, write_supernet

_WATCHED, _CALIBRATION = 11, 12
"""Tell the random numbers of the watched subnets and of the calibration set from those of the training."""
_MAY_CHANGE = ("resume", "resume_step", "output_dir", "checkpoint_every", "num_watched", "calibration_examples")
"""Settings that a resumed run may change: they do not change what a step computes."""


@dataclass(frozen=True, slots=True)
class StepLine:
    """One line of `steps.jsonl`; the loss is the mean over the step's subnets."""

    step: ShrinkStep

    def to_json(self) -> dict[str, Any]:
        """The line's content."""
        losses = {subnet.digest(): loss for subnet, loss in self.step.losses.items()}
        rate, mean = self.step.learning_rate, sum(losses.values()) / len(losses)
        return {
            "step": self.step.step,
            "phase": self.step.phase,
            "learning_rate": rate,
            "loss": mean,
            "losses": losses,
        }


@dataclass(frozen=True, slots=True)
class Run:
    """The parts of one run."""

    conf: ShrinkConf
    supernet: Supernet
    shrinking: CentralShrinking
    scorer: Scorer
    checkpoints: CheckpointStore
    log: RoundLog
    identity: Mapping[str, Any]


def run_shrinking(conf: ShrinkConf) -> None:
    """Train to the end of the schedule; the results are in `conf.output_dir`.

    Raises:
        FedofaError: saying in one line what is wrong; bad settings and missing data show before anything is written.
    """
    _check(conf)
    keep_freed_memory()
    torch.set_num_threads(conf.num_threads)
    output_dir = Path(conf.output_dir).resolve()
    run = build_run(conf, output_dir)
    with exclusive(output_dir):
        watched = _watched(run.supernet.space, conf)
        before = run.scorer.score(run.supernet.state(), watched)
        if not conf.resume:
            set_aside(output_dir)
        totals = _restore(run) if conf.resume else Totals()
        totals = _train(run, totals)
        _write_outputs(run, watched, before, totals, output_dir)


def build_run(conf: ShrinkConf, output_dir: Path) -> Run:
    """The parts of a run, with the weights that it starts from; writes nothing."""
    _check(conf)
    recipe = {item.name: getattr(conf.shrinking, item.name) for item in fields(CentralTraining)}
    training = CentralTraining(**{**recipe, "frozen": tuple(conf.shrinking.frozen)})
    data = _load_data(conf)
    images, train = data.image_set, data.client(0).train
    supernet = build_first(describe_supernet(conf.supernet, images), torch.Generator().manual_seed(conf.seed))
    schedule = build_schedule(conf.shrinking, supernet.space, conf.shrinking.steps)
    if conf.supernet_weights:
        say(start_from(supernet, Path(conf.supernet_weights), torch.Generator().manual_seed(conf.seed)))
    normalisation = normalisation_for(supernet, images)
    shrinking = CentralShrinking(
        supernet, schedule, training, train.images, train.labels, **normalisation, seed=conf.seed
    )
    scorer = Scorer(supernet, data.global_test, _calibration(conf, train), normalisation)
    checkpoints = CheckpointStore(output_dir / "checkpoints", "step")
    return Run(conf, supernet, shrinking, scorer, checkpoints, RoundLog(output_dir / "steps.jsonl"), _identity(conf))


def _load_data(conf: ShrinkConf) -> FederatedData:
    """The same test set as a simulation with this seed has, and one client that holds all the rest."""
    whole = {"kind": "iid", "num_clients": 1, "min_examples": 2, "client_test_fraction": 0.0}
    return load_examples(conf.data, conf.seed, **whole)


def _calibration(conf: ShrinkConf, train: Examples) -> Examples:
    """Random training examples, for subnets with batch norm."""
    order = np.random.default_rng([conf.seed, _CALIBRATION]).permutation(len(train.labels))
    chosen = np.sort(order[: conf.calibration_examples])
    mixed = np.random.default_rng([conf.seed, _CALIBRATION, 1]).permutation(chosen)
    return Examples(train.images[mixed], train.labels[mixed])


def _watched(space: SearchSpace, conf: ShrinkConf) -> dict[str, SubnetConfig]:
    """The subnets that are scored before and after: the largest, the smallest and some random ones."""
    rng = np.random.default_rng([conf.seed, _WATCHED])
    drawn = {f"random {number}": space.sample(rng) for number in range(1, conf.num_watched + 1)}
    return {"largest": space.largest(), "smallest": space.smallest(), **drawn}


def _restore(run: Run) -> Totals:
    """Go on from a checkpoint, where there is one."""
    checkpoint = run.checkpoints.load(run.identity, run.conf.resume_step)
    if checkpoint is None:
        run.log.cut(0)
        return Totals()
    run.shrinking.restore(checkpoint.state)
    run.checkpoints.drop_after(checkpoint.round)
    run.log.cut(checkpoint.log_bytes)
    return checkpoint.totals


def _train(run: Run, earlier: Totals) -> Totals:
    """All steps that are left, with a checkpoint every so many and after the last."""
    shrinking, num_steps = run.shrinking, run.shrinking.schedule.num_steps
    watch, totals = Stopwatch(), earlier
    with StepProgress(num_steps, shrinking.done) as progress:
        while shrinking.done < num_steps:
            line = StepLine(shrinking.advance())
            log_bytes = run.log.append(line)
            keep = shrinking.done % run.conf.checkpoint_every == 0 or shrinking.done == num_steps
            progress.step_finished(line.to_json(), report=keep)
            if keep:
                totals = _added(earlier, watch)
                state = shrinking.state()
                run.checkpoints.save(Checkpoint(shrinking.done, state, {}, totals, run.identity, "", log_bytes))
    return totals


def _added(earlier: Totals, watch: Stopwatch) -> Totals:
    return replace(
        earlier,
        wall_seconds=earlier.wall_seconds + watch.wall_seconds(),
        cpu_seconds=earlier.cpu_seconds + watch.cpu_seconds(),
        peak_rss_bytes=max(earlier.peak_rss_bytes, watch.peak_rss_bytes()),
    )


def _identity(conf: ShrinkConf) -> dict[str, Any]:
    """The settings that make two runs the same run, flat, by dotted key."""
    settings = json.loads(encode_conf(conf))
    for name in _MAY_CHANGE:
        settings.pop(name)
    settings["data"].pop("cache_dir")
    settings["data"].pop("path")
    settings["supernet_weights"] = fingerprint(conf.supernet_weights)
    return flat_settings(settings)


def _write_outputs(
    run: Run, watched: Mapping[str, SubnetConfig], before: Mapping[str, Score], totals: Totals, output_dir: Path
) -> None:
    state = with_largest_statistics(run)
    after = run.scorer.score(state, watched)
    if not all(math.isfinite(score.loss) for score in after.values()):
        raise DivergenceError(
            f"shrinking, step {run.shrinking.done}: the trained subnets' losses are not finite, so nothing but the "
            "checkpoints is written; start again with a lower shrinking.learning_rate"
        )
    raw = run.scorer.score_uncalibrated(state, watched) if run.scorer.calibrates else {}
    rows = []
    for name, subnet in watched.items():
        row = subnet_row(run.supernet, name, subnet, after[name].accuracy)
        uncalibrated = raw[name].accuracy if raw else None
        extra = {"loss": after[name].loss, "accuracy_before": before[name].accuracy}
        rows.append({**row, **extra, "accuracy_uncalibrated": uncalibrated})
    spent = asdict(totals)
    summary = {
        "steps": run.shrinking.done,
        "seed": run.conf.seed,
        "schedule": run.conf.shrinking.schedule,
        "phases": run.shrinking.schedule.to_json()["phases"],
        "shared_digest": state.digest(),
        "subnets": rows,
        **{name: spent[name] for name in ("wall_seconds", "cpu_seconds", "peak_rss_bytes")},
        "versions": versions(),
    }
    write_supernet(output_dir, state, run.supernet.description(), run.scorer.normalisation)
    replace_file(output_dir / "config.json", json.dumps(json.loads(encode_conf(run.conf)), indent=1).encode())
    replace_file(output_dir / "summary.json", json.dumps(summary, indent=1).encode())
    plot_shrinking(summary, output_dir / "accuracy_vs_macs.png")


def with_largest_statistics(run: Run) -> SharedState:
    """The trained weights; where there is batch norm, with the largest subnet's calibrated statistics."""
    state, largest = run.supernet.state(), run.supernet.space.largest()
    if not run.scorer.calibrates:
        return state
    calibrated = run.scorer.calibrated_tensors(state, largest)
    tensors = dict(state.tensors)
    for item in run.supernet.slice_map(largest):
        if item.role == "statistic":
            tensors[item.name] = np.empty_like(state.tensors[item.name])
            tensors[item.name][item.index] = calibrated[item.name]
    return replace(state, tensors=tensors)


def _check(conf: ShrinkConf) -> None:
    """Settings that only their meaning can refuse; those of the schedule and the recipe refuse theirs."""
    least = {"num_threads": 1, "checkpoint_every": 1, "num_watched": 0, "calibration_examples": 2}
    for name, minimum in least.items():
        if getattr(conf, name) < minimum:
            raise ConfigError(f"{name}: expected at least {minimum}, found {getattr(conf, name)!r}")
    start = {"resume": conf.resume, "at": conf.resume_step, "name": "resume_step"}
    check_start(Path(conf.output_dir), conf.supernet_weights, **start)
