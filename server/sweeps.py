"""Sweeps: `fedofa simulate -m` runs every combination of the swept settings, and goes on where it was interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from conf.compose import check_conf, load_conf
from conf.multirun import multirun, num_parallel_runs, sweep_dir
from conf.schema import SimulateConf
from fedofa.types.errors import FedofaError, SweepError
from server.federation import run_identity
from server.resources import available_cores
from server.runtimes import run_federation

CONSOLE = "console.txt"
"""What a run of a parallel sweep prints goes into this file of its folder."""
_WATCH_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run of a sweep ended: "done" now, "skipped" because it was done before, or "failed" for a reason."""

    name: str
    status: str
    reason: str = ""


def run_sweep(overrides: Sequence[str]) -> Path:
    """Run what is not done yet of a sweep; returns its folder.

    Raises:
        ConfigError: before anything runs, for settings that do not compose.
        SweepError: at the end, with the name of every run that failed and why.
    """
    outcomes = multirun(overrides, partial(_run, sweeper=os.getpid()))
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    counts = {status: sum(outcome.status == status for outcome in outcomes) for status in ("done", "skipped")}
    folder = sweep_dir(overrides)
    print(f"{counts['done']} runs done, {counts['skipped']} were done before, {len(failed)} failed, in {folder}")
    if failed:
        reasons = "; ".join(f"{outcome.name}: {outcome.reason}" for outcome in failed)
        raise SweepError(f"{len(failed)} of {len(outcomes)} runs failed, the others are done: {reasons}")
    return folder


def _run(composed: DictConfig, folder: Path, *, sweeper: int) -> Outcome:
    """One run, in the sweep's process or in one that its launcher started."""
    if os.getpid() != sweeper:
        _end_with(sweeper)
    together = num_parallel_runs()
    try:
        conf = for_sweep(check_conf(composed), folder, together)
        if is_done(conf):
            outcome = Outcome(folder.name, "skipped")
        else:
            with _own_console(folder) if together > 1 else contextlib.nullcontext():
                announce(f"{folder.name}:")
                run_federation(conf)
            outcome = Outcome(folder.name, "done")
    except Exception as error:  # a fault of this run must not end the others
        outcome = Outcome(folder.name, "failed", reason_of(error))
    announce(": ".join(text for text in asdict(outcome).values() if text))
    return outcome


def for_sweep(conf: SimulateConf, folder: Path, together: int) -> SimulateConf:
    """A run's settings within a sweep: in its folder, from its checkpoint, with its share of the cores.

    Args:
        together: runs that go on at a time; where `runtime.num_workers` is 0 they share the cores evenly.
    """
    workers = conf.runtime.num_workers or max(1, available_cores() // together)
    runtime = replace(conf.runtime, num_workers=workers)
    return replace(conf, output_dir=str(folder), resume=True, resume_round=None, runtime=runtime)


def is_done(conf: SimulateConf) -> bool:
    """Whether `output_dir` holds the results of a run with these settings."""
    folder = Path(conf.output_dir)
    try:
        num_rounds = json.loads((folder / "summary.json").read_text())["rounds"]
        kept = load_conf({"config": (folder / "config.json").read_text()})
    except (OSError, ValueError, KeyError, TypeError):  # a ConfigError is a ValueError
        return False
    same = run_identity(kept, uniform=False) == run_identity(conf, uniform=False)
    return same and num_rounds == conf.rounds and kept.evaluation == conf.evaluation


def reason_of(error: Exception) -> str:
    """Why a run failed; what fedofa did not raise on purpose is also printed with its traceback."""
    if isinstance(error, FedofaError):
        return str(error)
    traceback.print_exception(error)
    return repr(error)


def announce(text: str) -> None:
    """A line on the console about a run among others."""
    Console(stderr=True).print(text, style="bold", markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _own_console(folder: Path) -> Iterator[None]:
    """What is printed meanwhile goes into a file of the run's folder: runs side by side would mix their lines."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / CONSOLE).open("a", buffering=1) as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        with contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
            yield


@lru_cache(maxsize=1)
def _end_with(sweeper: int) -> None:
    """End this process when the sweep's process is gone: its run would be in the way of the sweep that goes on."""
    threading.Thread(target=_wait_for_end, args=(sweeper,), daemon=True).start()


def _wait_for_end(sweeper: int) -> None:
    while os.getppid() == sweeper:
        time.sleep(_WATCH_SECONDS)
    sys.stderr.flush()
    os._exit(1)
