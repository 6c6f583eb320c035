"""The picture of a central training: a whole file with every series that the summary has."""

import pytest
from matplotlib.figure import Figure
from PIL import Image

from fedofa.report import style
from fedofa.report.shrinking import plot_shrinking
from fedofa.types.errors import ConfigError


def summary(*, calibrated: bool) -> dict:
    rows = [
        {"name": name, "macs": macs, "accuracy": accuracy, "accuracy_before": 0.1}
        | {"accuracy_uncalibrated": 0.4 if calibrated else None}
        for name, macs, accuracy in [("largest", 4e6, 0.97), ("smallest", 4e5, 0.91), ("random 1", 1e6, 0.95)]
    ]
    return {"steps": 1500, "schedule": "sandwich", "seed": 0, "subnets": rows}


@pytest.mark.parametrize(("calibrated", "series"), [(False, 2), (True, 3)])
def test_every_series_is_drawn_in_order_of_macs(tmp_path, monkeypatch, calibrated, series):
    figures: list[Figure] = []
    save = style.save_png
    monkeypatch.setattr(style, "save_png", lambda figure, path: (figures.append(figure), save(figure, path)))
    plot_shrinking(summary(calibrated=calibrated), tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width > 1000
    (axes,) = figures[0].axes
    assert [line.get_xdata().tolist() for line in axes.lines] == [[0.4, 1.0, 4.0]] * series
    assert axes.lines[0].get_ydata().tolist() == [91.0, 95.0, 97.0]
    assert len(axes.get_legend().get_texts()) == series
    assert not [path for path in tmp_path.iterdir() if path.name != "picture.png"]


def test_sizes_trained_alone_are_points_without_a_line(tmp_path, monkeypatch):
    figures: list[Figure] = []
    monkeypatch.setattr(style, "save_png", lambda figure, path: figures.append(figure))
    rows = [{"name": "largest", "macs": 4e6, "accuracy": 0.97, "accuracy_alone": 0.98}]
    rows += [{"name": "smallest", "macs": 4e5, "accuracy": 0.91, "accuracy_alone": None}]
    plot_shrinking({"steps": 10, "schedule": "sandwich", "seed": 0, "subnets": rows}, tmp_path / "picture.png")
    trained, alone = figures[0].axes[0].lines
    assert trained.get_xdata().tolist() == [0.4, 4.0]
    assert (alone.get_xdata().tolist(), alone.get_ydata().tolist()) == ([4.0], [98.0])
    assert alone.get_linestyle() == "None"


def test_a_summary_without_subnets_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="expected at least one entry"):
        plot_shrinking({**summary(calibrated=True), "subnets": []}, tmp_path / "picture.png")
