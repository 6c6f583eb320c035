"""The picture of several runs side by side: accuracy over the rounds, and accuracy against compute."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedofa.report.comparison import Run, differing, label_of, same_but_seed
from fedofa.report.curves import (
    BOTTOM_INCHES,
    GAP_INCHES,
    LABEL_LINE_INCHES,
    TOP_INCHES,
    Curve,
    accuracy_courses,
    draw_curves,
    label_ends,
    scale_rounds,
    stack_panels,
)
from fedofa.report.style import (
    PALETTE,
    count_noun,
    new_figure,
    save_png,
    say_empty,
    scale_macs,
    scale_percent,
    style_axes,
    wrap,
)
from fedofa.types.errors import ConfigError

_PANEL_INCHES = 2.3
_AXIS_INCHES = 0.55  # below each panel, since their x axes differ
_SINGLE = 0.35
"""Opacity of a run that shares its colour with others, which differ from it by seed only; their mean is opaque."""


def plot_comparison(runs: Sequence[Run], path: Path) -> None:
    """Draw the accuracy of the largest subnet and of the lowest device class over the rounds, and accuracy by MACs.

    Runs that differ only by seed share a colour: each is a thin line, and their mean a thick one with the label. The
    last panel holds finished runs only. `path` is replaced as a whole, or not at all. Raises `ConfigError` when no run
    was evaluated.
    """
    save_png(comparison_figure(runs), path)


def comparison_figure(runs: Sequence[Run]) -> Figure:
    """The figure that `plot_comparison` writes."""
    evaluated = [run for run in runs if run.accuracy]
    if not evaluated:
        raise ConfigError("picture of the comparison: no run was evaluated yet; wait for the first evaluation")
    groups, keys = same_but_seed(evaluated), differing(evaluated)
    labels = [_label(group, keys) for group in groups]
    lines = sum(wrap(label).count("\n") + 1 for label in labels) + len(labels)
    heights = [max(_PANEL_INCHES, lines * LABEL_LINE_INCHES)] * 3
    total = TOP_INCHES + sum(heights) + (GAP_INCHES + _AXIS_INCHES) * 2 + BOTTOM_INCHES
    figure = new_figure(_title(evaluated, len(groups)), total)
    largest, lowest, by_macs = stack_panels(figure, heights, gap_inches=GAP_INCHES + _AXIS_INCHES, shared=False)
    _draw_courses(largest, "largest subnet", groups, labels, {run.name: _largest(run) for run in evaluated})
    _draw_courses(lowest, "lowest device class", groups, labels, {run.name: _lowest(run) for run in evaluated})
    _draw_by_macs(by_macs, groups, labels)
    return figure


def _title(runs: Sequence[Run], num_groups: int) -> str:
    unfinished = sum(not run.finished for run in runs)
    title = count_noun(len(runs), "run")
    title += f", {num_groups} settings" if num_groups < len(runs) else ""
    return title + (f", {unfinished} unfinished" if unfinished else "")


def _label(group: Sequence[Run], keys: Sequence[str]) -> str:
    """What the runs of a group share, and how many they are."""
    if len(group) == 1:
        return label_of(group[0], keys) + ("" if group[0].finished else " (unfinished)")
    shared = [key for key in keys if key != "seed"]
    seeds = count_noun(len(group), "seed")
    return f"{label_of(group[0], shared)}, {seeds}" if shared else f"mean of {count_noun(len(group), 'run')}"


def _largest(run: Run) -> str:
    """The subnet of a run that is drawn as its largest."""
    return "largest" if "largest" in run.accuracy else next(iter(run.accuracy))


def _lowest(run: Run) -> str:
    """The device class whose subnet ended lowest; the smallest subnet of the space is not one's own."""
    classes = [name for name in run.accuracy if name not in ("largest", "smallest")] or list(run.accuracy)
    return min(classes, key=lambda name: run.accuracy[name])


def _draw_courses(
    axes: Axes, what: str, groups: Sequence[Sequence[Run]], labels: Sequence[str], subnets: Mapping[str, str]
) -> None:
    style_axes(axes, f"Accuracy on the global test set (%), {what}")
    singles, named = [], []
    for group, label, colour in zip(groups, labels, itertools.cycle(PALETTE), strict=False):
        curves = [curve for run in group for curve in _course(run, subnets[run.name], colour)]
        if len(curves) > 1:
            singles += [replace(curve, width_points=0.9, opacity=_SINGLE) for curve in curves]
            named += _mean(curves)
        else:
            named += curves
        named[-1] = replace(named[-1], label=wrap(f"{label} {named[-1].values[-1]:.1f}\u00a0%"))
    numbers = [number for curve in (*singles, *named) for number in curve.rounds]
    scale_rounds(axes, min(numbers), max(numbers))
    scale_percent(
        axes, [value for curve in (*singles, *named) for value in curve.values], padding=0.06, least_padding=0.5
    )
    draw_curves(axes, singles, labelled=False)
    draw_curves(axes, named)


def _course(run: Run, subnet: str, colour: str) -> list[Curve]:
    """The accuracy of one subnet over a run's rounds."""
    lines = [{**line, "scores": {subnet: (line.get("scores") or {}).get(subnet, {})}} for line in run.rounds]
    return [
        Curve("", rounds, values, colour, dashed=not run.finished)
        for _, rounds, values in accuracy_courses(lines, f"{run.name}, round")
    ]


def _mean(curves: Sequence[Curve]) -> list[Curve]:
    """The mean at the rounds in which all of the curves have a value; the first curve where there is none."""
    by_round = [dict(zip(curve.rounds, curve.values, strict=True)) for curve in curves]
    shared = sorted(set(by_round[0]).intersection(*by_round))
    if not shared:
        return [curves[0]]
    values = tuple(statistics.mean(values[number] for values in by_round) for number in shared)
    return [replace(curves[0], rounds=tuple(shared), values=values, dashed=False, width_points=2.2)]


def _draw_by_macs(axes: Axes, groups: Sequence[Sequence[Run]], labels: Sequence[str]) -> None:
    style_axes(axes, "Accuracy on the global test set (%) of every watched subnet, by compute")
    named = []
    for group, label, colour in zip(groups, labels, itertools.cycle(PALETTE), strict=False):
        finished = [run for run in group if run.macs]
        if not finished:
            continue
        points = _mean_points(finished)
        macs, percent = tuple(macs for macs, _ in points), tuple(value for _, value in points)
        named.append(Curve(wrap(label), macs, percent, colour))
    if not named:
        say_empty(axes, "no run is finished")
        return
    scale_macs(axes, [macs for curve in named for macs in curve.rounds])
    scale_percent(axes, [value for curve in named for value in curve.values], padding=0.1, least_padding=0.5)
    for curve in named:
        axes.plot(curve.rounds, curve.values, color=curve.colour, linewidth=1, marker="o", markersize=5)
    label_ends(axes, named)


def _mean_points(runs: Sequence[Run]) -> list[tuple[float, float]]:
    """Millions of MACs and mean accuracy in percent of every subnet that all runs watch, by MACs."""
    names = [name for name in runs[0].macs if all(name in run.macs for run in runs)]
    points = {
        (
            statistics.mean(run.macs[name] / 1e6 for run in runs),
            100 * statistics.mean(run.accuracy[name] for run in runs),
        )
        for name in names
    }
    return sorted(points)
