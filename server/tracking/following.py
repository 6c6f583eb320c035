"""Keeps a tracker up to date with a run's diary; a tracker that fails does not cost the run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console

from conf.compose import encode_conf
from conf.schema import SimulateConf
from fedofa.types.errors import TrackingError
from server.federation import flat_settings
from server.fleet import FleetPlan
from server.progress import wide_console
from server.rounds import RoundRecord
from server.strategy import FedOFA, Observer
from server.tracking.backends import DIARY, open_tracker
from server.tracking.tracker import RunFacts, Tracker, round_metrics, summary_figures

_FILES = ("accuracy_vs_macs.png", "rounds.png", "summary.json", "config.json")
"""What a tracker shows of `output_dir`, where it is there."""


class Follower:
    """Observes one run and passes it on to a tracker, until the tracker fails: then says so once, by name.

    The diary is the truth: what a tracker misses, the next resumed run logs from there.
    """

    def __init__(self, name: str, tracker: Tracker, warn: Callable[[str], None]) -> None:
        self._name, self._tracker, self._warn = name, tracker, warn
        self._last_round = tracker.last_round()
        self._failed = False

    def catch_up(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Log the rounds of the diary that the tracker does not have."""
        for line in lines:
            if line["round"] > self._last_round:
                self._log(line)

    def fleet_planned(self, plan: FleetPlan) -> None:
        """What each device class trains is in the summary."""

    def round_finished(self, record: RoundRecord) -> None:
        """Log a round, which is in the diary and in a checkpoint by now."""
        self._attempt(f"in round {record.round}", lambda: self._log(record.to_json()))

    def results(self, summary: Mapping[str, Any], files: Sequence[Path]) -> None:
        """Log what the run came to."""
        figures = summary_figures(summary)
        self._attempt("at the end", lambda: self._tracker.log_results(summary["rounds"], figures, files))

    def close(self, *, finished: bool) -> None:
        """Let go of the tracker's run; one that failed is at its end whatever happens, without another word."""
        if self._failed:
            with suppress(Exception):
                self._tracker.close(finished=False)
        self._attempt("when it was closed", lambda: self._tracker.close(finished=finished))

    def _log(self, line: Mapping[str, Any]) -> None:
        self._tracker.log_round(line["round"], round_metrics(line))
        self._last_round = line["round"]

    def _attempt(self, when: str, action: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            action()
        except Exception as error:  # outside code: whatever it raises must not end the run
            self._failed = True
            self._warn(
                f"tracking={self._name} failed {when}: {type(error).__name__}: {error}; the run goes on without it, "
                f"after round {self._last_round}; resume=true logs what is missing"
            )


class Tracking:
    """The tracked runs of one command: the main one and, once it starts, the one that it is compared with."""

    def __init__(self, conf: SimulateConf, output_dir: Path, console: Console | None = None) -> None:
        self._conf, self._output_dir = conf, output_dir
        self._console = console or wide_console(stderr=True)
        self._followers: dict[Path, Follower] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for follower in reversed(self._followers.values()):
            follower.close(finished=kind is None)

    def follow(self, strategy: FedOFA, folder: Path) -> list[Observer]:
        """The observers, none or one, of a strategy that keeps its run in `folder` and has been restored.

        Raises:
            TrackingError: when the main run's tracker cannot be opened; a comparison's is reported and left out.
        """
        if self._conf.tracking.name == DIARY:
            return []
        try:
            self._followers[folder] = self._open(strategy, folder)
        except TrackingError as error:
            if folder == self._output_dir:
                raise
            self._warn(f"{error}; the run goes on without it")
            return []
        return [self._followers[folder]]

    def results(self, summary: Mapping[str, Any]) -> None:
        """Log the summary and the pictures with the main run, the comparison's row with the comparison."""
        for folder, follower in self._followers.items():
            if folder == self._output_dir:
                paths = [self._output_dir / name for name in _FILES]
                follower.results(summary, [path for path in paths if path.exists()])
            else:
                follower.results(summary["comparison"], ())

    def _open(self, strategy: FedOFA, folder: Path) -> Follower:
        changeable = {
            name: value
            for name, value in flat_settings(json.loads(encode_conf(self._conf))).items()
            if name not in strategy.run
        }
        facts = RunFacts(folder, self._output_dir, strategy.run, changeable, strategy.done)
        name = self._conf.tracking.name
        tracker = open_tracker(self._conf.tracking, facts)
        try:
            follower = Follower(name, tracker, self._warn)
            follower.catch_up(strategy.log.read())
        except Exception as error:
            tracker.close(finished=False)
            raise TrackingError(f"tracking={name}: run {facts.name!r} cannot catch up: {error!r}") from error
        return follower

    def _warn(self, text: str) -> None:
        self._console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)
