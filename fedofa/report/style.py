"""What the pictures share: colours, sizes, axes, checked numbers, and the way a picture gets onto disk."""

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullLocator

from fedofa.types.errors import ConfigError

DPI = 150
_WIDTH_INCHES = 9.0
LEFT, RIGHT = 0.065, 0.965  # of the figure's width
INK, GREY, _GRID = "#222222", "#666666", "#e6e6e6"
# Okabe and Ito's palette without black and yellow: told apart by colour-blind readers, visible on white.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_TITLE_POINTS, TEXT_POINTS, SMALL_POINTS = 13, 10, 9
_LABEL_CHARACTERS = 22
TICK_STEPS = (1, 2, 2.5, 5, 10)


def new_figure(title: str, height_inches: float) -> Figure:
    """An empty picture under a title."""
    figure = Figure(figsize=(_WIDTH_INCHES, height_inches), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)  # becomes the figure's canvas, so that texts can be measured
    figure.text(LEFT, 1 - 0.34 / height_inches, title, fontsize=_TITLE_POINTS, color=INK, fontweight="bold")
    return figure


def style_axes(axes: Axes, title: str) -> None:
    """A panel in the style of all pictures."""
    axes.set_title(title, loc="left", fontsize=TEXT_POINTS, color=GREY, pad=7)
    axes.set_facecolor("white")
    axes.grid(True, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")
    axes.tick_params(labelsize=SMALL_POINTS, labelcolor=GREY, length=0)
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=TICK_STEPS))


def scale_percent(axes: Axes, values: Sequence[float], *, padding: float, least_padding: float) -> None:
    """Fit the y axis to `values`, with room around them; there are no ticks where no accuracy can be."""
    low, high = min(values), max(values)
    room = max(padding * (high - low), least_padding)
    axes.set_ylim(low - room, high + room)
    ticks = MaxNLocator(6, steps=TICK_STEPS).tick_values(low - room, high + room)
    axes.set_yticks([tick for tick in ticks if max(0, low - room) <= tick <= min(100, high + room)])


def say_empty(axes: Axes, text: str) -> None:
    """A panel that has nothing to show says why."""
    axes.set_yticks([])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=TEXT_POINTS, color=GREY)


def expect_number(entry: Mapping[str, Any], key: str, where: str, *, low: float = 0, high: float = math.inf) -> float:
    """A number of a run's files; raises `ConfigError` where it is none or out of bounds."""
    value = entry.get(key)
    number = finite(value)
    if not low <= number <= high:
        bounds = f"of at least {low}" if math.isinf(high) else f"from {low} to {high}"
        raise ConfigError(
            f"{where}: expected `{key}` to be a number {bounds}, found {value!r}; record it and draw again"
        )
    return number


def expect_text(entry: Mapping[str, Any], key: str, where: str) -> str:
    """A text of a run's files; raises `ConfigError` where it is none."""
    value = entry.get(key)
    if not isinstance(value, str):
        raise ConfigError(f"{where}: expected `{key}` to be a text, found {value!r}; record it and draw again")
    return value


def finite(value: object) -> float:
    """`value` as a float; NaN for None, for what is no number and for infinities."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return math.nan
    return float(value)


def count_noun(number: int, noun: str) -> str:
    """A number with its noun: 1 run, 2 runs."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def short(number: float) -> str:
    """Two significant digits, and no fraction from ten on."""
    return f"{number:.2g}" if number < 9.95 else f"{number:,.0f}"


def wrap(text: str) -> str:
    """Fold a label into lines."""
    return textwrap.fill(text, _LABEL_CHARACTERS)


def dark(colour: str) -> tuple[float, float, float]:
    """A darker shade of `colour`, for small text on white."""
    red, green, blue = (0.65 * channel for channel in colors.to_rgb(colour))
    return red, green, blue


def save_png(figure: Figure, path: Path) -> None:
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


def scale_macs(axes: Axes, macs_millions: Sequence[float]) -> None:
    """A logarithmic x axis of compute around these values."""
    axes.set_xscale("log")
    axes.set_xlim(min(macs_millions) / 1.6, max(macs_millions) * 1.6)
    spans_little = max(macs_millions) < 3 * min(macs_millions)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7) if spans_little else (1, 2, 5)))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("Multiply-accumulates per example (millions, log scale)", fontsize=TEXT_POINTS, color=GREY)
