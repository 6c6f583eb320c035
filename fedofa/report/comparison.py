"""Runs side by side: what they were, what they reached, and the mean and spread of those that differ only by seed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedofa.types.errors import ConfigError

_NO_RESULT = ("output_dir", "resume", "resume_round", "data.path", "data.cache_dir", "runtime.", "tracking.")
"""Settings that do not change what a run computes."""
_MARKERS = ("summary.json", "rounds.jsonl")
_MOST_NAMED = 4
"""Settings that differ, at the most, for a run to be called by them."""
_TOTALS = ("bytes_down", "bytes_up", "cpu_seconds", "wall_seconds")


@dataclass(frozen=True, slots=True)
class Run:
    """One run as it is on disk.

    Args:
        name: its folder, relative to the one that was asked for.
        finished: whether its results are those of its last round.
        settings: dotted key -> value, without those that do not change what it computes.
        rounds: the lines of `rounds.jsonl`.
        accuracy: name of a watched subnet -> accuracy on the global test set, where it was last evaluated.
        macs: name of a watched subnet -> multiply-accumulates per example; empty for an unfinished run.
        totals: bytes and seconds over the rounds, as far as they are known.
    """

    name: str
    finished: bool
    settings: Mapping[str, Any]
    rounds: Sequence[Mapping[str, Any]]
    accuracy: Mapping[str, float]
    macs: Mapping[str, int]
    totals: Mapping[str, float]


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders, each a run or a folder with runs somewhere below it, such as a sweep's.

    Raises:
        ConfigError: for a folder that holds no run, or one whose files cannot be read.
    """
    paths: dict[Path, str] = {}
    for folder in folders:
        found = list(_runs_below(folder)) if folder.is_dir() else []
        if not found:
            what = "has no run in it or below it" if folder.is_dir() else "is no folder"
            raise ConfigError(f"{folder} {what}; expected {' or '.join(_MARKERS)}, which `fedofa simulate` writes")
        for path in found:
            paths.setdefault(path.resolve(), str(path.relative_to(folder)) if path != folder else folder.name)
    clash = len(set(paths.values())) < len(paths)
    return [_read_run(path, str(path) if clash else name) for path, name in paths.items()]


def _runs_below(folder: Path) -> Iterator[Path]:
    """The folder itself if it is a run, else those below it; a run's own comparison run belongs to it."""
    if any((folder / marker).is_file() for marker in _MARKERS):
        yield folder
        return
    for item in sorted(folder.iterdir()):
        if item.is_dir() and not item.is_symlink():
            yield from _runs_below(item)


def _read_run(path: Path, name: str) -> Run:
    try:
        log = path / "rounds.jsonl"
        rounds = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
        summary = _read_json(path / "summary.json")
        finished = bool(summary) and summary["rounds"] >= len(rounds)
        settings = _settings(path)
        if finished:
            accuracy = {row["name"]: row["accuracy"] for row in summary["subnets"]}
            macs = {row["name"]: row["macs"] for row in summary["subnets"]}
            return Run(name, True, settings, rounds, accuracy, macs, {key: summary[key] for key in _TOTALS})
        scores = next((line["scores"] for line in reversed(rounds) if line.get("scores")), {})
        accuracy = {subnet: score["accuracy"] for subnet, score in scores.items()}
        totals = {key: sum(line[key] for line in rounds) for key in ("bytes_down", "bytes_up", "wall_seconds")}
        return Run(name, False, settings, rounds, accuracy, {}, totals)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: the run cannot be read: {error!r}; leave it out, or run it again") from error


def _settings(path: Path) -> dict[str, Any]:
    """A run's settings from `config.json`, which a finished run has, else from its newest checkpoint."""
    settings = _flat(_read_json(path / "config.json"), "")
    manifests = sorted(path.glob("checkpoints/round-*/checkpoint.json"))
    if not settings and manifests:
        settings = _flat(_read_json(manifests[-1])["manifest"]["run"], "")
    return {key: value for key, value in settings.items() if not key.startswith(_NO_RESULT) and key != "uniform"}


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _flat(value: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Nested settings by dotted key; lists become JSON text."""
    items: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            items |= _flat(item, f"{prefix}{key}.")
        else:
            items[f"{prefix}{key}"] = json.dumps(item) if isinstance(item, list) else item
    return items


def differing(runs: Sequence[Run]) -> list[str]:
    """The settings that not all runs share, of those that every run states; the seed comes last."""
    shared = set(runs[0].settings).intersection(*(run.settings for run in runs))
    keys = sorted(key for key in shared if len({run.settings[key] for run in runs}) > 1)
    return [key for key in keys if key != "seed"] + [key for key in keys if key == "seed"]


def same_but_seed(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs in groups that differ only by seed, in order of appearance."""
    keys = [key for key in differing(runs) if key != "seed"]
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(run.settings.get(key) for key in keys), []).append(run)
    return list(groups.values())


def label_of(run: Run, keys: Sequence[str]) -> str:
    """A run by its own values of the settings that differ, "alpha=0.1, seed=0"; its name where none or many differ."""
    if not 0 < len(keys) <= _MOST_NAMED:
        return run.name
    return ", ".join(f"{_short(key, keys)}={_value(run.settings.get(key))}" for key in keys)


def _short(key: str, keys: Sequence[str]) -> str:
    """The last part of a dotted key, where it says enough."""
    last = key.rpartition(".")[2]
    alone = [other.rpartition(".")[2] for other in keys].count(last) == 1
    return last if alone and last != "name" else key


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def spread_of(runs: Sequence[Run]) -> dict[str, tuple[float, float]]:
    """Subnet name -> mean and sample standard deviation of its accuracy over runs that differ only by seed."""
    names = [name for name in runs[0].accuracy if all(name in run.accuracy for run in runs)]
    values = {name: [run.accuracy[name] for run in runs] for name in names}
    return {name: (statistics.mean(each), statistics.stdev(each)) for name, each in values.items() if len(each) > 1}


def build_comparison(runs: Sequence[Run]) -> dict[str, Any]:
    """The content of `comparison.json`."""
    keys = differing(runs)
    return {
        "differing": keys,
        "runs": [_run_row(run, keys) for run in runs],
        "over_seeds": [_group_row(group, keys) for group in seed_groups(runs)],
    }


def seed_groups(runs: Sequence[Run]) -> list[list[Run]]:
    """Groups of at least two finished runs that differ only by seed."""
    finished = [[run for run in group if run.finished] for group in same_but_seed(runs)]
    return [group for group in finished if len({run.settings.get("seed") for run in group}) > 1]


def _run_row(run: Run, keys: Sequence[str]) -> dict[str, Any]:
    return {
        "name": run.name,
        "finished": run.finished,
        "rounds": len(run.rounds),
        "settings": {key: run.settings[key] for key in keys},
        "accuracy": dict(run.accuracy),
        "macs": dict(run.macs),
        **{key: run.totals.get(key) for key in _TOTALS},
    }


def _group_row(group: Sequence[Run], keys: Sequence[str]) -> dict[str, Any]:
    return {
        "runs": [run.name for run in group],
        "settings": {key: group[0].settings[key] for key in keys if key != "seed"},
        "accuracy": {name: {"mean": mean, "std": std} for name, (mean, std) in spread_of(group).items()},
    }
