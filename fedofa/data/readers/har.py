"""Motion of people with a smartphone and a smartwatch, cut into windows (10.5281/zenodo.8398688, CC BY 4.0).

A window is one channel of six rows (accelerometer x, y, z in m/s^2, gyroscope x, y, z in rad/s) by its samples at
100 Hz, float32 as recorded. It never crosses a change of subject, device, execution or activity, nor a gap in time.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from fedofa.data.readers.archive import read_archive
from fedofa.data.readers.base import Decoded, Source, file_fingerprint, found_file
from fedofa.types.errors import DatasetError

HELD_OUT: Final = (19, 20, 21, 22, 23)
"""The subjects that are never trained on unless settings say otherwise: the last five of 23."""

_KEYS = ("imu", "label", "subject", "watch", "execution", "timestamp_ms", "label_names", "channels")
_BOUNDARIES = ("subject", "watch", "execution", "label")


def open_har(
    path: Path | None,
    *,
    window_samples: int = 100,
    window_overlap: float = 0.5,
    max_gap_ms: int = 100,
    held_out: Sequence[int] = HELD_OUT,
) -> Source:
    """Find the recordings at `path`: windows `(1, 6, window_samples)`, owned by subjects.

    Args:
        window_samples: length of a window; 100 samples last a second.
        window_overlap: share of a window that the next one repeats, in [0, 1).
        max_gap_ms: two samples further apart than this lie in different windows.
        held_out: the subjects that make the official test part.
    """
    if window_samples < 1:
        raise DatasetError(f"data.window_samples: expected at least 1, found {window_samples}")
    if not 0 <= window_overlap < 1:
        raise DatasetError(f"data.window_overlap: expected a number in [0, 1), found {window_overlap}")
    if max_gap_ms < 1:
        raise DatasetError(f"data.max_gap_ms: expected at least 1, found {max_gap_ms}")
    file = found_file("har", path, "the recordings (an .npz file)")
    stride = max(1, round(window_samples * (1 - window_overlap)))
    return Source(file_fingerprint(file), partial(_decode, file, window_samples, stride, max_gap_ms, held_out))


def _decode(path: Path, window_samples: int, stride: int, max_gap_ms: int, held_out: Sequence[int]) -> Decoded:
    recordings = read_archive(path, "motion file", _KEYS)
    _check_recordings(path, recordings)
    starts = window_starts(
        [recordings[key] for key in _BOUNDARIES], recordings["timestamp_ms"], window_samples, stride, max_gap_ms
    )
    if not starts.size:
        raise DatasetError(
            f"{path}: no stretch of one activity has {window_samples} samples; lower data.window_samples"
        )
    subjects = recordings["subject"][starts]
    split = _split(path, subjects, held_out)
    names, owners = np.unique(subjects, return_inverse=True)
    imu = recordings["imu"].astype(np.float32)
    return Decoded(
        class_names=tuple(str(name).lower() for name in recordings["label_names"]),
        labels=recordings["label"][starts].astype(np.int64),
        split=split,
        image_shape=(1, imu.shape[1], window_samples),
        images=(imu[start : start + window_samples].T[None] for start in starts),
        dtype=np.float32,
        row_statistics=True,
        owner_names=tuple(f"subject {name}" for name in names),
        owners=owners.astype(np.int64),
    )


def window_starts(
    boundaries: Sequence[npt.NDArray],
    timestamps_ms: npt.NDArray[np.integer],
    window_samples: int,
    stride: int,
    max_gap_ms: int,
) -> npt.NDArray[np.int64]:
    """Return the first sample of every window, `(num_windows,)`.

    Args:
        boundaries: rows `(num_samples,)`; no window crosses a change in any of them.
        timestamps_ms: `(num_samples,)`; nor a step back in time, or one forward by more than `max_gap_ms`.
        stride: samples from one window of a stretch to its next.
    """
    steps = np.diff(timestamps_ms)
    breaks = (steps < 0) | (steps > max_gap_ms)
    for row in boundaries:
        breaks |= row[1:] != row[:-1]
    bounds = np.concatenate([[0], np.flatnonzero(breaks) + 1, [timestamps_ms.size]])
    stretches = itertools.pairwise(bounds)
    starts = [np.arange(start, end - window_samples + 1, stride) for start, end in stretches]
    return np.concatenate(starts).astype(np.int64)


def _split(path: Path, subjects: npt.NDArray[np.integer], held_out: Sequence[int]) -> npt.NDArray[np.uint8] | None:
    """0 for training, 1 for held-out subjects; None when none is held out."""
    known = np.unique(subjects)
    unknown = sorted(set(held_out) - set(known.tolist()))
    if unknown:
        raise DatasetError(
            f"data.held_out: expected subjects of {path} ({known.min()} to {known.max()}), found {unknown}"
        )
    split = np.isin(subjects, list(held_out)).astype(np.uint8)
    if split.all():
        raise DatasetError("data.held_out: expected to leave at least one subject to train on, found all of them")
    return split if split.any() else None


def _check_recordings(path: Path, recordings: dict[str, npt.NDArray]) -> None:
    """Raise `DatasetError` at the first contradiction between the arrays."""
    imu, label, channels = recordings["imu"], recordings["label"], recordings["channels"]
    rows = [recordings[key] for key in (*_BOUNDARIES, "timestamp_ms")]
    requirements = (
        (
            "imu has one row per sample and one column per channel",
            imu.shape == (label.size, channels.size),
        ),
        ("imu holds finite floats", imu.dtype.kind == "f" and bool(np.isfinite(imu).all())),
        ("there is at least one sample", label.size > 0),
        ("all other arrays have one entry per sample", all(row.shape == (label.size,) for row in rows)),
        ("they hold integers", all(row.dtype.kind in "iub" for row in rows)),
        ("label is below the number of label_names", label.max(initial=0) < recordings["label_names"].size),
    )
    for requirement, holds in requirements:
        if not holds:
            shapes = ", ".join(f"{key} {recordings[key].dtype}{recordings[key].shape}" for key in _KEYS)
            raise DatasetError(f"motion file {path} is damaged: expected that {requirement}, found {shapes}")
