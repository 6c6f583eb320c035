"""Lines over the rounds of a run, in panels one above the other, each named at its end."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from fedofa.report.placement import spread
from fedofa.report.style import GREY, LEFT, SMALL_POINTS, TEXT_POINTS, TICK_STEPS, dark, expect_number, finite, wrap

TOP_INCHES, GAP_INCHES, BOTTOM_INCHES = 0.8, 0.4, 0.5
LABEL_LINE_INCHES = 0.18
_MARGIN = 0.215  # of the figure's width, right of the panels, for the labels of the lines
_MOST_MARKED_ROUNDS = 15  # a longer line is drawn without a dot for each round


@dataclass(frozen=True)
class Curve:
    """A line of a panel; its label stands beside its last point."""

    label: str
    rounds: tuple[float, ...]
    values: tuple[float, ...]
    colour: str
    dashed: bool = False
    width_points: float = 1.6
    opacity: float = 1.0


def accuracy_courses(
    rounds: Sequence[Mapping[str, Any]], source: str
) -> list[tuple[str, tuple[float, ...], tuple[float, ...]]]:
    """Names, round numbers and accuracies in percent; subnets whose accuracies are the same throughout share one."""
    courses: dict[str, list[tuple[float, float]]] = {}
    for entry in rounds:
        for name, score in (entry.get("scores") or {}).items():
            where = f"{source} {entry.get('round')}, scores of {name!r}"
            if not math.isnan(finite(score.get("accuracy"))):
                point = (expect_number(entry, "round", where), 100 * expect_number(score, "accuracy", where, high=1))
                courses.setdefault(name, []).append(point)
    names: dict[tuple[tuple[float, float], ...], list[str]] = {}
    for name, course in courses.items():
        names.setdefault(tuple(course), []).append(name)
    return [
        (", ".join(sharing), tuple(number for number, _ in course), tuple(percent for _, percent in course))
        for course, sharing in names.items()
    ]


def percent_label(name: str, values: Sequence[float]) -> str:
    """A name with the last of its values, in percent."""
    return wrap(f"{name} {values[-1]:.1f}\u00a0%")


def stack_panels(
    figure: Figure, heights_inches: Sequence[float], *, gap_inches: float = GAP_INCHES, shared: bool = True
) -> list[Axes]:
    """Panels from the top down; where they share the x axis, only the lowest shows its numbers."""
    panels: list[Axes] = []
    top_inches = figure.get_figheight() - TOP_INCHES
    for height_inches in heights_inches:
        bottom, height = (top_inches - height_inches) / figure.get_figheight(), height_inches / figure.get_figheight()
        axes = figure.add_axes(
            (LEFT, bottom, 1 - _MARGIN - LEFT, height), sharex=panels[0] if panels and shared else None
        )
        axes.tick_params(labelbottom=not shared or len(panels) == len(heights_inches) - 1)
        panels.append(axes)
        top_inches -= height_inches + gap_inches
    return panels


def scale_rounds(axes: Axes, first: float, last: float) -> None:
    """An x axis of round numbers."""
    padding = max(0.5, 0.01 * (last - first))
    axes.set_xlim(first - padding, last + padding)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=TICK_STEPS, integer=True, min_n_ticks=1))
    axes.set_xlabel("Round", fontsize=TEXT_POINTS, color=GREY)


def draw_curves(axes: Axes, curves: Sequence[Curve], *, labelled: bool = True) -> None:
    """Draw lines, with a dot for each round where they are short or have gaps, and name each at its end."""
    for curve in curves:
        has_dots = len(curve.rounds) <= _MOST_MARKED_ROUNDS or any(map(math.isnan, curve.values))
        axes.plot(
            curve.rounds,
            curve.values,
            color=curve.colour,
            linestyle="--" if curve.dashed else "-",
            linewidth=curve.width_points,
            alpha=curve.opacity,
            marker="o" if has_dots else "",
            markersize=3.5,
        )
    if labelled:
        label_ends(axes, curves)


def label_ends(axes: Axes, curves: Sequence[Curve]) -> None:
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
            fontsize=SMALL_POINTS,
            color=dark(curve.colour),
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
