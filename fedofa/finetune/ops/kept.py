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

from fedofa.finetune.ops.codes import dense, flat, pack_bits, unpack_bits
from fedofa.types.errors import ConfigError
from fedofa.types.plan import KEPT_FORMS

_GROUP = 256
"""Consecutive values in memory that share one range."""


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
        x = dense(x)
        if self.fraction < 1:
            return self._prune(x)
        if self.form == "bfloat16":
            return Kept((x.to(torch.bfloat16),), lambda kept, dtype=x.dtype: kept[0].to(dtype), fresh=True)
        return self._quantise(x, 255 if self.form == "int8" else 15)

    def _quantise(self, x: Tensor, levels: int) -> Kept:
        """Codes of 8 or 4 bits, and the least value and the step of every group."""
        values = flat(x)
        count = values.numel()
        padded = torch.nn.functional.pad(values, (0, -count % _GROUP)).view(-1, _GROUP)
        least, most = padded.aminmax(dim=1, keepdim=True)
        step = (most - least).div_(levels).clamp_(min=torch.finfo(x.dtype).tiny)
        noise = torch.rand(padded.shape, generator=self._generator, dtype=x.dtype, device=x.device)
        codes = noise.add_((padded - least).div_(step)).clamp_(0, levels).to(torch.uint8)
        if levels == 15:
            codes = codes[:, ::2] | codes[:, 1::2] << 4
        dtype, shape, stride = x.dtype, x.shape, x.stride()

        def restore(kept: tuple[Tensor, ...]) -> Tensor:
            codes, least, step = kept
            if levels == 15:
                codes = torch.stack((codes & 15, codes >> 4), dim=2).view(-1, _GROUP)
            values = codes.to(dtype).mul_(step).add_(least)
            return values.view(-1)[:count].as_strided(shape, stride)

        return Kept((codes, least, step), restore, fresh=True)

    def _prune(self, x: Tensor) -> Kept:
        """The values of largest magnitude in their order, and one bit a value: whether it is one of them."""
        values = flat(x)
        size = max(1, math.ceil(self.fraction * values.numel()))
        chosen = values.abs().topk(size, sorted=False).indices.sort().values
        where = torch.zeros_like(values, dtype=torch.bool)
        where[chosen] = True
        shape, stride, count = x.shape, x.stride(), values.numel()

        def restore(kept: tuple[Tensor, ...]) -> Tensor:
            dense = kept[0].new_zeros(count)
            dense[unpack_bits(kept[1], count)] = kept[0]
            return dense.as_strided(shape, stride)

        return Kept((values[chosen], pack_bits(where)), restore, fresh=True)
