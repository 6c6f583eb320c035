"""What a tracker is: it is told of a run's settings once, of every round, and of the end."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.checkpoint import replace_file

_IDENTITIES = "tracking.json"
"""In a run's folder: what the backends call this run, so that a resumed run goes on in the same place."""


@dataclass(frozen=True, slots=True)
class RunFacts:
    """A run as a tracker sees it.

    Args:
        folder: the run's own, absolute.
        main_folder: of the run that this one is compared with; for the main run its own folder.
        settings: what makes it this run, by dotted key; a resumed run has the same.
        changeable: other settings, which a resumed run may have changed.
        last_round: the last one in the diary, 0 before the first.
    """

    folder: Path
    main_folder: Path
    settings: Mapping[str, Any]
    changeable: Mapping[str, Any]
    last_round: int

    @property
    def is_comparison(self) -> bool:
        """Whether this run stands beside the main one."""
        return self.folder != self.main_folder

    @property
    def name(self) -> str:
        """The main run's is its folder's name; a comparison adds its own."""
        return f"{self.main_folder.name}/{self.folder.name}" if self.is_comparison else self.folder.name


class Tracker(ABC):
    """One run in one backend. Any of its methods may raise whatever the backend raises.

    A backend's `open_run(conf, facts)` goes on with the run that it has of `facts.folder`. Where that has rounds beyond
    `facts.last_round`, because an older checkpoint was asked for, a run without them takes its place.
    """

    @abstractmethod
    def last_round(self) -> int:
        """The last round that this run had in the backend when it was opened, 0 for none; later ones are logged."""

    @abstractmethod
    def log_round(self, round_number: int, metrics: Mapping[str, float]) -> None:
        """Log one round, whole; rounds come in order, each once."""

    @abstractmethod
    def log_results(self, round_number: int, figures: Mapping[str, float], files: Sequence[Path]) -> None:
        """Log what the run came to after its last round; the same results may come again and are not doubled."""

    @abstractmethod
    def close(self, *, finished: bool) -> None:
        """Let go of the run; `finished` is false where it was stopped or failed."""


def recall_identity(folder: Path, backend: str) -> str | None:
    """What a backend calls the run in `folder`; None when it does not know it yet."""
    return _identities(folder).get(backend)


def remember_identity(folder: Path, backend: str, identity: str) -> None:
    """Note what a backend calls the run in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    identities = {**_identities(folder), backend: identity}
    replace_file(folder / _IDENTITIES, json.dumps(identities, indent=1).encode())


def _identities(folder: Path) -> dict[str, str]:
    path = folder / _IDENTITIES
    return json.loads(path.read_bytes()) if path.exists() else {}


def round_metrics(line: Mapping[str, Any]) -> dict[str, float]:
    """A line of `rounds.jsonl` in numbers: fields as they are, lists by their length, scores by subnet."""
    metrics = {name: float(len(value)) for name, value in line.items() if isinstance(value, list)}
    metrics |= _numbers(line)
    metrics.pop("round")
    for name, score in (line.get("scores") or {}).items():
        metrics |= {f"accuracy/{name}": score["accuracy"], f"test_loss/{name}": score["loss"]}
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def summary_figures(summary: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a run's summary, or of its comparison's row, under "final/"."""
    figures = _numbers(summary)
    for row in summary.get("subnets", ()):
        figures |= {f"{row['name']}/{key}": value for key, value in _numbers(row).items()}
    return {f"final/{name}": value for name, value in figures.items() if math.isfinite(value)}


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
    return {name: float(value) for name, value in numbers.items() if not isinstance(value, bool)}
