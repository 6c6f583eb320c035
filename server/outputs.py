"""What a run leaves behind: the summary, the supernet and the pictures."""

from __future__ import annotations

import fcntl
import json
import platform
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from conf.compose import encode_conf
from fedofa.report.plots import plot_accuracy_vs_macs, plot_rounds
from fedofa.search.fit import Fit
from fedofa.supernet.base import Supernet
from fedofa.types.errors import ConfigError
from fedofa.types.space import SubnetConfig
from server.checkpoint import replace_file
from server.federation import Parts
from server.fleet import untrainable
from server.starting import holds_run
from server.strategy import FedOFA
from server.weights import write_supernet

_VERSIONS = ("fedofa", "torch", "numpy", "flwr")
COMPARISON_NAME = "FedAvg on the weakest device's subnet"


@contextmanager
def exclusive(output_dir: Path) -> Iterator[None]:
    """Hold the folder for one run; the kernel lets go of it when the process ends, however it ends.

    Raises:
        ConfigError: when another run is writing there, or the folder cannot be made.
    """
    try:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        lock = (output_dir.parent / f".{output_dir.name}.lock").open("w")
    except OSError as error:
        raise ConfigError(f"output_dir: {output_dir} cannot be written: {error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"output_dir: another run is writing to {output_dir}; choose another folder") from None
        if output_dir.exists() and not output_dir.is_dir():
            raise ConfigError(f"output_dir: {output_dir} is a file; choose a folder")
        yield


def set_aside(output_dir: Path) -> None:
    """Move an earlier run out of the way, so that nothing is lost: "simulate" becomes "simulate.<date and time>"."""
    if holds_run(output_dir):
        stamp = time.strftime("%Y-%m-%dT%H-%M-%S")
        target, number = output_dir.with_name(f"{output_dir.name}.{stamp}"), 1
        while target.exists():
            number += 1
            target = output_dir.with_name(f"{output_dir.name}.{stamp}-{number}")
        try:
            output_dir.rename(target)
        except OSError as error:
            raise ConfigError(f"output_dir: the earlier run in {output_dir} cannot be moved aside: {error}") from error
    output_dir.mkdir(parents=True, exist_ok=True)


def write_outputs(
    parts: Parts, strategy: FedOFA, on_clients: Mapping[str, float], comparison: FedOFA | None, output_dir: Path
) -> dict[str, Any]:
    """Write everything a person or a program looks at, last the summary, which says that the run is done."""
    summary = build_summary(parts, strategy, on_clients, comparison)
    write_supernet(output_dir, strategy.state, parts.supernet.description(), parts.scorer.normalisation)
    replace_file(output_dir / "config.json", json.dumps(json.loads(encode_conf(parts.conf)), indent=1).encode())
    plot_accuracy_vs_macs(summary, output_dir / "accuracy_vs_macs.png")
    beside = comparison.log.read() if comparison else []
    plot_rounds(strategy.log.read(), output_dir / "rounds.png", comparison=beside, comparison_name=COMPARISON_NAME)
    replace_file(output_dir / "summary.json", json.dumps(summary, indent=1).encode())
    return summary


def build_summary(
    parts: Parts, strategy: FedOFA, on_clients: Mapping[str, float], comparison: FedOFA | None
) -> dict[str, Any]:
    """The content of `summary.json`."""
    totals = asdict(strategy.totals)
    records = strategy.log.read()
    fleets = [strategy.plan] if strategy.shrinking is None else strategy.shrinking.fleets
    fits = [item.fit for fleet in fleets for item in fleet.assignments.values()]
    never = untrainable(parts.supernet, strategy.state, fits)
    return {
        "rounds": strategy.done,
        "num_clients": parts.conf.fleet.num_clients,
        "clients_per_round": parts.conf.fleet.clients_per_round,
        "seed": parts.conf.seed,
        "shared_digest": strategy.state.digest(),
        "subnets": _subnet_rows(parts, strategy, on_clients),
        "comparison": _comparison_row(parts, comparison) if comparison else None,
        "shrinking": _shrinking_row(strategy, records),
        "sitting_out": dict(strategy.plan.sitting_out),
        "untrainable": never,
        "lost_rounds": [record["round"] for record in records if record["outcome"] == "given up"],
        "num_failures": sum(len(record["failures"]) for record in records),
        **totals,
        "versions": versions(),
    }


def _shrinking_row(strategy: FedOFA, records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What the schedule did: who can train nothing in a phase, and in how many rounds whom it could not serve fully."""
    if strategy.shrinking is None:
        return None
    phases = zip(strategy.shrinking.schedule.phases, strategy.shrinking.fleets, strict=True)
    return {
        "phases": [
            {
                "name": phase.name,
                "rounds": phase.steps,
                "clients": len(fleet.assignments),
                "sitting_out": dict(fleet.sitting_out),
            }
            for phase, fleet in phases
        ],
        "untaught_rounds": dict(Counter(name for record in records for name in record["untaught"])),
        "sitting_out_rounds": dict(Counter(name for record in records for name in record["sitting_out"])),
    }


def versions() -> dict[str, str]:
    """Of Python and the packages that a result depends on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _VERSIONS}}


def _subnet_rows(parts: Parts, strategy: FedOFA, on_clients: Mapping[str, float]) -> list[dict[str, Any]]:
    classes = strategy.plan.classes()
    rows = []
    for name, subnet in strategy.subnets().items():
        fit, clients = classes.get(name, (None, 0))
        score = strategy.scores[name]
        row = subnet_row(parts.supernet, name, subnet, score.accuracy)
        rows.append({**row, "loss": score.loss, "num_clients": clients,
                     **_fit_row(fit), "client_test_accuracy": on_clients.get(name)})  # fmt: skip
    return rows


def _fit_row(fit: Fit | None) -> dict[str, Any]:
    if fit is None:
        return {"binding": None, "plan": None, "recompute": None, "training_bytes": None, "round_seconds": None}
    return {
        "binding": fit.binding,
        "plan": fit.plan.name,
        "recompute": bool(fit.plan.recompute),
        "training_bytes": fit.cost.training_bytes,
        "round_seconds": fit.cost.round_seconds,
    }


def _comparison_row(parts: Parts, comparison: FedOFA) -> dict[str, Any]:
    subnet = comparison.plan.weakest().subnet
    row = subnet_row(parts.supernet, COMPARISON_NAME, subnet, comparison.scores["uniform"].accuracy)
    totals = {"bytes_down": comparison.totals.bytes_down, "bytes_up": comparison.totals.bytes_up,
              "cpu_seconds": comparison.totals.cpu_seconds, "wall_seconds": comparison.totals.wall_seconds}  # fmt: skip
    return {**row, "rounds": comparison.done, **totals}


def subnet_row(supernet: Supernet, name: str, subnet: SubnetConfig, accuracy: float) -> dict[str, Any]:
    """What a summary says of every subnet."""
    blocks, space = supernet.block_costs(subnet), supernet.space
    return {
        "name": name,
        "digest": subnet.digest(),
        "macs": sum(block.macs for block in blocks),
        "params": sum(block.num_parameters for block in blocks),
        "accuracy": accuracy,
        "choices": {axis.name: list(space.values(subnet, axis.name)) for axis in space.axes},
    }
