"""The end of a run on the terminal: accuracy of every watched subnet, the comparison, and where the files are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from server.progress import sitting_out_lines, wide_console


def print_results(output_dir: Path) -> None:
    """Print a run's summary."""
    summary = json.loads((output_dir / "summary.json").read_text())
    console = wide_console()
    table = Table("subnet", "MMACs", "parameters", "accuracy", "clients' own test", "limited by")
    rows = [*summary["subnets"], *([summary["comparison"]] if summary["comparison"] else [])]
    for row in rows:
        own = row.get("client_test_accuracy")
        table.add_row(
            row["name"],
            f"{row['macs'] / 1e6:.2f}",
            f"{row['params']:,}",
            f"{row['accuracy']:.3f}",
            "" if own is None else f"{own:.3f}",
            row.get("binding") or "",
        )
    console.print(table)
    for line in sitting_out_lines(summary["sitting_out"]):
        console.print(line, highlight=False, markup=False)
    for line in shrinking_lines(summary["shrinking"]):
        console.print(line, highlight=False, markup=False)
    if summary["lost_rounds"]:
        console.print(f"rounds given up for want of answers: {summary['lost_rounds']}", highlight=False)
    if summary["untrainable"]:
        worst = max(summary["untrainable"].items(), key=lambda item: item[1])
        console.print(
            f"{len(summary['untrainable'])} tensors have coordinates that no device in the fleet can train, "
            f"at the most {worst[0]} ({worst[1]:.0%}); summary.json lists them",
            highlight=False,
        )
    console.print(
        f"{summary['rounds']} rounds, {summary['num_clients']} clients, {summary['num_failures']} failures, "
        f"{summary['wall_seconds']:.0f} s wall and {summary['cpu_seconds']:.0f} s CPU in the rounds, "
        f"{summary['bytes_down'] / 1e6:.0f} MB down, {summary['bytes_up'] / 1e6:.0f} MB up. "
        f"Results, pictures and the supernet are in {output_dir}",
        highlight=False,
    )


def shrinking_lines(shrinking: Mapping[str, Any] | None) -> list[str]:
    """Who could not take part in a phase of the schedule, or learnt without the teacher that it asks for."""
    if shrinking is None:
        return []
    lines = [
        f"phase {phase['name']!r}: {phase['clients']} clients can train in it, {len(phase['sitting_out'])} sit it out"
        for phase in shrinking["phases"]
    ]
    for key, what in (("untaught_rounds", "learnt from labels alone"), ("sitting_out_rounds", "held nothing dealt")):
        if shrinking[key]:
            total = sum(shrinking[key].values())
            lines.append(f"{len(shrinking[key])} clients {what} in {total} of their rounds; summary.json names them")
    return lines


def print_shrinking(output_dir: Path) -> None:
    """Print the summary of a supernet's central training."""
    summary = json.loads((output_dir / "summary.json").read_text())
    console = wide_console()
    calibrated = any(row["accuracy_uncalibrated"] is not None for row in summary["subnets"])
    more = ["not calibrated"] if calibrated else []
    table = Table("subnet", "MMACs", "parameters", "accuracy before", "after", *more)
    for row in sorted(summary["subnets"], key=lambda row: row["macs"]):
        figures = [row["accuracy_before"], row["accuracy"], *([row["accuracy_uncalibrated"]] if calibrated else [])]
        cells = [f"{figure:.3f}" for figure in figures]
        table.add_row(row["name"], f"{row['macs'] / 1e6:.2f}", f"{row['params']:,}", *cells)
    console.print(table)
    console.print(
        f"{summary['steps']:,} steps ({summary['schedule']}), {summary['wall_seconds']:.0f} s wall, "
        f"{summary['cpu_seconds']:.0f} s CPU. The supernet, its picture and the summary are in {output_dir}",
        highlight=False,
    )
