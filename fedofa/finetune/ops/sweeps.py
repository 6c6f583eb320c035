"""Walks maps part by part, so that everything that is done to a part is done while it lies in a core's cache."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

_PART = 1 << 16
"""Values of a part: four of them and what is computed between them fit the cache of a core."""
_WIDTH = 1 << 8
"""Rows of few channels are joined up to so many values: torch is slow at adding short rows to long maps."""


class Sweep:
    """The parts of `dense` maps of one shape and layout, and what belongs to their channels.

    With channels innermost a part is a matrix of rows, each of which holds some positions' channels; otherwise it is
    one example `(channels, h * w)`.

    Args:
        x: one of the maps, `(batch, channels, h, w)`.
        examples_differ: no part reaches over two examples, since coefficients are each example's own.
    """

    __slots__ = ("_channels", "_innermost", "_joined", "_places", "_width")

    def __init__(self, x: Tensor, *, examples_differ: bool = False) -> None:
        self._channels = x.shape[1]
        self._innermost = x.is_contiguous(memory_format=torch.channels_last)
        self._joined, self._width, self._places = _places(tuple(x.shape), self._innermost, examples_differ)

    def parts(self, *maps: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
        """Views of the same part of every map, and the part's place in what `spread` gives."""
        width = self._width
        for group, start, rows in self._places:
            yield (
                group,
                [item.as_strided((rows, width), (width, 1), item.storage_offset() + start * width) for item in maps],
            )

    def buffer(self, x: Tensor) -> Tensor:
        """Memory for one part, of the map's type: fresh memory for every part would cost more than the work on it."""
        return torch.empty(max(rows for _, _, rows in self._places), self._width, dtype=x.dtype, device=x.device)

    def spread(self, values: Tensor) -> Tensor:
        """Values of channels, `(1 or batch, channels, 1, 1)` or `(channels,)`, as rows that fit the parts."""
        rows = values.reshape(-1, self._channels)
        if not self._innermost:
            rows = rows.unsqueeze(2)
        elif self._joined > 1:
            rows = rows.repeat(1, self._joined)
        groups = self._places[-1][0] + 1
        return rows if len(rows) == groups else rows.expand(groups, *rows.shape[1:])

    def total(self, part: Tensor) -> Tensor:
        """The sum of a part's values of every channel, `(channels,)`."""
        if not self._innermost:
            return part.sum(1)
        sums = part.sum(0)
        return sums if self._joined == 1 else sums.view(self._joined, self._channels).sum(0)


@lru_cache(maxsize=1024)
def _places(
    shape: tuple[int, int, int, int], innermost: bool, examples_differ: bool
) -> tuple[int, int, tuple[tuple[int, int, int], ...]]:
    """Positions that a row holds, values of a row, and for every part its group, first row and number of rows."""
    batch, channels, height, width = shape
    if not innermost:
        places = tuple((example, example * channels, channels) for example in range(batch))
        return 1, height * width, places
    groups = batch if examples_differ else 1
    positions, joined = batch * height * width // groups, 1
    while positions % (2 * joined) == 0 and 2 * joined * channels <= _WIDTH:
        joined *= 2
    rows, step = positions // joined, max(1, _PART // (joined * channels))
    places = tuple(
        (group, group * rows + start, min(step, rows - start))
        for group in range(groups)
        for start in range(0, rows, step)
    )
    return joined, joined * channels, places


def channel_sums(x: Tensor) -> Tensor:
    """The sum of every channel's values, `(channels,)`, of a `dense` map."""
    sweep = Sweep(x)
    totals = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    for _, (part,) in sweep.parts(x):
        totals += sweep.total(part)
    return totals.to(x.dtype)
