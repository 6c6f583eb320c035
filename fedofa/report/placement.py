"""Where labels go so that none covers another: beside the points of a plane, and along one side of a panel."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.path import Path as Polyline
from matplotlib.transforms import Bbox

_GAPS_POINTS = (4, 9, 15, 22, 30, 40, 52, 66, 82, 100, 120, 145, 170, 200)
_NUM_SWEEPS = 3
# Where a label's centre may lie from its marker, in units of its half size: right and below first, then around.
_SIDES = sorted(
    (side for side in itertools.product((-1, -0.5, 0, 0.5, 1), repeat=2) if max(map(abs, side)) == 1),
    key=lambda side: (side[1] > 0, side[0] < 0, abs(side[0] * side[1])),
)


@dataclass(frozen=True)
class Place:
    """Where a label lies, and the line that leads to it from the edge of its marker, `(2, 2)`; both in points."""

    box: Bbox
    leader: np.ndarray


@dataclass(frozen=True)
class _Surroundings:
    """What a label must not cover, and should not cross, in points."""

    frame: Bbox
    markers: list[Bbox]  # of the other points
    line: Polyline  # through the subnets
    others: list[Place]

    def cost(self, place: Place) -> float:
        """The length of the leader, and more for what the label or its leader covers."""
        box, leader = place.box, Polyline(place.leader)
        outside = bool(np.any(np.less(box.min, self.frame.min) | np.greater(box.max, self.frame.max)))
        covered = sum(box.overlaps(other) for other in (*self.markers, *(other.box for other in self.others)))
        hidden = sum(Polyline(other.leader).intersects_bbox(box, filled=False) for other in self.others)
        hidden += sum(leader.intersects_bbox(other.box, filled=False) for other in self.others)
        crossed = sum(leader.intersects_bbox(marker, filled=False) for marker in self.markers)
        crossed += self.line.intersects_bbox(box, filled=False)
        return 1e6 * (outside + covered) + 1e3 * hidden + 40 * crossed + leader_length(place.leader)


def find_places(
    anchors: np.ndarray, sizes: Sequence[np.ndarray], frame: Bbox, line: Polyline, marker_radius: float
) -> list[Place]:
    """The cheapest place for each label, one after the other, then again now that the other labels are known.

    `anchors` are the markers' centres, `(num_labels, 2)`, `sizes` the labels' widths and heights, all in points.
    """
    markers = [Bbox([anchor, anchor]).padded(marker_radius + 1.5) for anchor in anchors]
    places: dict[int, Place] = {}
    for _ in range(_NUM_SWEEPS):
        for index, (anchor, size) in enumerate(zip(anchors, sizes, strict=True)):
            others = [place for other, place in places.items() if other != index]
            around = _Surroundings(frame, markers[:index] + markers[index + 1 :], line, others)
            places[index] = min(_candidates(anchor, size, marker_radius), key=around.cost)
    return [places[index] for index in range(len(anchors))]


def _candidates(anchor: np.ndarray, size: np.ndarray, marker_radius: float) -> Iterator[Place]:
    for gap, side in itertools.product(_GAPS_POINTS, _SIDES):
        centre = anchor + np.array(side) * (size / 2 + marker_radius + gap)
        box = Bbox([centre - size / 2, centre + size / 2]).padded(2)
        end = np.clip(anchor, box.min, box.max)
        direction = (end - anchor) / np.linalg.norm(end - anchor)
        yield Place(box, np.array([anchor + direction * (marker_radius + 1), end]))


def leader_length(leader: np.ndarray) -> float:
    return float(np.linalg.norm(leader[1] - leader[0]))


def spread(centres: Sequence[float], heights: Sequence[float], low: float, high: float) -> np.ndarray:
    """Move intervals apart: their new centres, in the old order and as near as can be (least squares).

    The intervals then lie within `low` and `high` when they fit there at all. With the heights of the intervals below
    taken off, the centres need only not decrease, which is isotonic regression: neighbours that do are pooled.
    """
    order = np.argsort(centres, kind="stable")
    stacked = np.asarray(heights, dtype=float)[order]
    below = np.cumsum(stacked) - stacked / 2
    pools: list[tuple[float, int]] = []  # mean and number of members
    for wanted in np.asarray(centres, dtype=float)[order] - below:
        mean, num_members = float(wanted), 1
        while pools and pools[-1][0] > mean:
            other_mean, num_others = pools.pop()
            mean = (mean * num_members + other_mean * num_others) / (num_members + num_others)
            num_members += num_others
        pools.append((mean, num_members))
    floors = np.repeat([mean for mean, _ in pools], [num for _, num in pools])
    spread = np.empty(len(order))
    spread[order] = np.clip(floors, low, max(low, high - stacked.sum())) + below
    return spread
