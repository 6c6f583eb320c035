"""`fedofa compare`: runs side by side on the terminal, in a picture and in a file for programs."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from fedofa.report.compare_plots import plot_comparison
from fedofa.report.comparison import Run, build_comparison, differing, find_runs, label_of, seed_groups, spread_of
from fedofa.types.errors import ConfigError
from server.checkpoint import replace_file
from server.progress import wide_console


def compare_runs(folders: Sequence[Path]) -> Path:
    """Compare the runs in these folders; `comparison.json` and `comparison.png` go into the deepest folder of them all.

    Returns:
        That folder.

    Raises:
        ConfigError: when a folder holds no run, or no run was evaluated yet.
    """
    if not folders:
        raise ConfigError("compare: expected at least one folder of a run or a sweep, found none")
    runs = find_runs(folders)
    output_dir = Path(os.path.commonpath([folder.resolve() for folder in folders]))
    print_comparison(runs)
    try:
        plot_comparison(runs, output_dir / "comparison.png")
        replace_file(output_dir / "comparison.json", json.dumps(build_comparison(runs), indent=1).encode())
    except OSError as error:
        raise ConfigError(f"{output_dir}: the comparison cannot be written there: {error}") from error
    print(f"comparison.png and comparison.json are in {output_dir}")
    return output_dir


def print_comparison(runs: Sequence[Run]) -> None:
    """Print a table of the runs, and one of the means over those that differ only by seed."""
    keys, console = differing(runs), wide_console()
    subnets = list(dict.fromkeys(name for run in runs for name in run.accuracy))
    table = Table("run", "rounds", *subnets, "MB down", "MB up", "CPU s", title="accuracy on the global test set")
    for run in runs:
        rounds = str(len(run.rounds)) + ("" if run.finished else " (unfinished)")
        accuracy = [f"{run.accuracy[name]:.3f}" if name in run.accuracy else "" for name in subnets]
        bytes_moved = [f"{run.totals[key] / 1e6:.1f}" for key in ("bytes_down", "bytes_up")]
        seconds = f"{run.totals['cpu_seconds']:.0f}" if "cpu_seconds" in run.totals else ""
        table.add_row(label_of(run, keys), rounds, *accuracy, *bytes_moved, seconds)
    console.print(table)
    groups = seed_groups(runs)
    if not groups:
        return
    table = Table("settings", "seeds", *subnets, title="mean and standard deviation over seeds")
    for group in groups:
        spread = spread_of(group)
        cells = [f"{spread[name][0]:.3f} ± {spread[name][1]:.3f}" if name in spread else "" for name in subnets]
        label = label_of(group[0], [key for key in keys if key != "seed"]) if len(keys) > 1 else "all"
        table.add_row(label, str(len(group)), *cells)
    console.print(table)
