"""The picture of a supernet's central training: every watched subnet by compute and accuracy, before and after."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from fedofa.report import style
from fedofa.types.errors import ConfigError

_HEIGHT_INCHES = 5.2
_SERIES = (
    ("accuracy", "trained", 0, "o", "-"),
    ("accuracy_uncalibrated", "trained, statistics not calibrated", 1, "x", ":"),
    ("accuracy_before", "before", 3, "s", "--"),
    ("accuracy_alone", "the same size trained alone, with the supernet's whole compute", 2, "D", "none"),
)
"""Key in the summary, name, colour, marker and line of each series."""


def plot_shrinking(summary: Mapping[str, Any], path: Path) -> None:
    """Draw accuracy against MACs.

    `summary` is that of `fedofa shrink`: `steps`, `schedule`, `seed` and `subnets` (each with `name`, `macs`,
    `accuracy` and, where they are known, `accuracy_before`, `accuracy_uncalibrated` and `accuracy_alone`). `path` is
    replaced as a whole, or not at all.

    Raises:
        ConfigError: when there is no subnet.
    """
    rows = sorted(summary["subnets"], key=lambda row: row["macs"])
    if not rows:
        raise ConfigError("summary: expected at least one entry in `subnets`, found none; watch a subnet")
    figure = style.new_figure(_title(rows), _HEIGHT_INCHES)
    subtitle = f"{summary['schedule']} schedule, {summary['steps']:,} steps, seed {summary['seed']}"
    top = 1 - 0.56 / _HEIGHT_INCHES
    figure.text(style.LEFT, top, subtitle, fontsize=style.SMALL_POINTS, color=style.GREY)
    axes = figure.add_axes((style.LEFT, 0.12, style.RIGHT - style.LEFT, 0.69))
    style.style_axes(axes, "Accuracy on the global test set (%)")
    style.scale_macs(axes, [row["macs"] / 1e6 for row in rows])
    values = [100 * row[key] for key, *_ in _SERIES for row in rows if row.get(key) is not None]
    style.scale_percent(axes, values, padding=0.1, least_padding=1.5)
    for key, name, colour, marker, line in _SERIES:
        _draw(axes, rows, key, name, style.PALETTE[colour], marker, line)
    axes.legend(loc="best", frameon=False, fontsize=style.SMALL_POINTS, labelcolor=style.GREY)
    style.save_png(figure, path)


def _draw(axes: Axes, rows: list[Mapping[str, Any]], key: str, name: str, colour: str, marker: str, line: str) -> None:
    points = [(row["macs"] / 1e6, 100 * row[key]) for row in rows if row.get(key) is not None]
    if points:
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=colour, marker=marker, markersize=6, linestyle=line, linewidth=1, label=name)


def _title(rows: list[Mapping[str, Any]]) -> str:
    low, high = (min(row["accuracy"] for row in rows), max(row["accuracy"] for row in rows))
    sizes = f"{style.short(rows[0]['macs'] / 1e6)} to {style.short(rows[-1]['macs'] / 1e6)} M MACs"
    return f"{style.count_noun(len(rows), 'subnet')} of one supernet, {sizes}: {100 * low:.1f} to {100 * high:.1f} %"
