"""Walks maps part by part, so that everything that is done to a part is done while it lies in a core's cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fedofa.finetune.ops.codes import flat

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

    def __init__(self, x: Tensor, *, examples_differ: bool = False) -> None:
        batch, self._channels = x.shape[:2]
        self._innermost = x.is_contiguous(memory_format=torch.channels_last)
        self._groups = batch if examples_differ or not self._innermost else 1
        positions = x.numel() // (self._groups * self._channels)
        self._joined = 1
        while self._innermost and positions % (2 * self._joined) == 0 and self._width <= _WIDTH // 2:
            self._joined *= 2

    @property
    def _width(self) -> int:
        return self._joined * self._channels

    def parts(self, *maps: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
        """Views of the same part of every map, and the part's place in what `spread` gives."""
        shape = (self._groups, -1, self._width) if self._innermost else (self._groups, self._channels, -1)
        views = [flat(item).view(shape) for item in maps]
        step = max(1, _PART // self._width) if self._innermost else self._channels
        for group in range(self._groups):
            for start in range(0, views[0].shape[1], step):
                yield group, [view[group, start : start + step] for view in views]

    def buffer(self, x: Tensor) -> Tensor:
        """Memory for one part, of the map's type: fresh memory for every part would cost more than the work on it."""
        rows = max(1, _PART // self._width) if self._innermost else self._channels
        width = self._width if self._innermost else x.numel() // (self._groups * self._channels)
        return torch.empty(min(rows, x.numel() // width), width, dtype=x.dtype)

    def spread(self, values: Tensor) -> Tensor:
        """Values of channels, `(1 or batch, channels, 1, 1)` or `(channels,)`, as rows that fit the parts."""
        rows = values.reshape(-1, self._channels)
        if not self._innermost:
            rows = rows.unsqueeze(2)
        elif self._joined > 1:
            rows = rows.repeat(1, self._joined)
        return rows.expand(self._groups, *rows.shape[1:])

    def total(self, part: Tensor) -> Tensor:
        """The sum of a part's values of every channel, `(channels,)`."""
        return part.sum(0).view(self._joined, self._channels).sum(0) if self._innermost else part.sum(1)


def channel_sums(x: Tensor) -> Tensor:
    """The sum of every channel's values, `(channels,)`, of a `dense` map."""
    sweep = Sweep(x)
    totals = torch.zeros(x.shape[1], dtype=torch.float64)
    for _, (part,) in sweep.parts(x):
        totals += sweep.total(part)
    return totals.to(x.dtype)
