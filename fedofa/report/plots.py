"""The pictures of a run: accuracy against compute, and the course of the rounds, each written as one PNG file."""

import itertools
import math
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colors
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, TextArea, VPacker
from matplotlib.path import Path as Polyline
from matplotlib.text import Text
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
from matplotlib.transforms import Bbox

from fedofa.report.placement import find_places, leader_length, spread
from fedofa.types.errors import ConfigError

_DPI = 150
_WIDTH_INCHES, _HEIGHT_INCHES = 9.0, 6.0
_LEFT, _RIGHT = 0.065, 0.965  # of the figure's width
_INK, _GREY, _GRID = "#222222", "#666666", "#e6e6e6"
# Okabe and Ito's palette without black and yellow: told apart by colour-blind readers, visible on white.
_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_TITLE_POINTS, _TEXT_POINTS, _SMALL_POINTS = 13, 10, 9
_LABEL_CHARACTERS = 22
_TICK_STEPS = (1, 2, 2.5, 5, 10)
_MARKER_RADIUS_POINTS = 3.5


def plot_accuracy_vs_macs(summary: Mapping[str, Any], path: Path) -> None:
    """Draw every distinct subnet of a run, and the run it is compared with, by compute and accuracy.

    `summary` is a run's summary: `rounds`, `num_clients`, `seed`, `subnets` (each with `name`, `digest`, `macs`,
    `accuracy` in [0, 1] and `binding`) and `comparison` (`name`, `macs`, `accuracy`, or None). Subnets of one digest
    share a point. `path` is replaced as a whole, or not at all. Raises `ConfigError` when the summary has no subnet or
    lacks a number to draw.
    """
    _save_png(_accuracy_figure(summary), path)


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
    _save_png(_rounds_figure(rounds, comparison, comparison_name), path)


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
        int(_number(summary, key, "run summary")) for key in ("num_clients", "rounds", "seed")
    )
    figure = _new_figure(_accuracy_title(subnets), _HEIGHT_INCHES)
    subtitle = f"{_count(num_clients, 'client')}, {_count(num_rounds, 'round')}, seed {seed}"
    figure.text(_LEFT, 1 - 0.56 / _HEIGHT_INCHES, subtitle, fontsize=_SMALL_POINTS, color=_GREY)
    axes = figure.add_axes((_LEFT, 0.105, _RIGHT - _LEFT, 0.735))
    _style(axes, "Accuracy on the global test set (%)")
    _scale_macs(axes, [point.macs_millions for point in points])
    _scale_percent(axes, [point.accuracy_percent for point in points], padding=0.22, least_padding=1.5)
    _draw_points(axes, points)
    _label_points(axes, points)
    return figure


def _subnet_points(summary: Mapping[str, Any]) -> list[_Point]:
    """The distinct subnets in order of MACs."""
    entries_by_digest: dict[str, list[Mapping[str, Any]]] = {}
    for entry in summary.get("subnets") or ():
        entries_by_digest.setdefault(_text(entry, "digest", "run summary, `subnets`"), []).append(entry)
    if not entries_by_digest:
        raise ConfigError("run summary: expected at least one entry in `subnets`, found none; evaluate a subnet first")
    points = []
    for entries in entries_by_digest.values():
        label = ", ".join(dict.fromkeys(_text(entry, "name", "run summary, `subnets`") for entry in entries))
        points.append(_point(entries[0], label, _binding_note(entries), is_subnet=True))
    return sorted(points, key=lambda point: (point.macs_millions, point.accuracy_percent))


def _comparison_points(summary: Mapping[str, Any]) -> list[_Point]:
    comparison = summary.get("comparison")
    if comparison is None:
        return []
    return [_point(comparison, _text(comparison, "name", "run summary, `comparison`"), "", is_subnet=False)]


def _point(entry: Mapping[str, Any], label: str, note: str, *, is_subnet: bool) -> _Point:
    where = f"run summary, {label!r}"
    macs_millions = _number(entry, "macs", where, low=1) / 1e6
    accuracy_percent = 100 * _number(entry, "accuracy", where, high=1)
    return _Point(_wrap(label), _wrap(note), macs_millions, accuracy_percent, is_subnet)


def _binding_note(entries: Iterable[Mapping[str, Any]]) -> str:
    """What limits the subnets of these entries; nothing for subnets that no device was searched for."""
    bindings = list(dict.fromkeys(entry["binding"] for entry in entries if entry.get("binding") is not None))
    limits = [binding for binding in bindings if binding != "none"]
    if limits:
        return f"bound by {', '.join(limits)}"
    return "no budget binds" if bindings else ""


def _accuracy_title(subnets: Sequence[_Point]) -> str:
    smallest, largest = subnets[0], subnets[-1]
    title = f"One supernet, {_count(len(subnets), 'subnet')}: "
    title += f"{largest.accuracy_percent:.1f} % at {_short(largest.macs_millions)} M MACs"
    if len(subnets) > 1:
        title += f", {smallest.accuracy_percent:.1f} % at {_short(smallest.macs_millions)} M"
    return title


def _scale_macs(axes: Axes, macs_millions: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xlim(min(macs_millions) / 1.6, max(macs_millions) * 1.6)
    spans_little = max(macs_millions) < 3 * min(macs_millions)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7) if spans_little else (1, 2, 5)))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("Multiply-accumulates per example (millions, log scale)", fontsize=_TEXT_POINTS, color=_GREY)


def _draw_points(axes: Axes, points: Sequence[_Point]) -> None:
    subnets = [point for point in points if point.is_subnet]
    x, y = [point.macs_millions for point in subnets], [point.accuracy_percent for point in subnets]
    axes.plot(x, y, color=_PALETTE[0], linewidth=1, alpha=0.5, marker="")
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
    return _PALETTE[0] if point.is_subnet else _PALETTE[1]


# Labels beside points

_LEADER_FROM_POINTS = 8  # labels further from their marker than this get a line to it


def _label_points(axes: Axes, points: Sequence[_Point]) -> None:
    scale = 72 / _DPI
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
            axes.plot(ends[:, 0], ends[:, 1], color=_GREY, linewidth=0.6, alpha=0.7, zorder=2)


def _label_block(point: _Point) -> VPacker:
    colour = _INK if point.is_subnet else _dark(_colour(point))
    lines: list[Artist] = [
        TextArea(point.label, textprops={"fontsize": _TEXT_POINTS, "color": colour, "parse_math": False})
    ]
    if point.note:
        style = {"fontsize": _SMALL_POINTS, "color": _GREY, "parse_math": False}
        lines.append(TextArea(point.note, textprops=style))
    return VPacker(children=lines, align="left", pad=0, sep=1)


# The course of the rounds

_PANEL_INCHES = (2.15, 0.85, 0.95)  # accuracy, loss, traffic
_TOP_INCHES, _GAP_INCHES, _BOTTOM_INCHES = 0.8, 0.4, 0.5
_LABEL_LINE_INCHES = 0.18
_MARGIN = 0.215  # of the figure's width, right of the panels, for the labels of the lines
_MOST_MARKED_ROUNDS = 15  # a longer line is drawn without a dot for each round


@dataclass(frozen=True)
class _Curve:
    label: str
    rounds: tuple[float, ...]
    values: tuple[float, ...]
    colour: str
    dashed: bool = False
    width_points: float = 1.6


def _rounds_figure(
    rounds: Sequence[Mapping[str, Any]], comparison: Sequence[Mapping[str, Any]], comparison_name: str
) -> Figure:
    if not rounds:
        raise ConfigError("picture of the rounds: expected at least one round in `rounds`, found none; run one first")
    subnets = _subnet_curves(rounds)
    peers = _comparison_curves(comparison, comparison_name)
    num_lines = sum(curve.label.count("\n") + 1 for curve in (*subnets, *peers))
    panels = (max(_PANEL_INCHES[0], num_lines * _LABEL_LINE_INCHES), *_PANEL_INCHES[1:])
    height = _TOP_INCHES + sum(panels) + _GAP_INCHES * (len(panels) - 1) + _BOTTOM_INCHES
    figure = _new_figure(_rounds_title(rounds, subnets), height)
    accuracy, loss, traffic = _stack_panels(figure, panels)
    drawn = {number for curve in peers for number in curve.rounds}.union(_round_numbers(rounds))
    _scale_rounds(traffic, min(drawn), max(drawn))
    _draw_accuracy(accuracy, [*subnets, *peers])
    _draw_loss(loss, rounds)
    _draw_traffic(traffic, rounds)
    return figure


def _rounds_title(rounds: Sequence[Mapping[str, Any]], subnets: Sequence[_Curve]) -> str:
    clients = {
        _text(member, "client", f"round {entry.get('round')}, `cohort`")
        for entry in rounds
        for member in entry.get("cohort") or ()
    }
    title = f"{_count(len(clients), 'client')}, {_count(len(rounds), 'round')}"
    if not subnets:
        return title
    lowest, highest = (f"{pick(curve.values[-1] for curve in subnets):.1f}" for pick in (min, max))
    return f"{title}: accuracy ends at {lowest if lowest == highest else f'{lowest} to {highest}'} %"


def _subnet_curves(rounds: Sequence[Mapping[str, Any]]) -> list[_Curve]:
    courses = _accuracy_courses(rounds, "round")
    return [
        _Curve(_percent_label(name, y), x, y, colour)
        for (name, x, y), colour in zip(courses, itertools.cycle(_PALETTE), strict=False)
    ]


def _comparison_curves(comparison: Sequence[Mapping[str, Any]], comparison_name: str) -> list[_Curve]:
    courses = _accuracy_courses(comparison, "comparison, round")
    title = comparison_name or "comparison"
    return [
        _Curve(_percent_label(f"{title}: {name}" if len(courses) > 1 else title, y), x, y, _GREY, dashed=True)
        for name, x, y in courses
    ]


def _accuracy_courses(
    rounds: Sequence[Mapping[str, Any]], source: str
) -> list[tuple[str, tuple[float, ...], tuple[float, ...]]]:
    """Names, round numbers and accuracies in percent; subnets whose accuracies are the same throughout share one."""
    courses: dict[str, list[tuple[float, float]]] = {}
    for entry in rounds:
        for name, score in (entry.get("scores") or {}).items():
            where = f"{source} {entry.get('round')}, scores of {name!r}"
            if not math.isnan(_finite(score.get("accuracy"))):
                point = (_number(entry, "round", where), 100 * _number(score, "accuracy", where, high=1))
                courses.setdefault(name, []).append(point)
    names: dict[tuple[tuple[float, float], ...], list[str]] = {}
    for name, course in courses.items():
        names.setdefault(tuple(course), []).append(name)
    return [
        (", ".join(sharing), tuple(number for number, _ in course), tuple(percent for _, percent in course))
        for course, sharing in names.items()
    ]


def _percent_label(name: str, values: Sequence[float]) -> str:
    return _wrap(f"{name} {values[-1]:.1f}\u00a0%")


def _round_numbers(rounds: Sequence[Mapping[str, Any]]) -> tuple[float, ...]:
    return tuple(_number(entry, "round", f"entry {index} of the rounds") for index, entry in enumerate(rounds))


def _stack_panels(figure: Figure, heights_inches: Sequence[float]) -> list[Axes]:
    """Panels from the top down that share the x axis; only the lowest shows its numbers."""
    panels: list[Axes] = []
    top_inches = figure.get_figheight() - _TOP_INCHES
    for height_inches in heights_inches:
        bottom, height = (top_inches - height_inches) / figure.get_figheight(), height_inches / figure.get_figheight()
        shared = panels[0] if panels else None
        axes = figure.add_axes((_LEFT, bottom, 1 - _MARGIN - _LEFT, height), sharex=shared)
        axes.tick_params(labelbottom=len(panels) == len(heights_inches) - 1)
        panels.append(axes)
        top_inches -= height_inches + _GAP_INCHES
    return panels


def _scale_rounds(axes: Axes, first: float, last: float) -> None:
    padding = max(0.5, 0.01 * (last - first))
    axes.set_xlim(first - padding, last + padding)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=_TICK_STEPS, integer=True, min_n_ticks=1))
    axes.set_xlabel("Round", fontsize=_TEXT_POINTS, color=_GREY)


def _draw_accuracy(axes: Axes, curves: Sequence[_Curve]) -> None:
    _style(axes, "Accuracy on the global test set (%)")
    if not curves:
        _say_empty(axes, "no round was evaluated")
        return
    _scale_percent(axes, [value for curve in curves for value in curve.values], padding=0.06, least_padding=0.5)
    _draw_curves(axes, curves)


def _draw_loss(axes: Axes, rounds: Sequence[Mapping[str, Any]]) -> None:
    _style(axes, "Mean local training loss")
    losses = tuple(_finite(entry.get("loss")) for entry in rounds)
    reported = [loss for loss in losses if not math.isnan(loss)]
    if not reported:
        _say_empty(axes, "no loss was reported")
        return
    _draw_curves(axes, [_Curve(f"{reported[-1]:.3g}", _round_numbers(rounds), losses, _INK)])


def _draw_traffic(axes: Axes, rounds: Sequence[Mapping[str, Any]]) -> None:
    _style(axes, "Traffic since the start (MB)")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    curves = []
    for key, colour, width_points in (("bytes_down", _PALETTE[0], 2.6), ("bytes_up", _PALETTE[4], 1.4)):
        megabytes = [_number(entry, key, f"round {entry.get('round')}") / 1e6 for entry in rounds]
        total = tuple(np.cumsum(megabytes).tolist())
        label = f"{key.removeprefix('bytes_')} {_short(total[-1])} MB"
        curves.append(_Curve(label, _round_numbers(rounds), total, colour, width_points=width_points))
    axes.set_ylim(0, 1.08 * max(max(curve.values) for curve in curves) or 1)
    _draw_curves(axes, curves)
    _mark_failures(axes, rounds)


def _mark_failures(axes: Axes, rounds: Sequence[Mapping[str, Any]]) -> None:
    failed = [number for number, entry in zip(_round_numbers(rounds), rounds, strict=True) if entry.get("failures")]
    if not failed:
        return
    num_failures = sum(len(entry.get("failures") or ()) for entry in rounds)
    label = f"{_count(num_failures, 'failure')} in {_count(len(failed), 'round')}"
    axes.plot(
        failed,
        [0.06] * len(failed),
        transform=axes.get_xaxis_transform(),
        color=_PALETTE[1],
        linestyle="",
        marker="|",
        markersize=6,
        markeredgewidth=1.2,
        label=label,
    )
    axes.legend(loc="upper left", frameon=False, fontsize=_SMALL_POINTS, labelcolor=_GREY, borderpad=0, handlelength=1)


def _draw_curves(axes: Axes, curves: Sequence[_Curve]) -> None:
    for curve in curves:
        has_dots = len(curve.rounds) <= _MOST_MARKED_ROUNDS or any(map(math.isnan, curve.values))
        axes.plot(
            curve.rounds,
            curve.values,
            color=curve.colour,
            linestyle="--" if curve.dashed else "-",
            linewidth=curve.width_points,
            marker="o" if has_dots else "",
            markersize=3.5,
        )
    _label_ends(axes, curves)


# Labels at the ends of lines


def _label_ends(axes: Axes, curves: Sequence[_Curve]) -> None:
    """Name each curve right of the panel, as near to its last point as the other names leave room."""
    ends = [
        [point for point in zip(curve.rounds, curve.values, strict=True) if not math.isnan(point[1])][-1]
        for curve in curves
    ]
    labels = [
        axes.annotate(
            curve.label,
            end,
            (1.025, end[1]),
            textcoords=("axes fraction", "data"),
            annotation_clip=False,
            parse_math=False,
            va="center",
            fontsize=_SMALL_POINTS,
            color=_dark(curve.colour),
            arrowprops={"arrowstyle": "-", "color": curve.colour, "linewidth": 0.8, "relpos": (0, 0.5), "shrinkA": 1},
        )
        for curve, end in zip(curves, ends, strict=True)
    ]
    axes.autoscale_view()  # otherwise matplotlib fits the limits when it draws, after the labels have their places
    heights = [Text.get_window_extent(label).height + 4 for label in labels]
    centres = [axes.transData.transform(end)[1] for end in ends]
    pixels = spread(centres, heights, axes.bbox.y0, axes.bbox.y1)
    for label, y in zip(labels, pixels, strict=True):
        label.set_position((1.025, axes.transData.inverted().transform((0, y))[1]))


# What both pictures share


def _new_figure(title: str, height_inches: float) -> Figure:
    figure = Figure(figsize=(_WIDTH_INCHES, height_inches), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)  # becomes the figure's canvas, so that texts can be measured
    figure.text(_LEFT, 1 - 0.34 / height_inches, title, fontsize=_TITLE_POINTS, color=_INK, fontweight="bold")
    return figure


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=_TEXT_POINTS, color=_GREY, pad=7)
    axes.set_facecolor("white")
    axes.grid(True, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")
    axes.tick_params(labelsize=_SMALL_POINTS, labelcolor=_GREY, length=0)
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=_TICK_STEPS))


def _scale_percent(axes: Axes, values: Sequence[float], *, padding: float, least_padding: float) -> None:
    """Fit the y axis to `values`, with room around them; there are no ticks where no accuracy can be."""
    low, high = min(values), max(values)
    room = max(padding * (high - low), least_padding)
    axes.set_ylim(low - room, high + room)
    ticks = MaxNLocator(6, steps=_TICK_STEPS).tick_values(low - room, high + room)
    axes.set_yticks([tick for tick in ticks if max(0, low - room) <= tick <= min(100, high + room)])


def _say_empty(axes: Axes, text: str) -> None:
    axes.set_yticks([])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=_TEXT_POINTS, color=_GREY)


def _number(entry: Mapping[str, Any], key: str, where: str, *, low: float = 0, high: float = math.inf) -> float:
    value = entry.get(key)
    number = _finite(value)
    if not low <= number <= high:
        bounds = f"of at least {low}" if math.isinf(high) else f"from {low} to {high}"
        raise ConfigError(
            f"{where}: expected `{key}` to be a number {bounds}, found {value!r}; record it and draw again"
        )
    return number


def _text(entry: Mapping[str, Any], key: str, where: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str):
        raise ConfigError(f"{where}: expected `{key}` to be a text, found {value!r}; record it and draw again")
    return value


def _finite(value: object) -> float:
    """`value` as a float; NaN for None, for what is no number and for infinities."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return math.nan
    return float(value)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _short(number: float) -> str:
    """Two significant digits, and no fraction from ten on."""
    return f"{number:.2g}" if number < 9.95 else f"{number:,.0f}"


def _wrap(text: str) -> str:
    return textwrap.fill(text, _LABEL_CHARACTERS)


def _dark(colour: str) -> tuple[float, float, float]:
    """A darker shade of `colour`, for small text on white."""
    red, green, blue = (0.65 * channel for channel in colors.to_rgb(colour))
    return red, green, blue


def _save_png(figure: Figure, path: Path) -> None:
    """Write the figure beside `path`, then take its place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            FigureCanvasAgg(figure).print_png(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
