"""What an operation keeps of a tensor for its backward pass, and in what form: as it is, compressed or pruned.

Compression to 8 and 4 bits follows ActNN (arXiv 2104.14129): values are scaled by their group's range and rounded up or
down at random, so that what comes back is right on average. The draws come from a generator that belongs to the keeper.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedofa.finetune.ops.codes import chunk_buffer, chunks, dense, flat, pack_bits, unpack_bits
from fedofa.types.errors import ConfigError
from fedofa.types.plan import KEPT_FORMS

_GROUP = 256
"""Consecutive values in memory that share one range; a chunk of `codes` holds whole groups."""


class Kept(NamedTuple):
    """Tensors, and how to make the wanted one of them; what `restore` gives may be written to only if `fresh`."""

    tensors: tuple[Tensor, ...]
    restore: Callable[[tuple[Tensor, ...]], Any]
    fresh: bool


def as_is(x: Tensor) -> Kept:
    """The tensor itself."""
    return Kept((x,), _first, fresh=False)


def _first(tensors: tuple[Tensor, ...]) -> Tensor:
    return tensors[0]


class Keeper:
    """Keeps activations in one form.

    Args:
        form: "float32" (as they are), "bfloat16", "int8" or "int4".
        fraction: of the values of each tensor, those of largest magnitude, that are kept; the others become 0.
        generator: draws the directions of rounding, for "int8" and "int4".

    Raises:
        ConfigError: for an unknown form, a fraction outside (0, 1], or both levers at once.
    """

    def __init__(self, form: str = "float32", fraction: float = 1.0, generator: torch.Generator | None = None) -> None:
        if form not in KEPT_FORMS:
            raise ConfigError(f"kept activations, form: expected one of {list(KEPT_FORMS)}, found {form!r}")
        if not 0 < fraction <= 1:
            raise ConfigError(f"kept activations, fraction: expected a number in (0, 1], found {fraction!r}")
        if fraction < 1 and form != "float32":
            raise ConfigError(f"kept activations: pruned ones are kept as float32, found form {form!r}")
        if form in ("int8", "int4") and generator is None:
            raise ConfigError(f"kept activations: form {form!r} rounds at random and needs a generator")
        self.form = form
        self.fraction = fraction
        self._generator = generator

    @property
    def is_exact(self) -> bool:
        """Whether what comes back is what was kept, bit for bit."""
        return self.form == "float32" and self.fraction == 1

    def keep(self, x: Tensor) -> Kept:
        """Keep a tensor of any shape in the keeper's form."""
        if self.is_exact:
            return as_is(x)
        x = dense(x.detach())
        if self.fraction < 1:
            return self._prune(x)
        if self.form == "bfloat16":
            return Kept((x.to(torch.bfloat16),), lambda kept, dtype=x.dtype: kept[0].to(dtype), fresh=True)
        return self._quantise(x, 255 if self.form == "int8" else 15)

    def _quantise(self, x: Tensor, levels: int) -> Kept:
        """Codes of 8 or 4 bits, and the least value and the step of every group."""
        values = flat(x)
        count, dtype, device, shape, stride = values.numel(), x.dtype, x.device, x.shape, x.stride()
        groups = -(-count // _GROUP)
        codes = torch.empty(groups, _GROUP if levels == 255 else _GROUP // 2, dtype=torch.uint8, device=device)
        least, step = (torch.empty(groups, 1, dtype=dtype, device=device) for _ in range(2))
        scaled, noise = (chunk_buffer(groups * _GROUP, dtype, device) for _ in range(2))
        for part in chunks(count):
            rows = _rows(part)
            parts = codes[rows], least[rows], step[rows]
            self._quantise_part(values[part], levels, parts, scaled, noise)

        def restore(kept: tuple[Tensor, ...]) -> Tensor:
            codes, least, step = kept
            values = torch.empty(groups, _GROUP, dtype=dtype, device=device)
            for part in chunks(count):
                rows = _rows(part)
                _set_codes(values[rows], codes[rows], levels)
                values[rows].mul_(step[rows]).add_(least[rows])
            return values.as_strided(shape, stride)

        return Kept((codes, least, step), restore, fresh=True)

    def _quantise_part(
        self, values: Tensor, levels: int, kept: tuple[Tensor, Tensor, Tensor], scaled: Tensor, noise: Tensor
    ) -> None:
        """Write codes, least values and steps of some whole groups; `scaled` and `noise` are buffers."""
        codes, least, step = kept
        full = len(codes) * _GROUP
        scaled, noise = scaled[:full], noise[:full].view(-1, _GROUP)
        scaled[: len(values)] = values
        scaled[len(values) :] = 0
        scaled = scaled.view(-1, _GROUP)
        torch.aminmax(scaled, dim=1, keepdim=True, out=(least, step))
        step.sub_(least).div_(levels).clamp_(min=torch.finfo(step.dtype).tiny)
        noise.uniform_(generator=self._generator)
        scaled.sub_(least).div_(step).add_(noise).clamp_(0, levels)
        if levels == 255:
            codes.copy_(scaled)
        else:
            low, high = scaled[:, ::2].to(torch.uint8), scaled[:, 1::2].to(torch.uint8)
            torch.bitwise_or(low, high.mul_(16), out=codes)

    def _prune(self, x: Tensor) -> Kept:
        """The values of largest magnitude in their order, and one bit a value: whether it is one of them."""
        values = flat(x)
        count, shape, stride = values.numel(), x.shape, x.stride()
        size = max(1, math.ceil(self.fraction * count))
        least, ties = _threshold(values, size)
        chosen = torch.empty(size, dtype=x.dtype, device=x.device)
        packed = torch.empty(-(-count // 8), dtype=torch.uint8, device=x.device)
        filled = 0
        for part in chunks(count):
            magnitudes = values[part].abs()
            where = magnitudes > least
            where[(magnitudes == least).nonzero()[:ties]] = True
            found = values[part][where]
            ties -= int((found.abs() == least).sum())
            chosen[filled : filled + len(found)] = found
            filled += len(found)
            packed[_bytes(part)] = pack_bits(where)

        def restore(kept: tuple[Tensor, ...]) -> Tensor:
            values, start = kept[0].new_zeros(count), 0
            for part in chunks(count):
                where = unpack_bits(kept[1][_bytes(part)], part.stop - part.start)
                end = start + int(where.sum())
                values[part][where] = kept[0][start:end]
                start = end
            return values.as_strided(shape, stride)

        return Kept((chosen, packed), restore, fresh=True)


def _threshold(values: Tensor, size: int) -> tuple[float, int]:
    """The least magnitude among the `size` largest, and how many of that very magnitude are among them."""
    magnitudes = values.abs()
    place = len(values) - size
    magnitudes.numpy().partition(place)  # torch's selections hold an index of 8 bytes beside every value
    least = magnitudes[place]
    return float(least), size - int((magnitudes[place:] > least).sum())


def _bytes(part: slice) -> slice:
    """The bytes in which a chunk's bits lie."""
    return slice(part.start // 8, -(-part.stop // 8))


def _rows(part: slice) -> slice:
    """The groups that a chunk of values consists of."""
    return slice(part.start // _GROUP, -(-part.stop // _GROUP))


def _set_codes(values: Tensor, codes: Tensor, levels: int) -> None:
    """Write codes of 8 or 4 bits as numbers into `values`, `(groups, _GROUP)`."""
    if levels == 255:
        values.copy_(codes)
    else:
        values[:, ::2] = codes & 15
        values[:, 1::2] = codes >> 4
