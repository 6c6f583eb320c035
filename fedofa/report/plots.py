"""The pictures of a run: accuracy against compute, and the course of the rounds, each written as one PNG file."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, TextArea, VPacker
from matplotlib.path import Path as Polyline
from matplotlib.ticker import StrMethodFormatter
from matplotlib.transforms import Bbox

from fedofa.report.curves import (
    BOTTOM_INCHES,
    GAP_INCHES,
    LABEL_LINE_INCHES,
    TOP_INCHES,
    Curve,
    accuracy_courses,
    draw_curves,
    percent_label,
    scale_rounds,
    stack_panels,
)
from fedofa.report.placement import find_places, leader_length
from fedofa.report.style import (
    DPI,
    GREY,
    INK,
    LEFT,
    PALETTE,
    RIGHT,
    SMALL_POINTS,
    TEXT_POINTS,
    count_noun,
    dark,
    expect_number,
    expect_text,
    finite,
    new_figure,
    save_png,
    say_empty,
    scale_macs,
    scale_percent,
    short,
    style_axes,
    wrap,
)
from fedofa.types.errors import ConfigError

_HEIGHT_INCHES = 6.0
_MARKER_RADIUS_POINTS = 3.5


def plot_accuracy_vs_macs(summary: Mapping[str, Any], path: Path) -> None:
    """Draw every distinct subnet of a run, and the run it is compared with, by compute and accuracy.

    `summary` is a run's summary: `rounds`, `num_clients`, `seed`, `subnets` (each with `name`, `digest`, `macs`,
    `accuracy` in [0, 1] and `binding`) and `comparison` (`name`, `macs`, `accuracy`, or None). Subnets of one digest
    share a point. `path` is replaced as a whole, or not at all. Raises `ConfigError` when the summary has no subnet or
    lacks a number to draw.
    """
    save_png(_accuracy_figure(summary), path)


def plot_rounds(
    rounds: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    comparison: Sequence[Mapping[str, Any]] = (),
    comparison_name: str = "",
) -> None:
    """Draw accuracy, mean local training loss and cumulative traffic over the rounds of a run.

    `rounds`, in order, each have `round`, `loss` (None or not finite leaves a gap), `cohort`, `failures`, `bytes_down`,
    `bytes_up` and, where the round was evaluated, `scores` (name of the subnet -> `accuracy` in [0, 1]). `comparison`
    holds the rounds of another run, of which the accuracy is drawn, dashed. `path` is replaced as a whole, or not at
    all. Raises `ConfigError` when there are no rounds or one lacks a number to draw.
    """
    save_png(_rounds_figure(rounds, comparison, comparison_name), path)


# Accuracy against compute


@dataclass(frozen=True)
class _Point:
    label: str
    note: str
    macs_millions: float
    accuracy_percent: float
    is_subnet: bool


def _accuracy_figure(summary: Mapping[str, Any]) -> Figure:
    subnets = _subnet_points(summary)
    points = [*subnets, *_comparison_points(summary)]
    num_clients, num_rounds, seed = (
        int(expect_number(summary, key, "run summary")) for key in ("num_clients", "rounds", "seed")
    )
    figure = new_figure(_accuracy_title(subnets), _HEIGHT_INCHES)
    subtitle = f"{count_noun(num_clients, 'client')}, {count_noun(num_rounds, 'round')}, seed {seed}"
    figure.text(LEFT, 1 - 0.56 / _HEIGHT_INCHES, subtitle, fontsize=SMALL_POINTS, color=GREY)
    axes = figure.add_axes((LEFT, 0.105, RIGHT - LEFT, 0.735))
    style_axes(axes, "Accuracy on the global test set (%)")
    scale_macs(axes, [point.macs_millions for point in points])
    scale_percent(axes, [point.accuracy_percent for point in points], padding=0.22, least_padding=1.5)
    _draw_points(axes, points)
    _label_points(axes, points)
    return figure


def _subnet_points(summary: Mapping[str, Any]) -> list[_Point]:
    """The distinct subnets in order of MACs."""
    entries_by_digest: dict[str, list[Mapping[str, Any]]] = {}
    for entry in summary.get("subnets") or ():
        entries_by_digest.setdefault(expect_text(entry, "digest", "run summary, `subnets`"), []).append(entry)
    if not entries_by_digest:
        raise ConfigError("run summary: expected at least one entry in `subnets`, found none; evaluate a subnet first")
    points = []
    for entries in entries_by_digest.values():
        label = ", ".join(dict.fromkeys(expect_text(entry, "name", "run summary, `subnets`") for entry in entries))
        points.append(_point(entries[0], label, _binding_note(entries), is_subnet=True))
    return sorted(points, key=lambda point: (point.macs_millions, point.accuracy_percent))


def _comparison_points(summary: Mapping[str, Any]) -> list[_Point]:
    comparison = summary.get("comparison")
    if comparison is None:
        return []
    return [_point(comparison, expect_text(comparison, "name", "run summary, `comparison`"), "", is_subnet=False)]


def _point(entry: Mapping[str, Any], label: str, note: str, *, is_subnet: bool) -> _Point:
    where = f"run summary, {label!r}"
    macs_millions = expect_number(entry, "macs", where, low=1) / 1e6
    accuracy_percent = 100 * expect_number(entry, "accuracy", where, high=1)
    return _Point(wrap(label), wrap(note), macs_millions, accuracy_percent, is_subnet)


def _binding_note(entries: Iterable[Mapping[str, Any]]) -> str:
    """What limits the subnets of these entries; nothing for subnets that no device was searched for."""
    bindings = list(dict.fromkeys(entry["binding"] for entry in entries if entry.get("binding") is not None))
    limits = [binding for binding in bindings if binding != "none"]
    if limits:
        return f"bound by {', '.join(limits)}"
    return "no budget binds" if bindings else ""


def _accuracy_title(subnets: Sequence[_Point]) -> str:
    smallest, largest = subnets[0], subnets[-1]
    title = f"One supernet, {count_noun(len(subnets), 'subnet')}: "
    title += f"{largest.accuracy_percent:.1f} % at {short(largest.macs_millions)} M MACs"
    if len(subnets) > 1:
        title += f", {smallest.accuracy_percent:.1f} % at {short(smallest.macs_millions)} M"
    return title


def _draw_points(axes: Axes, points: Sequence[_Point]) -> None:
    subnets = [point for point in points if point.is_subnet]
    x, y = [point.macs_millions for point in subnets], [point.accuracy_percent for point in subnets]
    axes.plot(x, y, color=PALETTE[0], linewidth=1, alpha=0.5, marker="")
    for point in points:
        axes.plot(
            point.macs_millions,
            point.accuracy_percent,
            marker="o",
            markersize=2 * _MARKER_RADIUS_POINTS + (0 if point.is_subnet else 2),
            markerfacecolor=_colour(point) if point.is_subnet else "none",
            markeredgecolor=_colour(point),
            markeredgewidth=1.5,
            zorder=3,
        )


def _colour(point: _Point) -> str:
    return PALETTE[0] if point.is_subnet else PALETTE[1]


# Labels beside points

_LEADER_FROM_POINTS = 8  # labels further from their marker than this get a line to it


def _label_points(axes: Axes, points: Sequence[_Point]) -> None:
    scale = 72 / DPI
    data = [(point.macs_millions, point.accuracy_percent) for point in points]
    anchors = axes.transData.transform(data) * scale
    line = Polyline([anchor for anchor, point in zip(anchors, points, strict=True) if point.is_subnet])
    blocks = [_label_block(point) for point in points]
    for block in blocks:
        block.set_figure(axes.figure)  # a text has no size before it knows its figure
    sizes = [np.array(block.get_window_extent().size) * scale for block in blocks]
    places = find_places(anchors, sizes, Bbox(axes.bbox.get_points() * scale), line, _MARKER_RADIUS_POINTS)
    for block, xy, anchor, place in zip(blocks, data, anchors, places, strict=True):
        x, y = place.box.get_points().mean(axis=0) - anchor
        axes.add_artist(
            AnnotationBbox(
                block, xy, (x, y), boxcoords="offset points", frameon=False, pad=0, annotation_clip=False, zorder=4
            )
        )
        if leader_length(place.leader) > _LEADER_FROM_POINTS:
            ends = axes.transData.inverted().transform(place.leader / scale)
            axes.plot(ends[:, 0], ends[:, 1], color=GREY, linewidth=0.6, alpha=0.7, zorder=2)


def _label_block(point: _Point) -> VPacker:
    colour = INK if point.is_subnet else dark(_colour(point))
    lines: list[Artist] = [
        TextArea(point.label, textprops={"fontsize": TEXT_POINTS, "color": colour, "parse_math": False})
    ]
    if point.note:
        style = {"fontsize": SMALL_POINTS, "color": GREY, "parse_math": False}
        lines.append(TextArea(point.note, textprops=style))
    return VPacker(children=lines, align="left", pad=0, sep=1)


# The course of the rounds

_PANEL_INCHES = (2.15, 0.85, 0.95)  # accuracy, loss, traffic


def _rounds_figure(
    rounds: Sequence[Mapping[str, Any]], comparison: Sequence[Mapping[str, Any]], comparison_name: str
) -> Figure:
    if not rounds:
        raise ConfigError("picture of the rounds: expected at least one round in `rounds`, found none; run one first")
    subnets = _subnet_curves(rounds)
    peers = _comparison_curves(comparison, comparison_name)
    num_lines = sum(curve.label.count("\n") + 1 for curve in (*subnets, *peers))
    panels = (max(_PANEL_INCHES[0], num_lines * LABEL_LINE_INCHES), *_PANEL_INCHES[1:])
    height = TOP_INCHES + sum(panels) + GAP_INCHES * (len(panels) - 1) + BOTTOM_INCHES
    figure = new_figure(_rounds_title(rounds, subnets), height)
    accuracy, loss, traffic = stack_panels(figure, panels)
    drawn = {number for curve in peers for number in curve.rounds}.union(_round_numbers(rounds))
    scale_rounds(traffic, min(drawn), max(drawn))
    _draw_accuracy(accuracy, [*subnets, *peers])
    _draw_loss(loss, rounds)
    _draw_traffic(traffic, rounds)
    return figure


def _rounds_title(rounds: Sequence[Mapping[str, Any]], subnets: Sequence[Curve]) -> str:
    clients = {
        expect_text(member, "client", f"round {entry.get('round')}, `cohort`")
        for entry in rounds
        for member in entry.get("cohort") or ()
    }
    title = f"{count_noun(len(clients), 'client')}, {count_noun(len(rounds), 'round')}"
    if not subnets:
        return title
    lowest, highest = (f"{pick(curve.values[-1] for curve in subnets):.1f}" for pick in (min, max))
    return f"{title}: accuracy ends at {lowest if lowest == highest else f'{lowest} to {highest}'} %"


def _subnet_curves(rounds: Sequence[Mapping[str, Any]]) -> list[Curve]:
    courses = accuracy_courses(rounds, "round")
    return [
        Curve(percent_label(name, y), x, y, colour)
        for (name, x, y), colour in zip(courses, itertools.cycle(PALETTE), strict=False)
    ]


def _comparison_curves(comparison: Sequence[Mapping[str, Any]], comparison_name: str) -> list[Curve]:
    courses = accuracy_courses(comparison, "comparison, round")
    title = comparison_name or "comparison"
    return [
        Curve(percent_label(f"{title}: {name}" if len(courses) > 1 else title, y), x, y, GREY, dashed=True)
        for name, x, y in courses
    ]


def _round_numbers(rounds: Sequence[Mapping[str, Any]]) -> tuple[float, ...]:
    return tuple(expect_number(entry, "round", f"entry {index} of the rounds") for index, entry in enumerate(rounds))


def _draw_accuracy(axes: Axes, curves: Sequence[Curve]) -> None:
    style_axes(axes, "Accuracy on the global test set (%)")
    if not curves:
        say_empty(axes, "no round was evaluated")
        return
    scale_percent(axes, [value for curve in curves for value in curve.values], padding=0.06, least_padding=0.5)
    draw_curves(axes, curves)


def _draw_loss(axes: Axes, rounds: Sequence[Mapping[str, Any]]) -> None:
    style_axes(axes, "Mean local training loss")
    losses = tuple(finite(entry.get("loss")) for entry in rounds)
    reported = [loss for loss in losses if not math.isnan(loss)]
    if not reported:
        say_empty(axes, "no loss was reported")
        return
    draw_curves(axes, [Curve(f"{reported[-1]:.3g}", _round_numbers(rounds), losses, INK)])


def _draw_traffic(axes: Axes, rounds: Sequence[Mapping[str, Any]]) -> None:
    style_axes(axes, "Traffic since the start (MB)")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    curves = []
    for key, colour, width_points in (("bytes_down", PALETTE[0], 2.6), ("bytes_up", PALETTE[4], 1.4)):
        megabytes = [expect_number(entry, key, f"round {entry.get('round')}") / 1e6 for entry in rounds]
        total = tuple(np.cumsum(megabytes).tolist())
        label = f"{key.removeprefix('bytes_')} {short(total[-1])} MB"
        curves.append(Curve(label, _round_numbers(rounds), total, colour, width_points=width_points))
    axes.set_ylim(0, 1.08 * max(max(curve.values) for curve in curves) or 1)
    draw_curves(axes, curves)
    _mark_failures(axes, rounds)


def _mark_failures(axes: Axes, rounds: Sequence[Mapping[str, Any]]) -> None:
    failed = [number for number, entry in zip(_round_numbers(rounds), rounds, strict=True) if entry.get("failures")]
    if not failed:
        return
    num_failures = sum(len(entry.get("failures") or ()) for entry in rounds)
    label = f"{count_noun(num_failures, 'failure')} in {count_noun(len(failed), 'round')}"
    axes.plot(
        failed,
        [0.06] * len(failed),
        transform=axes.get_xaxis_transform(),
        color=PALETTE[1],
        linestyle="",
        marker="|",
        markersize=6,
        markeredgewidth=1.2,
        label=label,
    )
    axes.legend(loc="upper left", frameon=False, fontsize=SMALL_POINTS, labelcolor=GREY, borderpad=0, handlelength=1)
