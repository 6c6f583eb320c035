"""The pictures of a run: whole files, labels that neither overlap nor leave the picture, and runs with gaps."""

import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox
from PIL import Image

from fedofa.report.placement import spread
from fedofa.report.plots import _accuracy_figure, _rounds_figure, plot_accuracy_vs_macs, plot_rounds
from fedofa.types.errors import ConfigError

PEER = "FedAvg on the subnet of the weakest device"
FLEET = {"largest": 0.956, "workstation": 0.956, "phone": 0.951, "single_board": 0.944, "smallest": 0.912}


def subnet(name: str, macs_millions: float, accuracy: float, binding: str | None = None, digest: str = "") -> dict:
    return {
        "name": name,
        "digest": digest or name,
        "macs": round(1e6 * macs_millions),
        "params": 1,
        "accuracy": accuracy,
        "binding": binding,
    }


def summary(*subnets: dict, comparison: dict | None = None) -> dict[str, Any]:
    return {"rounds": 120, "num_clients": 100, "seed": 7, "subnets": list(subnets), "comparison": comparison}


TYPICAL = summary(
    subnet("largest", 6.47, 0.956, digest="a"),
    subnet("workstation", 6.47, 0.956, "none", digest="a"),
    subnet("phone", 3.1, 0.951, "round time (uplink)"),
    subnet("sensor_board", 0.9, 0.93, "memory"),
    subnet("smallest", 0.6, 0.912),
    comparison={"name": PEER, "macs": 600_000, "params": 1, "accuracy": 0.887},
)
WITHIN_ONE_PERCENT = summary(
    subnet("largest", 6.5, 0.956),
    subnet("workstation", 6.4, 0.9555, "none"),
    subnet("phone", 3.1, 0.955, "round time (uplink)"),
    subnet("old_phone", 3.09, 0.955, "memory"),
    subnet("sensor_board", 0.9, 0.951, "memory"),
    subnet("smallest", 0.6, 0.949),
    comparison={"name": PEER, "macs": 600_000, "params": 1, "accuracy": 0.949},
)
CLUSTER = summary(
    *(subnet(f"device_class_number_{i}", 1 + 0.01 * i, 0.9 + 0.0005 * i, "round time (uplink)") for i in range(7))
)
SAME_SPOT = summary(*(subnet(f"device_class_{i}", 1, 0.9, "memory") for i in range(5)))
ONE_POINT = summary(subnet("largest", 6.5, 1.0))
EXTREMES = summary(subnet("largest", 566, 1.0), subnet("smallest", 0.000001, 0.0))
SUMMARIES = {
    "typical": TYPICAL,
    "within one percent": WITHIN_ONE_PERCENT,
    "cluster": CLUSTER,
    "same spot": SAME_SPOT,
    "one point": ONE_POINT,
    "extremes": EXTREMES,
}


def make_rounds(num_rounds: int, fleet: dict[str, float], *, every: int = 5, failures_every: int = 0) -> list[dict]:
    return [
        {
            "round": number,
            "loss": 2.0 / number,
            "failures": [{"client": "a", "reason": "late"}] * 2
            if failures_every and number % failures_every == 0
            else [],
            "cohort": [{"client": f"client-{(4 * number + i) % 10:04d}", "device_class": "phone"} for i in range(4)],
            "bytes_down": 2_000_000,
            "bytes_up": 500_000,
            "scores": scores_after(number, fleet) if number % every == 0 or number == num_rounds else None,
        }
        for number in range(1, num_rounds + 1)
    ]


def scores_after(number: int, fleet: dict[str, float]) -> dict[str, dict[str, float]]:
    return {name: {"accuracy": best * (1 - math.exp(-number / 5)), "loss": 1.0} for name, best in fleet.items()}


def assert_apart(boxes: Sequence[Bbox]) -> None:
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other), (one, other)


def assert_within(boxes: Sequence[Bbox], frame: Bbox) -> None:
    for box in boxes:
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1, (box, frame)


def drawn_box(figure: Figure) -> Bbox:
    """The box around everything that is drawn, in pixels."""
    return Bbox(figure.get_tightbbox(figure.canvas.get_renderer()).get_points() * figure.dpi)


def all_texts(figure: Figure) -> list[Text]:
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]


def point_labels(figure: Figure) -> tuple[list[Bbox], list[Bbox]]:
    """The boxes of the labels and of the markers, as they are drawn."""
    figure.canvas.draw()
    axes = figure.axes[0]
    labels = [artist.offsetbox.get_window_extent() for artist in axes.artists if isinstance(artist, AnnotationBbox)]
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    centres = [axes.transData.transform(line.get_xydata())[0] for line in dots]
    radii = [line.get_markersize() / 2 * figure.dpi / 72 for line in dots]
    return labels, [Bbox([c, c]).padded(radius) for c, radius in zip(centres, radii, strict=True)]


def end_labels(figure: Figure) -> list[list[Annotation]]:
    """The labels at the line ends of each panel, top panel first."""
    figure.canvas.draw()
    return [[child for child in axes.get_children() if isinstance(child, Annotation)] for axes in figure.axes]


def texts_of(labels: Sequence[Text]) -> list[str]:
    return [label.get_text().replace("\n", " ").replace("\u00a0", " ") for label in labels]


# Accuracy against compute


@pytest.mark.parametrize("name", SUMMARIES)
def test_point_labels_keep_clear_of_each_other_of_markers_and_of_the_frame(name: str) -> None:
    figure = _accuracy_figure(SUMMARIES[name])
    labels, markers = point_labels(figure)
    assert len(labels) == len(markers) > 0
    assert_apart(labels)
    assert not any(label.overlaps(marker) for label in labels for marker in markers)
    assert_within(labels, figure.axes[0].bbox)
    assert_within([drawn_box(figure)], figure.bbox)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.floats(0.5, 600), st.floats(0, 1)), min_size=1, max_size=6))
def test_point_labels_keep_clear_wherever_the_points_lie(points: list[tuple[float, float]]) -> None:
    subnets = (subnet(f"device_class_{i}", macs, accuracy, "memory") for i, (macs, accuracy) in enumerate(points))
    figure = _accuracy_figure(summary(*subnets))
    labels, markers = point_labels(figure)
    assert_apart(labels)
    assert not any(label.overlaps(marker) for label in labels for marker in markers)
    assert_within(labels, figure.axes[0].bbox)


def test_subnets_of_one_digest_share_a_point_and_say_what_binds_them() -> None:
    figure = _accuracy_figure(TYPICAL)
    texts = texts_of(all_texts(figure))
    assert len(point_labels(figure)[1]) == 5
    assert {"largest, workstation", "no budget binds", "bound by round time (uplink)", "bound by memory", PEER} <= {
        *texts
    }
    assert "One supernet, 4 subnets: 95.6 % at 6.5 M MACs, 91.2 % at 0.6 M" in texts
    assert "100 clients, 120 rounds, seed 7" in texts


def test_line_joins_the_subnets_in_order_of_macs_and_leaves_the_comparison_out() -> None:
    axes = _accuracy_figure(TYPICAL).axes[0]
    line = axes.lines[0].get_xydata()
    np.testing.assert_allclose(line, [(0.6, 91.2), (0.9, 93.0), (3.1, 95.1), (6.47, 95.6)])
    assert axes.get_xscale() == "log"


def test_no_tick_claims_an_accuracy_that_cannot_be() -> None:
    for inputs in (ONE_POINT, EXTREMES):
        ticks = _accuracy_figure(inputs).axes[0].get_yticks()
        assert len(ticks) >= 2 and ticks.min() >= 0 and ticks.max() <= 100


def test_a_name_is_not_read_as_a_formula() -> None:
    figure = _accuracy_figure(summary(subnet("$board_1$", 1, 0.5)))
    assert "$board_1$" in texts_of(all_texts(figure))
    assert not any(text.get_parse_math() for text in all_texts(figure) if text.get_text() == "$board_1$")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"subnets": []}, "at least one entry in `subnets`"),
        ({"subnets": [subnet("phone", 1, math.nan)]}, r"'phone'.*`accuracy`.*from 0 to 1, found nan"),
        ({"subnets": [subnet("phone", 1, 95.6)]}, r"'phone'.*`accuracy`.*from 0 to 1, found 95.6"),
        ({"subnets": [subnet("phone", 0, 0.5)]}, r"'phone'.*`macs`.*at least 1, found 0"),
        ({"subnets": [{"name": "phone", "macs": 5, "accuracy": 0.5}]}, r"`subnets`.*`digest`.*found None"),
        ({"seed": None}, r"`seed`.*found None"),
    ],
)
def test_a_summary_that_cannot_be_drawn_is_refused(damage: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        plot_accuracy_vs_macs(TYPICAL | damage, tmp_path / "picture.png")
    assert list(tmp_path.iterdir()) == []


# The course of the rounds


@pytest.mark.parametrize(
    ("num_rounds", "fleet"),
    [
        (120, FLEET),
        (1, FLEET),
        (60, {f"device_class_{i}": 0.95 - 0.0001 * i for i in range(25)}),
        (60, {"a_device_class_with_quite_a_long_name": 0.0, "another_one_of_those_long_names": 1.0}),
    ],
)
def test_end_labels_keep_apart_and_stay_inside(num_rounds: int, fleet: dict[str, float]) -> None:
    comparison = make_rounds(num_rounds, {"largest": 0.887, "smallest": 0.887})
    figure = _rounds_figure(make_rounds(num_rounds, fleet, failures_every=1), comparison, PEER)
    labels = [Text.get_window_extent(label) for panel in end_labels(figure) for label in panel]
    assert len(labels) == len(set(fleet.values())) + 1 + 1 + 2
    assert_apart(labels)
    assert_within([drawn_box(figure)], figure.bbox)


def test_end_labels_lie_at_the_line_ends_when_there_is_room() -> None:
    figure = _rounds_figure(make_rounds(3, {"largest": 0.9, "smallest": 0.3}, every=1), (), "")
    for panel, axes in zip(end_labels(figure), figure.axes, strict=True):
        for label in panel:
            box, end = Text.get_window_extent(label), axes.transData.transform(label.xy)
            assert abs((box.y0 + box.y1) / 2 - end[1]) < box.height


def test_curves_show_the_evaluated_rounds_and_name_the_comparison() -> None:
    comparison = make_rounds(20, {"largest": 0.887, "smallest": 0.887})
    figure = _rounds_figure(make_rounds(20, FLEET), comparison, PEER)
    curves = figure.axes[0].lines
    assert [list(curve.get_xdata()) for curve in curves] == [[5, 10, 15, 20]] * 5
    assert [curve.get_linestyle() for curve in curves] == ["-"] * 4 + ["--"]
    assert texts_of(end_labels(figure)[0])[0] == "largest, workstation 93.8 %"
    assert texts_of(end_labels(figure)[0])[-1] == f"{PEER} 87.1 %"
    assert "10 clients, 20 rounds: accuracy ends at 89.5 to 93.8 %" in texts_of(all_texts(figure))


def test_traffic_is_cumulative_and_failures_are_counted() -> None:
    figure = _rounds_figure(make_rounds(6, FLEET, failures_every=3), (), "")
    down, up, ticks = figure.axes[2].lines
    np.testing.assert_allclose(down.get_ydata(), [2, 4, 6, 8, 10, 12])
    np.testing.assert_allclose(up.get_ydata(), [0.5, 1, 1.5, 2, 2.5, 3])
    assert list(ticks.get_xdata()) == [3, 6]
    legend = figure.axes[2].get_legend()
    assert legend is not None and texts_of(legend.get_texts()) == ["4 failures in 2 rounds"]


def test_no_failures_no_legend_and_no_traffic_no_trouble() -> None:
    rounds = [entry | {"bytes_down": 0, "bytes_up": 0} for entry in make_rounds(6, FLEET)]
    figure = _rounds_figure(rounds, (), "")
    assert all(axes.get_legend() is None for axes in figure.axes)
    assert texts_of(end_labels(figure)[2]) == ["down 0 MB", "up 0 MB"]


def test_one_round_is_drawn_with_dots() -> None:
    figure = _rounds_figure(make_rounds(1, FLEET), (), "")
    assert all(line.get_marker() == "o" for axes in figure.axes for line in axes.lines)
    assert "4 clients, 1 round: accuracy ends at 16.5 to 17.3 %" in texts_of(all_texts(figure))


def test_missing_losses_leave_gaps_between_which_lone_rounds_show() -> None:
    rounds = make_rounds(20, FLEET)
    losses = [2.0, None, 1.5, math.nan, *[1.0] * 15, math.inf]
    figure = _rounds_figure([entry | {"loss": loss} for entry, loss in zip(rounds, losses, strict=True)], (), "")
    line = figure.axes[1].lines[0]
    np.testing.assert_allclose(line.get_ydata(), [2.0, math.nan, 1.5, math.nan, *[1.0] * 15, math.nan])
    assert line.get_marker() == "o"
    assert texts_of(end_labels(figure)[1]) == ["1"]


def test_a_run_without_scores_or_losses_says_so() -> None:
    rounds = [entry | {"loss": None, "scores": None} for entry in make_rounds(5, FLEET)]
    del rounds[0]["scores"]
    figure = _rounds_figure(rounds, (), "")
    texts = texts_of(all_texts(figure))
    assert {"no round was evaluated", "no loss was reported", "10 clients, 5 rounds"} <= {*texts}


@pytest.mark.parametrize(
    ("rounds", "message"),
    [
        ([], "at least one round in `rounds`"),
        ([make_rounds(1, FLEET)[0] | {"bytes_up": None}], r"round 1: .*`bytes_up`.*found None"),
        ([make_rounds(1, FLEET)[0] | {"round": "one"}], r"`round`.*found 'one'"),
        ([make_rounds(1, {"phone": 95.6})[0]], r"round 1, scores of 'phone'.*`accuracy`.*from 0 to 1"),
        ([make_rounds(1, FLEET)[0] | {"cohort": [{"device_class": "phone"}]}], r"round 1.*`cohort`.*`client`"),
    ],
)
def test_rounds_that_cannot_be_drawn_are_refused(rounds: list[dict], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        plot_rounds(rounds, tmp_path / "picture.png")
    assert list(tmp_path.iterdir()) == []


@given(st.lists(st.tuples(st.floats(-50, 150), st.floats(0.5, 10)), min_size=1, max_size=10))
def test_spread_keeps_intervals_apart_inside_and_in_order(intervals: list[tuple[float, float]]) -> None:
    centres, heights = (np.array(column) for column in zip(*intervals, strict=True))
    apart = spread(centres, heights, 0, 100)
    order = np.argsort(apart, kind="stable")
    lows, highs = (apart - heights / 2)[order], (apart + heights / 2)[order]
    assert (lows[1:] >= highs[:-1] - 1e-9).all() and lows[0] >= -1e-9 and highs[-1] <= 100 + 1e-9
    assert (np.diff(centres[order]) >= 0).all()


def test_spread_moves_as_little_as_can_be() -> None:
    np.testing.assert_allclose(spread([10, 50, 50], [4, 4, 4], 0, 100), [10, 48, 52])
    np.testing.assert_allclose(spread([99, 0], [4, 4], 0, 100), [98, 2])


# Files


def draw_accuracy(path: Path) -> None:
    plot_accuracy_vs_macs(TYPICAL, path)


def draw_rounds(path: Path) -> None:
    plot_rounds(make_rounds(20, FLEET, failures_every=7), path)


@pytest.mark.parametrize("draw", [draw_accuracy, draw_rounds])
def test_writes_a_whole_png_and_nothing_else(draw: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_text("an older picture")
    draw(path)
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        assert image.width == 1350 and 880 <= image.height <= 920
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 21)) > 20
    assert 10_000 < path.stat().st_size < 500_000
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("draw", [draw_accuracy, draw_rounds])
def test_a_failed_write_leaves_the_older_file(
    draw: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_the_disk(self: FigureCanvasAgg, file: Any) -> None:
        file.write(b"half a picture")
        raise OSError("disk is full")

    monkeypatch.setattr(FigureCanvasAgg, "print_png", fill_the_disk)
    path = tmp_path / "picture.png"
    path.write_text("an older picture")
    with pytest.raises(OSError, match="disk is full"):
        draw(path)
    assert path.read_text() == "an older picture"
    assert list(tmp_path.iterdir()) == [path]


def test_leaves_pyplot_and_settings_alone(tmp_path: Path) -> None:
    script = f"""
import sys, matplotlib
from pathlib import Path
before = dict(dict.items(matplotlib.rcParams))  # reading the backend itself would import pyplot
from fedofa.report.plots import plot_accuracy_vs_macs
plot_accuracy_vs_macs({TYPICAL!r}, Path({str(tmp_path / "picture.png")!r}))
assert "matplotlib.pyplot" not in sys.modules, "pyplot was imported"
assert dict(dict.items(matplotlib.rcParams)) == before, "settings changed"
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2], timeout=120)
