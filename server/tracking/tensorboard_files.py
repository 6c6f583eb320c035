"""TensorBoard: event files in the run's own folder, a new one each time that the run is started or resumed."""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import text

from conf.schema import TrackingConf
from server.tracking.tracker import RunFacts, Tracker

_FOLDER = "tensorboard"
_EVERY_ROUND = "folded"  # a scalar that every round has
_SETTINGS = "settings"
_ALL = {"scalars": 0, "images": 1, "tensors": 1}


def open_run(conf: TrackingConf, facts: RunFacts) -> TensorBoardFiles:
    """A further event file; event files that hold rounds too many are removed, since the diary has the others too."""
    folder = facts.folder / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    points = _points(folder)
    if facts.last_round == 0 or _last_round(points) > facts.last_round:
        for path in _event_files(folder):
            path.unlink()
        points = set()
    files = TensorBoardFiles(folder, points)
    rows = [f"| {name} | `{value}` |" for name, value in sorted({**facts.changeable, **facts.settings}.items())]
    files.write(facts.last_round, text(_SETTINGS, "\n".join(["| setting | value |", "|---|---|", *rows])))
    return files


class TensorBoardFiles(Tracker):
    """Scalars by round, the settings as text, the pictures as images.

    A call writes its records in this thread and flushes them, so that a failure shows where it happens and a killed
    run has its last round.
    """

    def __init__(self, folder: Path, points: set[tuple[str, int]]) -> None:
        self._last_round, self._points = _last_round(points), points
        self._file = _next_path(folder).open("xb")
        self._records = RecordWriter(self._file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def last_round(self) -> int:
        """See Tracker."""
        return self._last_round

    def log_round(self, round_number: int, metrics: Mapping[str, float]) -> None:
        """See Tracker."""
        self.write(round_number, _scalars(metrics))

    def log_results(self, round_number: int, figures: Mapping[str, float], files: Sequence[Path]) -> None:
        """See Tracker."""
        new = {name: value for name, value in figures.items() if (name, round_number) not in self._points}
        self.write(round_number, _scalars(new))
        for path in files:
            if path.suffix == ".png" and (path.stem, round_number) not in self._points:
                self.write(round_number, _image(path))

    def close(self, *, finished: bool) -> None:
        """See Tracker."""
        self._file.close()

    def write(self, step: int, summary: Summary) -> None:
        """Write one event and flush it."""
        self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def _write(self, event: Event) -> None:
        self._records.write(event.SerializeToString())
        self._file.flush()


def _event_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("events.out.tfevents.*"))


def _next_path(folder: Path) -> Path:
    """A name that sorts behind those of earlier starts, since TensorBoard reads files in the order of their names."""
    starts = [int(path.name.split(".")[3]) for path in _event_files(folder)]
    return folder / f"events.out.tfevents.{max([int(time.time()) - 1, *starts]) + 1:010d}.fedofa"


def _points(folder: Path) -> set[tuple[str, int]]:
    """(tag, step) of the scalars and images that are in the folder."""
    if not _event_files(folder):
        return set()
    events = EventAccumulator(str(folder), size_guidance=_ALL)
    events.Reload()
    tags = events.Tags()
    scalars = {(tag, event.step) for tag in tags["scalars"] for event in events.Scalars(tag)}
    return scalars | {(tag, event.step) for tag in tags["images"] for event in events.Images(tag)}


def _last_round(points: set[tuple[str, int]]) -> int:
    return max((step for tag, step in points if tag == _EVERY_ROUND), default=0)


def _scalars(values: Mapping[str, float]) -> Summary:
    return Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])


def _image(path: Path) -> Summary:
    """A PNG file as it is; width and height stand in its header."""
    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    image = Summary.Image(encoded_image_string=data, width=width, height=height, colorspace=4)
    return Summary(value=[Summary.Value(tag=path.stem, image=image)])
