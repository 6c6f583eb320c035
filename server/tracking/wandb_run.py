"""Weights & Biases: one W&B run a run, offline files in the run's own folder unless `tracking.mode=online`."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, cast

import wandb

from conf.schema import TrackingConf
from server.tracking.tracker import RunFacts, Tracker, recall_identity, remember_identity

_BACKEND = "wandb"


def open_run(conf: TrackingConf, facts: RunFacts) -> WandbRun:
    """The run under the id it had before; a run that must be replaced online gets a new id."""
    identity = recall_identity(facts.folder, _BACKEND) or _new_identity(facts.folder)
    facts.folder.mkdir(parents=True, exist_ok=True)
    _remove_offline_copies(facts.folder, identity)
    tracker = WandbRun(_init(conf, facts, identity))
    if tracker.last_round() > facts.last_round:
        tracker.close(finished=False)
        tracker = WandbRun(_init(conf, facts, _new_identity(facts.folder)))
    return tracker


class WandbRun(Tracker):
    """Settings as the config, rounds as history by step, results as W&B's summary, the files beside them.

    Offline a resumed run is written anew, whole, from the diary; online the server says which rounds it has.
    """

    def __init__(self, run: wandb.Run) -> None:
        self._run = run
        self._last_round = max(0, run.step - 1)  # W&B gives the step that comes next

    def last_round(self) -> int:
        """See Tracker."""
        return self._last_round

    def log_round(self, round_number: int, metrics: Mapping[str, float]) -> None:
        """See Tracker."""
        self._run.log(dict(metrics), step=round_number, commit=True)

    def log_results(self, round_number: int, figures: Mapping[str, float], files: Sequence[Path]) -> None:
        """See Tracker."""
        self._run.summary.update(dict(figures))
        for path in files:
            copy = shutil.copy(path, self._run.dir)  # W&B would link to files elsewhere, which may be moved
            self._run.save(copy, base_path=self._run.dir, policy="now")

    def close(self, *, finished: bool) -> None:
        """See Tracker."""
        self._run.finish(exit_code=0 if finished else 1)


def _init(conf: TrackingConf, facts: RunFacts, identity: str) -> wandb.Run:
    return wandb.init(
        mode=cast(Literal["online", "offline"], conf.mode),
        project=conf.project,
        id=identity,
        resume="allow",
        reinit="create_new",  # the main run is still open when the comparison starts
        dir=str(facts.folder),
        name=facts.name,
        group=facts.main_folder.name,
        job_type="comparison" if facts.is_comparison else "main",
        config={**facts.changeable, **facts.settings},
        allow_val_change=True,
        settings=wandb.Settings(
            console="off", silent=True, disable_git=True, save_code=False, x_disable_meta=True, x_disable_stats=True
        ),
    )


def _new_identity(folder: Path) -> str:
    identity = uuid.uuid4().hex[:12]
    remember_identity(folder, _BACKEND, identity)
    return identity


def _remove_offline_copies(folder: Path, identity: str) -> None:
    for path in (folder / "wandb").glob(f"offline-run-*-{identity}"):
        shutil.rmtree(path)
